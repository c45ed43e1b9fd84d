"""RMSNorm (Zhang and Sennrich 2019): y = x / rms(x) * w, the statistics in fp32, or in x's fp64.

    backward, p = x g:   dw = sum over tokens of p / rms      dx = g w / rms - x (p . w) / (D rms^3)

torch has one kernel for the forward, and for the backward on CUDA; on CPU its backward is a dozen passes over (N, D) in fp32,
here it is two products of a matrix with a vector and four passes: a quarter of the time. Proof: tests/unit/test_norm.py

Shapes: N tokens, D features.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accessory.parallel.derivatives import by_hand, differentiable


class RMSNorm(nn.Module):
    """(.., D) -> (.., D) in x's dtype. Replicated across mp."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_grad_enabled() and by_hand():
            return _RMSNormCPU.apply(x, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


class _RMSNormCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            plain = partial(rms_norm, eps=ctx.eps)
            return *differentiable(plain, (x, weight), gradient, ctx.needs_input_grad[:2]), None
        wants_x, wants_weight, _ = ctx.needs_input_grad
        wide = torch.promote_types(x.dtype, torch.float32)
        rows, g, w = x.flatten(0, -2).to(wide), gradient.flatten(0, -2).to(wide), weight.to(x.dtype).to(wide)
        mean_square = torch.linalg.vector_norm(rows, dim=1).square_().div_(rows.shape[1])  # (N,)
        over_rms = mean_square.add_(ctx.eps).rsqrt_()
        p = rows * g  # (N, D)
        weight_grad = over_rms @ p if wants_weight else None
        if not wants_x:
            return None, weight_grad, None
        along = (p @ w).mul_(over_rms.pow(3)).div_(rows.shape[1])
        x_grad = torch.mul(g, w, out=p).mul_(over_rms.unsqueeze(1)).addcmul_(rows, along.unsqueeze(1), value=-1)
        return x_grad.to(x.dtype).view_as(x), weight_grad, None
