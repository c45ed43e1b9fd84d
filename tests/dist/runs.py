"""A tiny training run made of the library's own pieces, for tests that run it at many layouts: call inside `run_ranks`.

Case(mp=2, dp=2, tuning="lora", ...) -> prepare -> Run: model, optimizer, rules
                                     -> train(run, steps): loop.fit with a log that keeps its lines
"""

import contextlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from accessory.checkpoint import export, resume
from accessory.checkpoint.pieces import pieces
from accessory.checkpoint.save import Saver
from accessory.data.loader import first_batches
from accessory.data.sft import Example
from accessory.train.start import materialise
from accessory.model import ModelArgs, Transformer, shard_dim
from accessory.model.llama import kv_copied, replicated
from accessory.model.lora import LINEARS, TuningArgs, mark_trainable, partial_grad, saved_names, saved_terms
from accessory.model.pretrained import build, quantise
from accessory.parallel import groups
from accessory.flags import ParallelArgs
from accessory.parallel.fsdp import local
from accessory.parallel.grads import GradientRules
from accessory.train import loop, objectives, optim
from accessory.train.state import TrainState
from accessory.weights import TensorSource
from tests.helpers import gather_over_mp, gathered, random_weights, tiny_args

GROUP = 8  # sequences of an optimizer step, however they are divided
EXAMPLES = 19  # so that the third window of an epoch is short
OPTIM = optim.OptimArgs(lr=1e-3, lr_scheduler="cosine", warmup_steps=1, clip_grad=0.5, weight_decay=0.1)
TUNINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_rank": 4, "lora_alpha": 6.0},
    "lora+saved": {"lora_rank": 4, "modules_to_save": ["tok_embeddings", "output"]},
    "bias+norm": {"bias_tuning": True, "norm_tuning": True},
}

BASE: dict[str, Any] = {"path": "/nowhere", "size": {}, "sha256": {}}


@dataclass(frozen=True)
class Case:
    """What is trained, and how it is divided. `heads`: query / kv; `cut`: batch_size, accum_iter (times dp: GROUP)."""

    mp: int = 1
    dp: int = 1
    tuning: str = "full"
    tied: bool = False
    heads: str = "12/2"
    checkpointing: bool | str = False
    data_parallel: str = "fsdp"
    cut: tuple[int, int] = (2, 4)
    precision: str = "fp32"
    lora_rank: int = 4
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = LINEARS
    quant: str | None = None
    calibrated: bool = False  # on all examples
    sequence_parallel: bool = False

    @property
    def args(self) -> ModelArgs:
        heads, kv_heads = map(int, self.heads.split("/"))
        return tiny_args(n_heads=heads, n_kv_heads=kv_heads, head_dim=4, tie_word_embeddings=self.tied)

    @property
    def tuning_args(self) -> TuningArgs:
        keys = dict(TUNINGS[self.tuning])
        if "lora_rank" in keys:
            keys |= {
                "lora_rank": self.lora_rank,
                "lora_dropout": self.lora_dropout,
                "lora_targets": list(self.lora_targets),
            }
        return TuningArgs(**keys)

    @property
    def loop_args(self) -> loop.LoopArgs:
        return loop.LoopArgs(batch_size=self.cut[0], accum_iter=self.cut[1], epochs=2, seed=3)


def examples(vocab_size: int = 101) -> list[Example]:
    """Sequences of 2 to 40 tokens with prompts of none to all of them: the micro batches' token counts differ widely."""
    rng = np.random.default_rng(7)
    lengths = [2, 40, 3, 30, 5, *rng.integers(2, 25, EXAMPLES - 5)]
    ids = [rng.integers(0, vocab_size, n).astype(np.int32) for n in lengths]
    return [
        Example(x, 0 if i % 5 == 0 else len(x) if i % 7 == 6 else int(rng.integers(0, len(x))))
        for i, x in enumerate(ids)
    ]


