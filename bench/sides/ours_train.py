"""Ours: main_finetune's own path, `loop.fit` with its loader, clipping, fused AdamW and log, from weights in a file.

Timed from the start of one optimizer step to the start of the next, so everything that a step costs is in it. Settings: precision,
compile, lora, checkpointing, file (which of data["models"]).
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from accessory import log
from accessory.checkpoint.adapter import with_adapter
from accessory.data.sft import Example
from accessory.flags import ParallelArgs
from accessory.model import Transformer, shard_dim
from accessory.model.llama import kv_copied
from accessory.model.lora import TuningArgs, mark_trainable, partial_grad
from accessory.model.pretrained import build, open_pretrained
from accessory.parallel import groups
from accessory.parallel.grads import GradientRules
from accessory.train import loop, objectives, optim
from accessory.train.start import materialise
from accessory.train.state import TrainState
from bench import measure
from bench.sides import batches


class InOrder(list):
    """Examples that come in the order in which they lie."""

    def epoch_order(self, seed: int, epoch: int) -> range:
        return range(len(self))


def read_examples(data: dict) -> InOrder:
    return InOrder(Example(ids.numpy().astype(np.int32), prompt) for ids, prompt in batches.examples(data))


def load(data: dict, settings: dict, parallel: ParallelArgs) -> tuple[Transformer, object]:
    """(the model as a run has it before its first step, its sizes)."""
    checkpoint, args = open_pretrained(data["models"][settings.get("file", "fp32")])
    tuning = TuningArgs()
    if settings.get("lora"):
        checkpoint, tuning = with_adapter(checkpoint, data["adapter"], tuning)
    model = build(checkpoint, args, tuning)
    mark_trainable(model, tuning)
    materialise(model, checkpoint, parallel, 0)
    return model, args


def main() -> None:
    work = measure.begin()
    data, settings, device = work["data"], work["settings"], work["device"]
    groups.init(1, on=device)
    parallel = ParallelArgs(
        precision=settings["precision"],
        compile=settings.get("compile", False),
        checkpointing=settings.get("checkpointing", False),
    )
    model, args = load(data, settings, parallel)
    loaded = measure.now_mb(device)
    optim_args = optim.OptimArgs(lr=data["lr"], lr_scheduler="constant", warmup_ratio=0.0)
    per_unit, warmup, units = data["windows_per_unit"], data["warmup"], data["units"]
    steps = per_unit * (warmup + units) + 1  # the last one only ends the time of the one before it
    loop_args = loop.LoopArgs(batch_size=data["batch_size"], max_steps=steps, eval_steps=10**6, save_steps=10**6)
    laps, begun, peak = measure.Laps(device), 0, 0.0

    def objective(model, batch):
        nonlocal begun, peak
        if begun == per_unit * warmup:
            measure.reset_peak(device)
        if begun >= per_unit * warmup and (begun - per_unit * warmup) % per_unit == 0:
            laps.lap()
            peak = measure.peak_mb(device)
        begun += 1
        return objectives.next_token(model, batch)

    with tempfile.TemporaryDirectory() as directory:
        run_log = log.RunLog(Path(directory), 0, (), None, steps)
        loop.fit(
            model, optim.adamw(model, optim_args), GradientRules(model, args.kv_heads, shard_dim, partial_grad, kv_copied),
            objective, read_examples(data), TrainState(), loop_args, optim_args, precision=parallel.precision,
            data_parallel=parallel.data_parallel, num_workers=settings.get("num_workers", 0), run_log=run_log, evaluate=None,
            sample=None, save_best=0, save=lambda state: None,
        )  # fmt: skip
        run_log.close()
        lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    more = {"loaded_mb": loaded, "graphs": float(torch._dynamo.utils.counters["stats"].get("unique_graphs", 0))}
    measure.report(
        loss=[line["loss"] for line in lines[: data["losses"]]],
        tokens=batches.tokens_per_unit(data),
        seconds=laps.seconds,
        cpu_seconds=laps.cpu,
        peak_mb=peak,
        more=more,
    )


if __name__ == "__main__":
    main()
