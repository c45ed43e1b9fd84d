"""What a run tells: lines on rank 0's terminal, one JSON object a step in metrics.jsonl, TensorBoard, a progress bar.

    output/<exp>/metrics.jsonl   {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "memory_gb", ...}
                                 {"step", "epoch", "val_loss", "val_perplexity", "val_accuracy"}
    output/<exp>/samples.jsonl   {"step", "prompt", "answer"}

A resumed run drops the lines of steps that it will do again, so that every step is in the file once.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def say(text: str, rank: int = 0) -> None:
    """One line on rank 0's terminal, above the progress bar if there is one."""
    if rank == 0:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class RunLog:
    """The files of one run directory. Made on every rank; writes on rank 0 only."""

    def __init__(self, directory: str | Path, rank: int, tensorboard: bool, resumed_step: int | None, max_steps: int):
        self.active, self.directory, self.board, self.bar = rank == 0, Path(directory), None, None
        self.max_steps = max_steps
        if not self.active:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            keep_until(self.directory / name, resumed_step)
        if tensorboard:
            self.board = _summary_writer(self.directory / "tensorboard", resumed_step)

    def start_bar(self, step: int) -> None:
        if self.active:
            from tqdm import tqdm

            self.bar = tqdm(
                total=self.max_steps, initial=step, desc="training", unit="step", dynamic_ncols=True, mininterval=0.5
            )

    def step(self, step: int, shown: dict[str, str]) -> None:
        """Moves the bar to `step` with these figures beside it."""
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.bar.n)

    def write(self, record: dict[str, Any], file: str = "metrics.jsonl") -> None:
        """Appends one JSON object; its numbers go to TensorBoard too."""
        if not self.active:
            return
        with open(self.directory / file, "a", encoding="utf-8") as out:
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
        if self.board is not None:
            for key, value in record.items():
                if isinstance(value, (int, float)) and key != "step":
                    self.board.add_scalar(("val/" if key.startswith("val_") else "train/") + key, value, record["step"])
            self.board.flush()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            self.board.close()


def keep_until(path: Path, step: int | None) -> None:
    """Rewrites a jsonl without the lines beyond `step` (None: a fresh run, all go) and without a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the process died while writing it
        if step is not None and record.get("step", 0) <= step:
            kept.append(line)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(part, path)


def _summary_writer(directory: Path, resumed_step: int | None):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "--report_to tensorboard: the tensorboard package is missing; pip install tensorboard, or --report_to none"
        ) from None
    return SummaryWriter(str(directory), purge_step=None if resumed_step is None else resumed_step + 1)


def peak_memory_gb() -> float:
    """The most memory this process has held: on the GPU where there is one, else resident on the host. In 10^9 bytes."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