def case_weights(case: Case) -> dict[str, torch.Tensor]:
    """Whole weights the run starts from. lora_b too: from zero, no gradient would reach lora_a in the first step."""
    args, weights = case.args, random_weights(case.args)
    if case.tuning_args.lora_rank:
        generator = torch.Generator().manual_seed(1)
        for name in [n for n in weights if n.endswith(".weight") and n.split(".")[-2] in case.lora_targets]:
            shape = (weights[name].shape[0], case.lora_rank)
            weights[name.replace(".weight", ".lora_b.weight")] = torch.randn(shape, generator=generator) * 0.2
    assert args.vocab_size == 101
    return weights


@dataclass
class Run:
    case: Case
    model: Transformer
    optimizer: torch.optim.Optimizer
    rules: GradientRules
    trained: list[str]
    lines: list[dict[str, Any]] = field(default_factory=list)  # what metrics.jsonl would get
    validations: list[dict[str, Any]] = field(default_factory=list)
    state: TrainState = field(default_factory=TrainState)

    # the log's part that loop.fit calls
    def write(self, record: dict[str, Any]) -> None:
        (self.validations if "val_loss" in record else self.lines).append(record)

    def step(self, step: int, shown: dict[str, str]) -> None: ...

    def start_bar(self, step: int) -> None: ...


def prepare(case: Case, weights: dict[str, torch.Tensor] | None = None) -> Run:
    """Divides the world anew and builds the run's parts as main_finetune does."""
    groups.forget_model_parallel()
    groups.init(case.mp)
    assert groups.dp_size() == case.dp, (case, groups.world_size())
    source = TensorSource(case_weights(case) if weights is None else weights)
    checkpoint = SimpleNamespace(source=source, path=Path("random"), kind="tensors", adapter=None)
    model = build(checkpoint, case.args, case.tuning_args)
    trained = mark_trainable(model, case.tuning_args)
    flags = {"precision": case.precision, "checkpointing": case.checkpointing, "quant": case.quant}
    flags["sequence_parallel"] = case.sequence_parallel
    parallel = ParallelArgs(case.mp, case.data_parallel, **flags)
    quantise(model, parallel)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        ranks = {"dp_rank": groups.dp_rank(), "dp_size": groups.dp_size()}
        calibrate_on = first_batches(examples(), 10**6, seed=0, **ranks) if case.calibrated else None
        materialise(model, checkpoint, parallel, seed=0, calibrate_on=calibrate_on)
    whole_slice = case.data_parallel == "ddp"
    addends = replicated if case.sequence_parallel else partial_grad
    rules = GradientRules(model, case.args.kv_heads, shard_dim, addends, kv_copied, cut_over_dp=not whole_slice)
    run = Run(case, model, None, rules, trained)  # type: ignore[arg-type]
    run.optimizer = optim.adamw(model, OPTIM)
    return run


