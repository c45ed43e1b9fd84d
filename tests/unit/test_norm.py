"""RMSNorm's own backward for the CPU: against autograd over the formula in fp64, and against torch's in other ways of running."""

import pytest
import torch

from accessory.model.norm import RMSNorm

BOUND = {torch.float32: 2e-6, torch.bfloat16: 6e-3}  # of the norm: bf16 rounds each result to 2^-9


def made(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[RMSNorm, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], 1e-5)
    norm.weight = torch.nn.Parameter(torch.rand(shape[-1]) + 0.5)
    return norm, (3 * torch.randn(shape)).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 24), (5, 64), (1, 6, 3, 8)], ids=str)
def test_gradients_are_those_of_the_formula(dtype, shape):
    norm, x, g = made(dtype, shape)
    found = torch.autograd.grad(norm(x), (x, norm.weight), g)
    # the weight is used in x's dtype
    wide, w = x.detach().double().requires_grad_(), norm.weight.detach().to(dtype).double().requires_grad_()
    y = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w
    assert far(norm(x), y) < BOUND[dtype]
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    for mine, true in zip(found, torch.autograd.grad(y, (wide, w), g.double())):
        assert far(mine, true) < BOUND[dtype]


def test_a_frozen_weight_and_a_frozen_input():
    norm, x, g = made(torch.float32, (4, 16))
    both = torch.autograd.grad(norm(x), (x, norm.weight), g)
    torch.testing.assert_close(torch.autograd.grad(norm(x.detach()), norm.weight, g)[0], both[1])
    norm.weight.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(norm(x), x, g)[0], both[0])


def test_the_input_alone_is_kept_for_backward():
    norm, x, _ = made(torch.float32, (4, 16))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        norm(x)
    assert set(kept) == {x.data_ptr(), norm.weight.data_ptr()}


def test_without_gradients_it_is_torchs():
    norm, x, _ = made(torch.bfloat16, (4, 16))
    with torch.no_grad():
        torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (16,), norm.weight.to(x.dtype), 1e-5))
