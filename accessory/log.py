"""What a run tells: lines on rank 0's terminal, one JSON object a step in metrics.jsonl, a progress bar; and to TensorBoard
and Weights & Biases what is in metrics.jsonl.

    output/<exp>/metrics.jsonl   {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "memory_gb", ...}
                                 {"step", "epoch", "val_loss", "val_perplexity", "val_accuracy"}
    output/<exp>/samples.jsonl   {"step", "prompt", "answer"}
    output/<exp>/timing.jsonl    {"step", "time": {"steps", "seconds": {"data", "forward", "backward", ...}}}   one, as a run ends
    output/<exp>/wandb_id        the run's name at Weights & Biases, so that a continued run goes on there

A resumed run drops the lines of steps that it will do again, so that every step is in the file once.
Test: tests/unit/test_log.py
"""

import contextlib
import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

REPORTERS = ("tensorboard", "wandb")  # of --report_to: names of packages


def say(text: str, rank: int = 0) -> None:
    """One line on rank 0's terminal, above the progress bar if there is one."""
    if rank == 0:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class RunLog:
    """The files of one run directory. Made on every rank; writes on rank 0 only."""

    def __init__(
        self,
        directory: str | Path,
        rank: int,
        report_to: Collection[str],
        resumed_step: int | None,
        max_steps: int,
        flags: dict[str, Any] | None = None,
    ):
        """`report_to`: of REPORTERS; `flags`: what Weights & Biases shows as the run's configuration."""
        self.active, self.directory, self.max_steps = rank == 0, Path(directory), max_steps
        self.board, self.wandb, self.bar = None, None, None
        if not self.active:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            keep_until(self.directory / name, resumed_step)
        if "tensorboard" in report_to:
            self.board = _summary_writer(self.directory / "tensorboard", resumed_step)
        if "wandb" in report_to:
            self.wandb = _wandb_run(self.directory, resumed_step, flags or {})

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
        """Appends one JSON object; its numbers go to TensorBoard and Weights & Biases too."""
        if not self.active:
            return
        with naming(self.directory / file), open(self.directory / file, "a", encoding="utf-8") as out:
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
        numbers = {
            ("val/" if key.startswith("val_") else "train/") + key: value
            for key, value in record.items()
            if isinstance(value, (int, float)) and key != "step"
        }
        if self.board is not None:
            with naming(self.directory / "tensorboard"):
                for key, value in numbers.items():
                    self.board.add_scalar(key, value, record["step"])
                self.board.flush()
        if self.wandb is not None and numbers:
            self.wandb.log(numbers | {"step": record["step"]})

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            with naming(self.directory / "tensorboard"):
                self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


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
    with naming(part):
        part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(part, path)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of what is done inside names the file: of a write that finds the disk full Python does not say which it was."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def check_reporters(report_to: Collection[str]) -> None:
    """Raises ValueError when a package that --report_to needs is not there: before the run, not when its weights are read."""
    for name in REPORTERS:
        if name in report_to and name not in sys.modules and importlib.util.find_spec(name) is None:
            raise ValueError(missing(name))


def missing(name: str) -> str:
    return f"--report_to {name}: the {name} package is missing; pip install {name}, or leave it out (--report_to none)"


def _summary_writer(directory: Path, resumed_step: int | None):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(missing("tensorboard")) from None
    return SummaryWriter(str(directory), purge_step=0 if resumed_step is None else resumed_step + 1)


def _wandb_run(directory: Path, resumed_step: int | None, flags: dict[str, Any]) -> Any:
    """Where, as whom and whether online is wandb's own affair: WANDB_PROJECT, WANDB_MODE=offline, `wandb login`.

    Its own counter only goes up, and a resumed run does some steps again: ours is the axis instead."""
    try:
        import wandb
    except ImportError:
        raise ValueError(missing("wandb")) from None
    file = directory / "wandb_id"
    if resumed_step is None or not file.exists():
        file.write_text(uuid.uuid4().hex[:12])
    try:
        run = wandb.init(
            dir=str(directory), name=directory.resolve().name, id=file.read_text().strip(), resume="allow", config=flags
        )
    except (wandb.Error, OSError) as error:
        reason = f"{error}".strip().partition("\n")[0]
        raise ValueError(
            f"--report_to wandb: {reason}; set WANDB_MODE=offline, log in with `wandb login`, or leave it out"
        ) from None
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def peak_memory_gb() -> float:
    """The most memory this process has held: on the GPU where it uses one, else resident on the host. In 10^9 bytes."""
    import torch

    if torch.cuda.is_initialized():  # not by its being there: a run may be on the CPU beside one
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
