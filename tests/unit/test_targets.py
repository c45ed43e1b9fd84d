"""Rows and ids against the definition, token by token; bad labels; a step that asks its device for no number."""

from pathlib import Path

import numpy as np
import pytest
import torch

from accessory.data.loader import FILLER, collate
from accessory.data.sft import Example
from accessory.flags import ParallelArgs
from accessory.log import RunLog
from accessory.model import ModelArgs, Transformer, quant, shard_dim
from accessory.model.attention import Segments
from accessory.model.llama import kv_copied
from accessory.model.lora import TuningArgs, mark_trainable, packed_weights, partial_grad
from accessory.model.pretrained import build, quantise
from accessory.model.targets import IGNORED, Targets
from accessory.parallel import groups
from accessory.parallel.fsdp import sharder
from accessory.parallel.grads import GradientRules
from accessory.train import lowbit, optim
from accessory.train.loop import LoopArgs, fit, to_device
from accessory.train.objectives import next_token
from accessory.train.state import Late, TrainState
from tests.gpu.bodies import LORA, TINY, counting, random_checkpoint

CPU, META = torch.device("cpu"), torch.device("meta")


def by_definition(labels: torch.Tensor, bounds: list[int]) -> list[tuple[int, int]]:
    """(row, label): each sequence's tokens but the first, predicted from the one before."""
    length, found = labels.shape[1], []
    for b, row in enumerate(labels.tolist()):
        for start, stop in zip(bounds, bounds[1:]):
            found += [(b * length + t - 1, row[t]) for t in range(start + 1, stop) if row[t] != IGNORED]
    return found


@pytest.mark.parametrize("shape, cuts", [((3, 9), None), ((1, 9), None), ((1, 12), [0, 1, 5, 6, 12]), ((2, 1), None)])
def test_rows_are_where_a_label_comes_next(shape: tuple[int, int], cuts: list[int] | None) -> None:
    random = torch.Generator().manual_seed(3)
    labels = torch.randint(50, shape, generator=random)
    labels[torch.rand(shape, generator=random) < 0.3] = IGNORED
    before = labels.clone()
    packed = Segments(torch.tensor(cuts), CPU) if cuts else None
    targets = Targets(labels, CPU, packed)
    expected = by_definition(labels, cuts or [0, shape[1]])
    assert list(zip(targets.rows.tolist(), targets.ids.tolist())) == expected
    assert torch.equal(labels, before)


