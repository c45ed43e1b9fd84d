"""SIGKILL at random moments of a run that saves at every step, again and again:  python -m bench.kill_saves [--kills 50]

    start (--resume auto) -> wait for new steps -> a random moment later: SIGKILL to one rank, or to all
          -> every published checkpoint is whole to the byte, the next start continues from the newest of them

LoRA on two ranks of a tiny model, three checkpoints kept. At the end the steps and the adapter are compared with those of a
run that nobody disturbed. Prints what was counted; an assertion names what was not as it should be. A few minutes: the ranks
are forked from a process that has imported everything (tests/e2e/test_resume.py kills what the launcher started).
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import socket
import tempfile
import time
from collections import Counter
from pathlib import Path

from accessory.checkpoint import resume
from tests.e2e.launches import as_flags
from tests.helpers import write_tiny_checkpoint, write_tiny_data

RANKS, KEPT = 2, 3
FLAGS = {
    "resume": "auto",
    "precision": "fp32",
    "lora_rank": 4,
    "batch_size": 1,
    "lr_scheduler": "constant",
    "max_steps": 10**6,
}
FLAGS |= {"save_total_limit": KEPT, "keep_best": "false", "eval_steps": 10**6, "report_to": "none", "warmup_steps": 0}


def rank_main(argv: list[str], variables: dict[str, str], log: str) -> None:
    """One rank's whole life, as torchrun would start it."""
    from accessory import config, main_finetune
    from accessory.data.sft import DataArgs
    from accessory.flags import ParallelArgs
    from accessory.model.lora import TuningArgs
    from accessory.train import loop, optim
    from accessory.train.start import RunArgs

    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    os.environ.update(variables)
    sections = (RunArgs, ParallelArgs, TuningArgs, DataArgs, optim.OptimArgs, loop.LoopArgs)
    config.run(main_finetune.main, *sections, argv=argv)


class Run:
    """The ranks of one start."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["accessory.main_finetune", "torch.distributed.fsdp", "sentencepiece", "safetensors.torch"]
    )

    def __init__(self, root: Path, run: str, log: str, save_steps: int):
        given = {"pretrained_path": root / "tiny", "data_config": root / "data" / "data.yaml", "output_dir": root / run}
        argv, self.log = as_flags(given | FLAGS | {"save_steps": save_steps}), root / f"{log}.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(RANKS)}
        self.ranks = []
        for rank in range(RANKS):
            mine = where | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.ranks.append(self.context.Process(target=rank_main, args=(argv, mine, str(self.log)), daemon=True))
            self.ranks[-1].start()

    def printed(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def alive(self) -> bool:
        return all(p.is_alive() for p in self.ranks)

    def kill(self, *ranks: int) -> None:
        """SIGKILL to these, or to all; then waits for all: the others notice."""
        for rank in ranks or range(RANKS):
            self.ranks[rank].kill()
        for process in self.ranks:
            process.join(60)
            assert process.exitcode is not None, "a rank hangs after its neighbour was killed"


def losses(run: Path) -> dict[int, float]:
    """{step: loss} of metrics.jsonl, without a torn last line."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().split("\n")[:-1] if (run / "metrics.jsonl").exists() else []:
        record = json.loads(line)
        if "loss" in record:
            found[record["step"]] = record["loss"]
    return found


def whole_steps(run: Path) -> list[int]:
    """The published steps, all of them hashed: none may be damaged."""
    for _, path in resume.steps(run):
        assert (wrong := resume.problem(path, hashes=True)) is None, wrong
    return [step for step, _ in resume.steps(run)]


def wait_until(run: Run, condition, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert run.alive() and time.monotonic() < deadline, run.printed()
        time.sleep(0.002)


def kill_once(root: Path, number: int, draw: random.Random, counts: Counter) -> None:
    run, after = root / "broken", draw.randint(0, 4)  # new checkpoints that are waited for
    before = (whole_steps(run) or [0])[-1]
    sign = f"step {before + after}: saved" if after else "continuing from" if before else "weights loaded"
    launch = Run(root, "broken", f"broken{number}", 1)
    try:
        wait_until(launch, lambda: sign in launch.printed())
        time.sleep(draw.uniform(0, 0.4))
        everyone = draw.random() < 0.5
        launch.kill(*(() if everyone else (draw.randrange(RANKS),)))
    finally:
        launch.kill()
    continued = re.search(r"continuing from \S+, step (\d+)", launch.printed())
    assert int(continued[1]) == before if before else continued is None, launch.printed()
    assert "passed over" not in launch.printed(), launch.printed()
    logged, steps = max(losses(run), default=0), whole_steps(run) or [0]
    assert steps[-1] >= before + after and len(steps) <= KEPT + 1, (before, after, steps)
    counts["killed: all" if everyone else "killed: one rank"] += 1
    counts["within a save"] += bool(list(run.glob("step_*.tmp-*")))
    counts["within retention"] += bool(list(run.glob(".trash-*"))) or len(steps) > KEPT
    counts["steps saved"] += steps[-1] - before
    counts["steps done again"] += max(0, logged - steps[-1])
    counts["done again at most"] = max(counts["done again at most"], logged - steps[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.kills < 1:
        parser.error(f"--kills {given.kills}: 1 or more")
    draw, counts = random.Random(given.seed), Counter()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_tiny_checkpoint(root / "tiny")
        write_tiny_data(root / "data", 16)
        for number in range(given.kills):
            kill_once(root, number, draw, counts)
        last = whole_steps(root / "broken")[-1]
        launch = Run(root, "unbroken", "unbroken", last)
        try:
            wait_until(launch, lambda: (root / "unbroken" / f"step_{last:08d}").exists())
        finally:
            launch.kill()
        broken, unbroken = losses(root / "broken"), losses(root / "unbroken")
        assert [broken[step] for step in range(1, last + 1)] == [unbroken[step] for step in range(1, last + 1)]
        one, other = (root / run / f"step_{last:08d}" / "adapter.safetensors" for run in ("broken", "unbroken"))
        assert one.read_bytes() == other.read_bytes()
    print(
        f"{given.kills} kills: {dict(counts)}; 0 unloadable, 0 damaged, 0 half-written ones loaded, 0 published steps lost"
    )
    print(f"{last} steps: every loss and the adapter equal those of the undisturbed run")


if __name__ == "__main__":
    main()