def train(
    run: Run,
    steps: int | None = None,
    save=lambda state: None,
    save_steps: int = 10**6,
    objective=objectives.next_token,
    saver: Saver | None = None,
    validates: bool = True,
) -> TrainState:
    """loop.fit, up to `steps` optimizer steps (None: all six of two epochs). `saver` instead of `save`: as a run saves."""
    saving: dict[str, Any] = {"save": save}
    if saver is not None:
        saving = {"save": lambda state: saver.start(state.step, state.to_json()), "save_failed": saver.failed}
        saving["finish_save"] = saver.finish
    case, loop_args = run.case, run.case.loop_args
    loop_args.save_steps = save_steps
    loop_args.max_steps = steps or loop_args.total_steps(-(-EXAMPLES // GROUP))
    assert case.cut[0] * case.cut[1] * case.dp == GROUP

    def evaluate() -> dict[str, float]:
        return loop.evaluate(run.model, objectives.next_token, examples(), 7, show_progress=False)

    run.state = loop.fit(
        run.model, run.optimizer, run.rules, objective, examples(), run.state, loop_args, OPTIM,
        precision=case.precision, data_parallel=case.data_parallel, num_workers=0, run_log=run,  # type: ignore[arg-type]
        evaluate=evaluate if validates else None, sample=None, save_best=False, **saving,
    )  # fmt: skip
    return run.state


def saver(run: Run, directory: Path, keep_last: int | None = None) -> Saver:
    """What writes the run's checkpoints as main_finetune's does: the model, or the adapter. Collective."""
    tuning, params = run.case.tuning_args, run.case.args.to_dict()
    terms, names = saved_terms(run.model, tuning), saved_names(run.model, tuning)
    about, also = lambda: {"base": BASE}, lambda into: []
    beside = export.Adapter(names, terms, params, about, also)
    if not tuning.partly:
        beside = export.Weights(run.model, params, {}, int(run.case.tied), about, also)
    return Saver(directory, run.model, run.optimizer, names, beside, keep_last)


def write_model(run: Run, into: Path, params: dict[str, Any], embedding_dim: int = 0) -> None:
    """The run's model as its mp ranks' consolidated files, in fp32. Collective; the directory is there."""
    weights, held = export.Weights(run.model, params, {}, embedding_dim, dict, lambda into: []), pieces(run.model)
    layouts = groups.all_gather_object(weights.lay_out(into))
    tensors = {n: local(p.detach())[: held[n].rows] for n, p in run.model.named_parameters()}
    weights.write(into, layouts, held, tensors)
    groups.barrier()
    weights.complete(into, 0)
    groups.barrier()


def resumed(case: Case, path: Path) -> Run:
    """A new run, its weights spoilt first, with what the checkpoint holds."""
    run = prepare(case)
    with torch.no_grad():
        for parameter in (p for p in run.model.parameters() if p.requires_grad):
            parameter.add_(1.0)
    saved = resume.load(path, run.model, run.optimizer)
    run.state = TrainState.from_json({k: v for k, v in saved.items() if k in TrainState.__dataclass_fields__})
    return run


def contents(run: Run) -> dict[str, torch.Tensor]:
    """This rank's weights and optimizer state, copied."""
    found = {n: local(p.detach()).clone() for n, p in run.model.named_parameters()}
    for name, parameter in run.model.named_parameters():
        found |= {f"{name}/{key}": local(v).clone() for key, v in run.optimizer.state.get(parameter, {}).items()}
    return found


def differ(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names that are not in both with the same bits."""
    return [n for n in a.keys() | b.keys() if n not in a or n not in b or not torch.equal(a[n], b[n])]


def whole(args: ModelArgs, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The unsharded parameter, or gradient, gathered: true rows, each kv head once. Collective over the world."""
    value, dim = gathered(tensor.detach()), shard_dim(name)
    if dim is None:
        return value
    parts = gather_over_mp(value)
    if kv_copied(name):
        parts = parts[:: max(1, groups.mp_size() // args.kv_heads)]
    value = torch.cat(parts, dim)
    return value[: args.vocab_size] if name in ("tok_embeddings.weight", "output.weight") else value


def whole_gradients(run: Run) -> dict[str, torch.Tensor]:
    """The unsharded gradient of every trained parameter. Collective; call between sum_partial and the optimizer."""
    named = dict(run.model.named_parameters())
    return {n: whole(run.case.args, n, named[n].grad).clone() for n in run.trained}


def keep_first_gradients(run: Run) -> dict[str, torch.Tensor]:
    """A dict that holds the first step's gradients, complete and unclipped, once that step is done."""
    kept: dict[str, torch.Tensor] = {}
    original = run.rules.global_norm

    def global_norm() -> torch.Tensor:
        if not kept:
            kept.update(whole_gradients(run))
        return original()

    run.rules.global_norm = global_norm  # type: ignore[method-assign]
    return kept


def mp_copies_differ(run: Run) -> list[str]:
    """Names of parameters that mp ranks should hold in equal copies, to the bit, and do not. Collective."""
    odd, kv_heads = [], run.case.args.kv_heads
    for name, parameter in run.model.named_parameters():
        copies = groups.mp_size() // kv_heads if kv_copied(name) else 1
        if shard_dim(name) is not None and copies <= 1:
            continue
        parts = [t.view(torch.uint8) for t in gather_over_mp(gathered(parameter.detach()))]  # NF4 has NaNs
        sets = [parts]
        if shard_dim(name) is not None:
            sets = [parts[i : i + copies] for i in range(0, len(parts), copies)]
        if any(not torch.equal(copy, same[0]) for same in sets for copy in same):
            odd.append(name)
    return odd
