"""Each parallel layer against plain torch; and the whole model with fairscale's layers exchanged for plain ones, to the bit."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from accessory.model import llama, lora
from accessory.parallel import groups, layers
from tests.dist import plain_layers, runs
from tests.dist.runs import Case
from tests.helpers import run_ranks

IN, OUT, V = 24, 36, 101


def part(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    return tensor.chunk(groups.mp_size(), dim)[groups.mp_rank()].clone()


def put(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    assert layer.weight.is_meta and layer.weight.shape == weight.shape
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def linears(mp: int) -> None:
    """column -> row, as in a feed-forward: y, dx and the gradients of both weights and biases against F.linear."""
    groups.init(mp)
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 5, IN), torch.randn(OUT, IN), torch.randn(OUT)
    v, c, dy = torch.randn(IN, OUT), torch.randn(IN), torch.randn(2, 5, IN)
    whole = [t.clone().requires_grad_() for t in (x, w, b, v, c)]
    expected = F.linear(torch.tanh(F.linear(whole[0], whole[1], whole[2])), whole[3], whole[4])
    expected.backward(dy)

    column, row = layers.ColumnParallelLinear(IN, OUT, bias=True), layers.RowParallelLinear(OUT, IN, bias=True)
    put(column, part(w, 0), part(b, 0))
    put(row, part(v, 1), c.clone())
    mine = x.clone().requires_grad_()
    y = row(torch.tanh(column(layers.copy_to_mp(mine))))
    y.backward(dy)
    same(y, expected)
    same(mine.grad, whole[0].grad)
    same(column.weight.grad, part(whole[1].grad, 0))
    same(column.bias.grad, part(whole[2].grad, 0))
    same(row.weight.grad, part(whole[3].grad, 1))
    same(row.bias.grad, whole[4].grad)


def embedding_and_gather(mp: int) -> None:
    groups.init(mp)
    torch.manual_seed(0)
    table, tokens, dy = torch.randn(V, IN), torch.randint(V, (2, 9)), torch.randn(2, 9, IN)
    whole = table.clone().requires_grad_()
    F.embedding(tokens, whole).backward(dy)

    layer = layers.VocabParallelEmbedding(V, IN)
    start, stop = layers.vocab_range(V)
    rows = layers.padded_vocab(V) // mp
    put(
        layer, torch.cat((table[start:stop], torch.full((rows - (stop - start), IN), torch.nan)))
    )  # padding is never read
    y = layer(tokens)
    y.backward(dy)
    assert torch.equal(y, table[tokens])
    same(layer.weight.grad[: stop - start], whole.grad[start:stop])
    assert not layer.weight.grad[stop - start :].any()

    piece = torch.arange(3.0).add(10 * groups.mp_rank()).requires_grad_()
    gathered = layers.gather_from_mp(piece)
    assert gathered.tolist() == [10.0 * rank + i for rank in range(mp) for i in range(3)]
    gathered.backward(torch.arange(3.0 * mp))
    assert piece.grad.tolist() == [3.0 * groups.mp_rank() + i for i in range(3)]


@pytest.mark.parametrize("mp", [1, 2, 3, 4])
def test_each_layer_equals_plain_torch(mp):
    run_ranks(linears, mp, world=mp)
    run_ranks(embedding_and_gather, mp, world=mp)


@contextmanager
def exchanged():
    """The model built from plain_layers instead of fairscale's."""
    column = type("ColumnLinear", (lora.LoRA, plain_layers.Column), {"forward": lora.ColumnLinear.forward})
    row = type("RowLinear", (lora.LoRA, plain_layers.Row), {"partial": lora.RowLinear.partial})
    other = {"ColumnLinear": column, "RowLinear": row, "ColumnParallelLinear": plain_layers.Column}
    other |= {"VocabParallelEmbedding": plain_layers.Embedding}
    other |= {"copy_to_mp": plain_layers.Copy.apply, "gather_from_mp": plain_layers.Gather.apply}
    original = {name: getattr(llama, name) for name in other}
    vars(llama).update(other)
    try:
        yield
    finally:
        vars(llama).update(original)


def three_steps(case: Case) -> tuple[list[float], list[float], torch.Tensor, set[str]]:
    run = runs.prepare(case)
    runs.train(run, steps=3)
    with torch.no_grad():
        logits = run.model.eval()(torch.arange(20).view(2, 10))
    bases = {base.__module__.split(".")[0] for m in run.model.modules() for base in type(m).__mro__}
    return [line["loss"] for line in run.lines], [line["grad_norm"] for line in run.lines], logits, bases


def with_both(case: Case) -> tuple:
    ours = three_steps(case)
    with exchanged():
        return ours, three_steps(case)


@pytest.mark.parametrize("tuning", ["full", "lora", "bias+norm"])
def test_the_model_without_fairscale_is_the_same_to_the_bit(tuning):
    for ours, plain in run_ranks(with_both, Case(2, 2, tuning, heads="12/1", cut=(2, 2)), world=4):
        assert "fairscale" in ours[3] and "fairscale" not in plain[3]
        assert len(ours[0]) == 3 and ours[:2] == plain[:2]
        assert torch.equal(ours[2], plain[2])