def test_labels_that_fit_neither_tokens_nor_vocabulary() -> None:
    groups.init(1, on="cpu")
    model = Transformer(ModelArgs(**TINY)).to_empty(device="cpu").init_weights()
    tokens = torch.arange(8).view(1, 8)
    for wrong in (-1, TINY["vocab_size"]):
        labels = tokens.clone()
        labels[0, 5] = wrong
        with pytest.raises(ValueError, match=f"labels: {wrong} is none of this model's 101 tokens; -100"):
            model(tokens, labels=labels)
    for bounds in (None, torch.tensor([0, 3, 8])):
        with pytest.raises(ValueError, match=r"labels \(1, 7\) for tokens \(1, 8\)"):
            model(tokens, labels=tokens[:, 1:], cu_seqlens=bounds)
    labels[0, 5], labels[0, 0] = 5, 10**6  # nobody's target
    assert model(tokens, labels=labels)[1] == 7


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are on the meta device, where a tensor has no numbers: whatever would wait for a GPU's (a branch, a size that depends
    on them, a copy to the host) raises. What a run may read, between steps, is given."""
    summed = groups.all_reduce
    groups.init(1, on="cpu")
    monkeypatch.setattr(groups, "device", lambda: META)
    monkeypatch.setattr(groups, "all_reduce", lambda t, *how, **more: t if t.is_meta else summed(t, *how, **more))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # knows no meta device
    monkeypatch.setitem(lowbit.CHUNK, "meta", 4096)
    monkeypatch.setattr(Late, "read", lambda late: [0.0] * late.host.numel())
    monkeypatch.setattr(optim.LossScale, "state_dict", lambda scale: {})


def meta_model(
    tuning: dict, checkpointing: str, precision: str, sizes: dict, packed: str | None = None
) -> tuple[Transformer, GradientRules]:
    checkpoint, args = random_checkpoint(TINY | sizes, torch.float32)
    model = build(checkpoint, args, TuningArgs(**tuning))
    mark_trainable(model, TuningArgs(**tuning))
    quantise(model, ParallelArgs(precision=precision, quant=packed))
    for module in packed_weights(model).values():
        module.table = quant.tables(META)
    sharder("fsdp", precision)(model)
    for layer in model.layers:
        layer.checkpointing = checkpointing
    return model, GradientRules(model, args.kv_heads, shard_dim, partial_grad, kv_copied)


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("tuning", [{}, LORA | {"lora_dropout": 0.1}], ids=["full", "lora"])
def test_a_batch_of_any_kind_reads_nothing_from_its_device(tuning: dict) -> None:
    model, rules = meta_model(tuning, "none", "fp32", {})
    examples = list(counting([9, 5, 14], TINY["vocab_size"], prompt=0.4))
    alike = [Example(np.append(np.arange(20), [i, i]).astype(np.int32), 21) for i in range(3)]
    for items in (examples, examples[:1], [FILLER], alike):
        batch = to_device(collate(items, share_prompts=True), META)
        assert bool((batch.after >= 0).any()) == (items is alike)
        loss, count, metrics = next_token(model.train(), batch)
        (loss / count).backward()
        rules.sum_partial()
        results = (loss, count, metrics["correct"], rules.global_norm(), *(p.grad for p in rules.parameters))
        assert all(x.is_meta for x in results)
    for read in (loss.item, batch.tokens.nonzero, lambda: batch.tokens.cpu(), lambda: bool(count > 0)):
        with pytest.raises((RuntimeError, NotImplementedError)):  # the test can fail
            read()


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("trained", ["output", "norm", "layers.0.attention.wq"])
def test_a_norm_takes_nothing_from_the_host(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where there are no parameters of a kind: a copy of host memory that is not pinned waits for a GPU."""
    _, rules = meta_model({"trainable": [trained]}, "none", "fp32", {})
    moved, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *where, **how: moved.append(t.device) or to(t, *where, **how))
    for p in rules.parameters:
        p.grad = torch.zeros_like(p)
    assert rules.global_norm().is_meta and set(moved) == {META}


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "tuning, packed", [({}, None), (LORA | {"lora_dropout": 0.1}, None), (LORA, "nf4")], ids=["full", "lora", "qlora"]
)
@pytest.mark.parametrize(
    "checkpointing, states, sizes",
    [("none", "fp32", {}), ("selective", "bf16", {"qk_norm": True}), ("full", "int8", {"tie_word_embeddings": True})],
)
def test_steps_read_nothing_from_their_device(
    tmp_path: Path, precision: str, tuning: dict, packed: str | None, checkpointing: str, states: str, sizes: dict
) -> None:
    model, rules = meta_model(tuning, checkpointing, precision, sizes, packed)
    args = LoopArgs(batch_size=2, accum_iter=2, max_steps=3, eval_steps=10, save_steps=10)
    how = optim.OptimArgs(optim_states=states)
    data, run_log = counting([9, 5, 14, 7, 11, 6, 8, 12], TINY["vocab_size"]), RunLog(tmp_path, 0, (), None, 3)
    state = fit(
        model, optim.adamw(model, how), rules, next_token, data, TrainState(), args, how, precision=precision,
        data_parallel="fsdp", num_workers=0, run_log=run_log, evaluate=None, sample=None, save_best=0, save=lambda state: None,
    )  # fmt: skip
    run_log.close()
    assert state.step == 3
