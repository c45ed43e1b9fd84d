"""How long training stands still for a save, and how long the save takes:  python -m bench.save_stall [--layers 14]

A LLaMA of 300 M fp32 parameters on one CPU process, full tuning: 3.6 GB of parameters and moments, 4.8 GB on disk. For each of
three saves: `Saver.start` (what the training thread waits for), from there to the published checkpoint, and the optimizer steps
that were done meanwhile, beside `start` and `finish` together, which is the wait of a save that blocks. Needs about 10 GB of
memory and of disk (--directory).
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from accessory.checkpoint import export
from accessory.checkpoint.save import Saver
from accessory.flags import ParallelArgs
from accessory.model.lora import TuningArgs
from accessory.model.pretrained import build
from accessory.parallel import groups
from accessory.train import optim
from accessory.train.start import materialise
from tests.gpu.bodies import random_checkpoint

SIZES = {"dim": 1024, "n_heads": 16, "n_kv_heads": 16, "hidden_dim": 4096, "vocab_size": 32000}
TOKENS = 16  # a step is short beside a save, so that several of them fall into one


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--directory", default=tempfile.gettempdir())
    given = parser.parse_args()
    groups.init(1)
    checkpoint, args = random_checkpoint(SIZES | {"n_layers": given.layers}, torch.float32)
    model = build(checkpoint, args, TuningArgs())
    materialise(model, checkpoint, ParallelArgs(precision="fp32"), 0)
    optimizer, tokens = optim.adamw(model, optim.OptimArgs()), torch.arange(TOKENS).view(1, -1)
    count = sum(p.numel() for p in model.parameters())
    directory = Path(tempfile.mkdtemp(dir=given.directory))
    names = [n for n, _ in model.named_parameters()]
    beside = export.Weights(model, args.to_dict(), {}, 0, dict, lambda into: [])
    saver = Saver(directory, model, optimizer, names, beside, 1)

    def step() -> None:
        loss, _, _ = model(tokens, labels=tokens)
        loss.backward()
        optim.step(optimizer, 1e-5, torch.zeros(()))

    try:
        quiet = [timed(step) for _ in range(4)][1:]
        print(f"{count / 1e6:.0f} M parameters; a step without a save: {statistics.mean(quiet):.2f} s")
        for number in range(given.saves):
            stall = timed(lambda n=number: saver.start(n, {}))
            begin, busy = time.perf_counter(), []
            while saver.thread.is_alive():
                busy.append(timed(step))
            saver.finish()
            total = time.perf_counter() - begin
            print(
                f"save {number}: training waits {stall * 1e3:.0f} ms; {len(busy)} steps of {statistics.mean(busy):.2f} s in the {total:.1f} s until it was published",
                flush=True,
            )
        blocking = timed(lambda: (saver.start(given.saves, {}), saver.finish()))
        size = sum(f.stat().st_size for f in directory.glob("latest/**/*") if f.is_file())
        print(f"a save that blocks: training waits {blocking * 1e3:.0f} ms for {size / 1e9:.2f} GB")
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
