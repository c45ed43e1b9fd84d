"""Large gradients' memory goes from the optimizer to the next backward, and nowhere else: values as without, on every path."""

import gc
import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from accessory.flags import ParallelArgs
from accessory.model.lora import TuningArgs
from accessory.model.pretrained import build
from accessory.parallel import groups, layers, spare
from accessory.train import optim
from accessory.train.start import materialise
from tests.gpu.bodies import TINY, random_checkpoint

EVERY, NONE = -1, 2**60  # values of LEAST
STEPS = [[3, 7, 11, 3, 9], [5, 2, 96], [7, 7, 7, 7, 1, 4]]


@pytest.fixture(autouse=True)
def nothing_kept():
    groups.init(1, on="cpu")
    yield
    spare._kept.clear()


def trained(monkeypatch, least: int, precision: str, tied: bool, micro_batches: int, states: str) -> tuple[list, int]:
    """(losses and weights after every step, how often memory was used again)."""
    used, take = 0, spare.take

    def counted(parameter: torch.Tensor) -> torch.Tensor:
        nonlocal used
        used += spare._kept.get(parameter) is not None
        return take(parameter).fill_(torch.nan)  # whatever was there is not to be read

    monkeypatch.setattr(spare, "LEAST", least)
    monkeypatch.setattr(spare, "take", counted)
    torch.manual_seed(0)
    checkpoint, args = random_checkpoint(TINY | {"tie_word_embeddings": tied}, torch.float32)
    model = build(checkpoint, args, TuningArgs())
    materialise(model, checkpoint, ParallelArgs(precision=precision), 0)
    optimizer = optim.adamw(model.train(), optim.OptimArgs(lr=1e-2, optim_states=states))
    found = []
    for ids in STEPS:
        for _ in range(micro_batches):
            loss, count, _ = model(torch.tensor([ids]), labels=torch.tensor([ids]))
            (loss / count).backward()
        optim.step(optimizer, 1e-2, torch.zeros(()), torch.tensor(2.0))
        assert all(p.grad is None for p in model.parameters())
        found += [loss.detach(), *(p.detach().clone() for p in model.parameters())]
    monkeypatch.undo()
    return found, used


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("precision, states", [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "int8")])
def test_training_is_the_same_to_the_bit(
    monkeypatch, precision: str, states: str, tied: bool, micro_batches: int
) -> None:
    kept, used = trained(monkeypatch, EVERY, precision, tied, micro_batches, states)
    fresh, none = trained(monkeypatch, NONE, precision, tied, micro_batches, states)
    assert none == 0 and used == (len(STEPS) - 1) * (1 if tied else 2)
    for mine, other in zip(kept, fresh, strict=True):
        assert torch.equal(mine, other) and mine.isfinite().all()


def test_backward_writes_where_the_optimizer_read(monkeypatch) -> None:
    monkeypatch.setattr(spare, "LEAST", EVERY)
    table, tokens = nn.Parameter(torch.randn(9, 4)), torch.tensor([[1, 5, 1]])
    layers._lookup(tokens, table).sum().backward()
    where, first = table.grad.data_ptr(), table.grad.clone()
    spare.give([table])
    assert table.grad is None
    layers._lookup(tokens, table).sum().backward()
    assert table.grad.data_ptr() == where and torch.equal(table.grad, first)


def test_what_does_not_fit_any_more_is_dropped(monkeypatch) -> None:
    monkeypatch.setattr(spare, "LEAST", EVERY)
    p = nn.Parameter(torch.zeros(4, 3))
    p.grad = spare.take(p).zero_()
    spare.give([p])
    assert spare._kept[p] is not None
    p.data = torch.zeros(5, 3)  # a vocabulary that grew
    assert spare.take(p).shape == (5, 3) and spare._kept[p] is None


def test_a_part_of_a_larger_buffer_is_not_kept(monkeypatch) -> None:
    monkeypatch.setattr(spare, "LEAST", EVERY)
    p = nn.Parameter(torch.zeros(4, 3))
    spare.take(p)
    p.grad = torch.zeros(24)[:12].view(4, 3)  # as of a bucket that is sent at once
    spare.give([p])
    assert p.grad is None and spare._kept[p] is None


def test_a_gradient_that_no_backward_would_take_is_not_kept(monkeypatch) -> None:
    """Of the layers' weights there are far more than of tables: kept, they would be held twice."""
    monkeypatch.setattr(spare, "LEAST", EVERY)
    checkpoint, args = random_checkpoint(TINY, torch.float32)
    model = build(checkpoint, args, TuningArgs())
    materialise(model, checkpoint, ParallelArgs(precision="fp32"), 0)
    tokens = torch.tensor([[3, 4, 5]])
    model(tokens, labels=tokens)[0].backward()
    spare.give(model.parameters())
    assert all(p.grad is None for p in model.parameters())
    kept = [p for p, memory in spare._kept.items() if memory is not None]
    assert {id(p) for p in kept} == {id(model.tok_embeddings.weight), id(model.output.weight)}


def test_memory_goes_with_its_parameter_and_small_gradients_at_once() -> None:
    small, large = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(spare.LEAST // 4 + 1))
    small.grad, large.grad = spare.take(small), spare.take(large)
    spare.give([small, large])
    assert spare._kept[small] is None and spare._kept[large] is not None
    del large
    gc.collect()
    assert [p is small for p in spare._kept] == [True]


HOLES = """
import sys
from accessory.parallel import spare
def resident(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
def grown():  # 128 MiB of the heap, freed but for its last block
    before, small = resident(), [bytearray(1000) for _ in range(2**17)]
    del small[:-1]
    spare.trim()
    return resident() - before
assert "torch._dynamo.utils" not in sys.modules
print(grown())
from torch._dynamo.utils import counters
counters["stats"]["unique_graphs"] += 1
print(grown())
print(grown())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is another library's")
def test_what_the_compiler_left_goes_back_once() -> None:
    keeps = {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1073741824", "PYTHONMALLOC": "malloc"}
    told = subprocess.run(
        [sys.executable, "-c", HOLES], env=os.environ | keeps, capture_output=True, text=True, check=True
    )
    uncompiled, compiled, later = map(float, told.stdout.split())
    assert uncompiled > 100 and compiled < 20 and later > 100


def test_a_lookup_is_torchs_to_the_second_derivative() -> None:
    tokens = torch.tensor([[1, 5, 1], [0, 8, 5]])
    table, g = torch.randn(9, 4, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 4, dtype=torch.float64)

    def both(lookup) -> list[torch.Tensor]:
        y = lookup(tokens, table)
        (first,) = torch.autograd.grad((y.square() * g).sum(), table, create_graph=True)
        return [y, first, *torch.autograd.grad(first.sin().sum(), table)]

    for mine, other in zip(both(layers._lookup), both(F.embedding), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_lookup_takes_torch_func() -> None:
    tokens, table = torch.tensor([[1, 5, 1]]), torch.randn(9, 4)

    def gradient(lookup) -> torch.Tensor:
        return torch.func.grad(lambda w: lookup(tokens, w).sin().sum())(table)

    torch.testing.assert_close(gradient(layers._lookup), gradient(F.embedding))
