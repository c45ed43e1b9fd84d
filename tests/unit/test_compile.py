"""How often --compile compiles: a few graphs that all layers share, in the first two steps of each kind, then none, though every
batch has other lengths and another number of documents. Graphs are run as traced, so only tracing is paid for. That they compute what eager layers do is tests/unit/test_device_paths.py's.

Frames are what dynamo traces, with or without a graph in them; a step that traces one waits for the compiler.
"""

import contextlib
import logging

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from accessory.flags import ParallelArgs
from accessory.model import Transformer, attention, targets
from accessory.model.attention import Segments
from accessory.model.lora import TuningArgs, mark_trainable
from accessory.model.pretrained import build, quantise
from accessory.parallel import groups, products
from accessory.train.start import materialise
from tests.gpu.bodies import LORA, TINY, random_checkpoint

PACKS = [[9, 5, 14], [7, 11], [6, 8, 12, 3], [5, 9], [13, 22, 3, 6, 8, 1, 5]]  # documents of each step


@contextlib.contextmanager
def counted_compiler(monkeypatch):
    """A CompileCounter behind every torch.compile in here."""
    counter, real = CompileCounter(), torch.compile
    torch._dynamo.reset()
    counters.clear()
    logging.getLogger("torch.__trace").setLevel(logging.INFO)  # pytest would keep thousands of its lines
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda f: real(f, backend=counter))
        yield counter
    torch._dynamo.reset()


def model_of(layers: int, tuning: dict, **flags) -> Transformer:
    """As a run has it: compiled, sharded."""
    groups.init(1, on="cpu")
    checkpoint, args = random_checkpoint(TINY | {"n_layers": layers}, torch.float32)
    tuning_args, parallel = TuningArgs(**tuning), ParallelArgs(**{"precision": "fp32", "compile": True} | flags)
    model = build(checkpoint, args, tuning_args)
    mark_trainable(model, tuning_args)
    quantise(model, parallel)
    materialise(model, checkpoint, parallel, 0)
    return model.train()


def step(model: Transformer, lengths: list[int], trains: bool = True, shares: bool = False) -> int:
    """One forward, and backward when training; frames traced so far. `shares`: all begin with the first document."""
    tokens = torch.randint(3, TINY["vocab_size"], (1, sum(lengths)))
    after = torch.tensor([-1] + [0] * (len(lengths) - 1)) if shares else None
    packed = Segments(torch.tensor([0, *lengths]).cumsum(0), torch.device("cpu"), after)
    with torch.set_grad_enabled(trains):
        loss, _, _ = model.train(trains)(tokens, labels=tokens, cu_seqlens=packed)
        if trains:
            loss.backward()
    return counters["frames"]["total"]


@pytest.mark.parametrize(
    # graphs: a layer in two parts, around the attention; twice where x first needs no gradient; the last layer's second part,
    # which goes on with the rows alone that have a target, is another
    "tuning, flags, most",
    [
        ({}, {}, 12),
        (LORA | {"lora_dropout": 0.1}, {"checkpointing": True, "quant": "nf4"}, 15),
    ],
    ids=["full", "lora with all"],
)
def test_two_steps_of_a_kind_compile_and_no_other(monkeypatch, tuning: dict, flags: dict, most: int) -> None:
    with counted_compiler(monkeypatch) as counter:
        model = model_of(2, tuning, **flags)
        traced = [step(model, lengths) for lengths in PACKS]
        assert 0 < traced[0] < traced[1] and traced[1:] == [traced[1]] * (len(PACKS) - 1), traced
        assert [step(model, lengths, shares=True) for lengths in PACKS[:3]] == traced[-1:] * 3
        assert counter.frame_count <= most, counter.frame_count

        looks = [step(model, lengths, trains=False) for lengths in PACKS[:3]]  # validation, with graphs of its own
        assert looks[1:] == [looks[1]] * 2, looks
        assert step(model, PACKS[3]) == looks[-1], "training compiled anew after a validation"
        alone = [step(model, [n]) for n in (30, 31, 17)]  # one document needs no bounds: attention joins the graph
        assert alone == [alone[0]] * 3, alone
        assert counter.frame_count <= most + 14, counter.frame_count


def test_last_layers_with_few_rows_and_with_all_compile_once_each(monkeypatch) -> None:
    with counted_compiler(monkeypatch) as counter:
        model = model_of(2, {})
        monkeypatch.setattr(targets, "FEW", 0.0)
        whole = [step(model, lengths) for lengths in PACKS]
        before = counter.frame_count
        monkeypatch.setattr(targets, "FEW", 1.0)
        few = [step(model, lengths) for lengths in PACKS]
        assert whole[1:] == [whole[1]] * (len(PACKS) - 1) and few[1:] == [few[1]] * (len(PACKS) - 1), (whole, few)
        assert counter.frame_count <= before + 4  # both parts of the layer, in two steps
        monkeypatch.setattr(targets, "FEW", 0.0)
        assert step(model, PACKS[0]) == few[-1]


def test_layers_share_their_graphs(monkeypatch) -> None:
    found = []
    for layers in (2, 4):
        with counted_compiler(monkeypatch) as counter:
            model = model_of(layers, {})
            found.append(([step(model, lengths) for lengths in PACKS[:2]], counter.frame_count))
    assert found[0] == found[1]


@torch.library.custom_op("tests::like_q", mutates_args=())
def like_q(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, longest: int) -> torch.Tensor:
    """In the place of the varlen kernel: as opaque to dynamo as it is."""
    return q.clone()


like_q.register_fake(lambda q, k, v, cu, longest: torch.empty_like(q))
like_q.register_autograd(
    lambda ctx, g: (g.clone(), *ctx.zeros, None, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "zeros", [torch.zeros_like(x) for x in inputs[1:3]]),
)


@pytest.mark.parametrize("on", ["a GPU", "a CPU that multiplies bf16"])
def test_with_a_kernel_too_prompts_that_are_shared_or_not_compile_once(monkeypatch, on: str) -> None:
    """Attention is in the layer's graph where nothing is shared, and between two graphs where something is."""
    monkeypatch.setitem(products.CPU_MULTIPLIES, torch.bfloat16, True)  # as a GPU does too
    if on == "a GPU":
        monkeypatch.setattr(attention, "_varlen_kernel", lambda device: like_q)
    with counted_compiler(monkeypatch) as counter:
        model = model_of(2, {}, precision="bf16")
        whole = [step(model, lengths) for lengths in PACKS]
        assert whole[1:] == [whole[1]] * (len(PACKS) - 1) and counter.frame_count <= 4, (whole, counter.frame_count)
        cut = [step(model, lengths, shares=True) for lengths in PACKS]
        assert cut[1:] == [cut[1]] * (len(PACKS) - 1) and counter.frame_count <= 14, (cut, counter.frame_count)
        mixed = [step(model, lengths, shares=shares) for lengths in PACKS for shares in (False, True)]
        assert mixed[2:] == [mixed[2]] * (len(mixed) - 2) and counter.frame_count <= 16, (mixed, counter.frame_count)
