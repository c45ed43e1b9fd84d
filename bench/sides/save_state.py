"""How long training stands still for a checkpoint of weights and AdamW's moments, in one of several ways.

settings: way (ours | ours_blocking | torch_save | dcp | dcp_async), units. data: sizes, directory. "seconds" is what the training
thread waits, in the saves after the first; more.first_s in that one; more.published_s, from the start until the checkpoint is
there. Nothing else runs meanwhile. ours also hashes every file and forces it to the disk; torch_save does neither,
torch_save_fsync the latter.
"""

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from accessory.checkpoint import export
from accessory.checkpoint.save import Saver
from bench import measure
from bench.sides import own_step
from bench.sides.own_step import ParallelArgs, Step, groups

STEPS = 10  # before the first save, as few as no run has


def ours(step: Step, args, directory: Path):
    names = [n for n, _ in step.model.named_parameters()]
    beside = export.Weights(step.model, args.to_dict(), {}, 0, dict, lambda into: [])
    saver, count = Saver(directory, step.model, step.optimizer, names, beside, 1), 0

    def start() -> None:
        nonlocal count
        count += 1
        saver.start(count, {})

    return start, saver.finish


def torch_save(step: Step, args, directory: Path, fsync: bool = False):
    def start() -> None:
        state = {"model": plain(step.model.state_dict()), "optimizer": plain(step.optimizer.state_dict())}
        torch.save(state, directory / "state.pth")
        if fsync:
            with open(directory / "state.pth", "rb+") as file:
                os.fsync(file.fileno())

    return start, lambda: None


def plain(value):
    """FSDP's DTensors as the tensors they are on one rank: no copy."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value.to_local() if hasattr(value, "to_local") else value


def dcp(step: Step, args, directory: Path, background: bool = False):
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    pending = []

    def start() -> None:
        model, optimizer = get_state_dict(step.model, step.optimizer)
        state = {"model": model, "optimizer": optimizer}
        if background:
            pending.append(checkpoint.async_save(state, checkpoint_id=directory / "dcp"))
        else:
            checkpoint.save(state, checkpoint_id=directory / "dcp")

    return start, lambda: pending.pop().result() if pending else None


WAYS = {
    "ours": ours,
    "torch_save": torch_save,
    "torch_save_fsync": lambda *given: torch_save(*given, fsync=True),
    "dcp": dcp,
    "dcp_async": lambda *given: dcp(*given, background=True),
}


def main() -> None:
    work = measure.begin()
    groups.init(1, on=work["device"])
    model, args = own_step.load(work["data"]["model"], ParallelArgs(precision="fp32"))
    step = Step(model, args.kv_heads)
    tokens = own_step.random_tokens(args.vocab_size, (1, 16), groups.device())
    directory = Path(tempfile.mkdtemp(dir=work["data"]["directory"]))
    start, finish = WAYS[work["settings"]["way"]](step, args, directory)
    for _ in range(STEPS):
        step(tokens, tokens)
    laps, published = {"seconds": [], "cpu_seconds": []}, []
    try:
        for _ in range(work["settings"]["units"] + 1):  # the first one apart: it may have to make buffers
            begin, used = time.perf_counter(), measure.cpu_seconds()
            start()
            laps["seconds"].append(time.perf_counter() - begin)
            laps["cpu_seconds"].append(measure.cpu_seconds() - used)
            finish()
            published.append(time.perf_counter() - begin)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    count, first = sum(p.numel() for p in model.parameters()), {k: v[1:] for k, v in laps.items()}
    more = {"published_s": published[-1], "first_s": laps["seconds"][0], "stall_s": statistics.median(first["seconds"])}
    measure.report(loss=[], tokens=count, **first, peak_mb=measure.peak_mb(work["device"]), more=more)


if __name__ == "__main__":
    main()
