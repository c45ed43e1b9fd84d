"""The last layer after its attention, for the rows alone whose loss is asked for: as for all rows, with less work."""

import contextlib
from typing import Iterator

import pytest
import torch
from torch import Tensor, nn

from accessory.model import Transformer, llama, targets
from accessory.model.attention import Segments
from accessory.model.lora import TuningArgs, mark_trainable
from accessory.model.pretrained import build
from accessory.parallel import groups, products
from accessory.parallel.fsdp import DTYPES
from tests.gpu.bodies import LORA, TINY, random_checkpoint

LENGTHS, LEARNT = (30, 17, 53), 0.3


def model_of(tuning: dict | None = None, precision: str = "fp32", checkpointing: str = "none") -> Transformer:
    groups.init(1, on="cpu")
    checkpoint, args = random_checkpoint(TINY | {"n_layers": 2}, torch.float32)
    tuning_args = TuningArgs(**tuning or {})
    model = build(checkpoint, args, tuning_args)
    mark_trainable(model, tuning_args)
    model.init_weights()
    for name, p in model.named_parameters():  # adapters that give something
        if ".lora_b." in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    model.tok_embeddings.compute_dtype = DTYPES[precision]
    for layer in model.layers:
        layer.checkpointing = checkpointing
    return model.train()


def batch(rows: int, after: Tensor | None = None) -> tuple[Tensor, Tensor, Segments | None]:
    """tokens, labels and, of one row, the bounds."""
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, TINY["vocab_size"], (rows, sum(LENGTHS)), generator=draw)
    labels = tokens.masked_fill(torch.rand(tokens.shape, generator=draw) > LEARNT, targets.IGNORED)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    return tokens, labels, None if rows > 1 else Segments(bounds, torch.device("cpu"), after)


@contextlib.contextmanager
def rows_after_attention() -> Iterator[list[int]]:
    """Of each layer that runs in here, how many rows its feed-forward was given."""
    seen, real = [], llama.swiglu

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        seen.append(gate.shape[:-1].numel())
        return real(gate, up)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, "swiglu", swiglu)
        yield seen


def trained(model: Transformer, *of: object, few: float | None = None) -> tuple[list[int], list[Tensor]]:
    """Rows of both layers, and: the loss, how many were right, and all gradients. `few`: in the place of targets.FEW."""
    tokens, labels, packed = of
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch, rows_after_attention() as seen:
        patch.setattr(targets, "FEW", targets.FEW if few is None else few)
        loss, count, metrics = model(tokens, labels=labels, cu_seqlens=packed)
        (loss / count).backward()
    return seen[:2], [loss.detach(), metrics["correct"], *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("tuning", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("rows, shares", [(1, False), (1, True), (3, False)], ids=["packed", "shared", "batch"])
def test_loss_and_gradients_are_those_of_all_rows(tuning, rows: int, shares: bool, checkpointing: str) -> None:
    model, of = model_of(tuning, checkpointing=checkpointing), batch(rows, torch.tensor([-1, 0, 0]) if shares else None)
    learnt = int((targets.Targets(of[1], torch.device("cpu"), of[2]).host_rows >= 0).sum())
    seen, narrowed = trained(model, *of)
    assert seen == [of[0].numel(), learnt] and learnt < of[0].numel() / 2
    seen, whole = trained(model, *of, few=0)
    assert seen == [of[0].numel()] * 2
    for a, b in zip(narrowed, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_in_bf16_rows_are_brought_to_few_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(products.CPU_MULTIPLIES, torch.bfloat16, True)
    model, of = model_of(precision="bf16"), batch(1)
    seen, narrowed = trained(model, *of)
    assert seen == [100, 32]
    _, whole = trained(model, *of, few=0)
    for a, b in zip(narrowed, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-2, atol=1e-3)


def test_most_rows_are_taken_as_all_of_them() -> None:
    tokens, _, packed = batch(1)
    assert trained(model_of(), tokens, tokens, packed)[0] == [100, 100]
    nothing = torch.full_like(tokens, targets.IGNORED)
    with rows_after_attention() as seen:
        loss, count, _ = model_of()(tokens, labels=nothing, cu_seqlens=packed)
    assert seen == [100, 100] and loss == count == 0


def test_validation_too() -> None:
    tokens, labels, packed = batch(1)
    model = model_of()
    with torch.no_grad(), rows_after_attention() as seen:
        model.eval()(tokens, labels=labels, cu_seqlens=packed)
        assert seen[0] == 100 > seen[1]
        assert (
            model(tokens, cu_seqlens=packed).shape[:2] == model.hidden(tokens, cu_seqlens=packed).shape[:2] == (1, 100)
        )


@pytest.mark.parametrize("where", ["layers.1", "layers.1.feed_forward.w2", "norm"])
def test_who_looks_at_the_last_layer_sees_all_rows(where: str) -> None:
    tokens, labels, packed = batch(1)
    model, seen = model_of(), []
    model.get_submodule(where).register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:2]))
    model(tokens, labels=labels, cu_seqlens=packed)
    assert seen == [(1, 100)]


def test_dropout_draws_the_same_masks_as_for_all_rows() -> None:
    model, of = model_of(LORA | {"lora_dropout": 0.3}), batch(1)
    assert trained(model, *of)[0] == [100, 100]
    assert trained(model.eval(), *of)[0][1] < 50


class Mine(nn.Module):
    """A layer of somebody's own."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, turns: Tensor, packed: Segments | None, cache: None, index: int) -> Tensor:
        assert x.shape[1] == 100
        return self.layer(x, turns, packed, cache, index)


def test_a_layer_of_ones_own_knows_nothing_of_rows() -> None:
    tokens, labels, packed = batch(1)
    model = model_of()
    expected = model(tokens, labels=labels, cu_seqlens=packed)[0]
    model.layers[1] = Mine(model.layers[1])
    torch.testing.assert_close(model(tokens, labels=labels, cu_seqlens=packed)[0], expected)


@pytest.mark.parametrize("part", ["", ".attention", ".feed_forward"])
def test_nor_does_a_forward_of_ones_own(part: str) -> None:
    tokens, labels, packed = batch(1)
    model, seen = model_of(), []
    module = model.get_submodule(f"layers.1{part}")
    usual = module.forward
    module.forward = lambda *x: seen.append(x[0].shape[:2]) or usual(*x)
    model(tokens, labels=labels, cu_seqlens=packed)
    assert seen == [(1, 100)]
