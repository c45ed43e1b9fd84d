"""The feed-forward's nonlinearity beside autograd over its formula, to the bit, and what it keeps."""

import pytest
import torch
from torch.nn import functional as F

from accessory.model.swiglu import swiglu


def drawn(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [(3 * torch.randn(2, 7, 33)).to(dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_result_and_gradients_are_autograds_to_the_bit(dtype):
    gate, up = drawn(dtype)
    y, expected = swiglu(gate, up), F.silu(gate) * up
    assert torch.equal(y, expected)
    g = torch.randn(y.shape).to(dtype)
    before = g.clone()
    found = torch.autograd.grad(y, (gate, up), g)
    for mine, true in zip(found, torch.autograd.grad(expected, (gate, up), g)):
        assert torch.equal(mine, true)
    assert torch.equal(g, before)  # it may be another's too


def test_numerical_gradients():
    assert torch.autograd.gradcheck(swiglu, drawn(torch.float64))


def test_its_two_inputs_alone_are_kept():
    gate, up = drawn(torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        swiglu(gate, up)
    assert sorted(kept) == sorted((gate.data_ptr(), up.data_ptr()))


def test_without_gradients_and_compiled():
    gate, up = drawn(torch.float32)
    with torch.inference_mode():
        assert torch.equal(swiglu(gate, up), F.silu(gate) * up)
    compiled = torch.compile(swiglu, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(gate, up), F.silu(gate) * up)
