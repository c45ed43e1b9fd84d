"""A frozen linear and its adapter as one autograd function: y = x W^T + b + s (drop(x) A^T) B^T.

    forward    h = drop(x) A^T,  y = x W^T,  y += s h B^T in the product itself
    backward   g' = s g B,  dx = g W + g' A in the product itself,  dA = g'^T drop(x),  dB = s g^T h

Step by step, autograd scales and adds (tokens, out) and (tokens, in) tensors four times, each a pass over memory that costs as
much as the adapter's own products. Kept for backward: x, which the layers that share it keep once; h; of dropout the mask,
a byte an element, instead of the dropped x and its factors. W may be held in NF4 (quant.py), made again in backward.
Proof: tests/unit/test_lora.py, tests/dist/test_parity.py. Measured: python -m bench.ablate_layers.

Shapes of this rank's slices: W (out, in), A (r, in), B (out, r).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from accessory.model import quant
from accessory.parallel import products
from accessory.parallel.derivatives import differentiable, input_like, once_only

Packed = tuple[quant.Layout, tuple[Tensor, Tensor]]  # where a packed W's slice lies, and quant.tables


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        dropout: float,
        packed: Packed | None,
    ) -> Tensor:
        mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None
        rows = products.wide(x)
        h = _kept(rows, mask).flatten(0, -2) @ a.to(rows.dtype).t()  # (N, r)
        if mask is not None:
            h *= 1 / (1 - dropout)
        y = products.times_t(rows, _matrix(weight, packed, rows.dtype))
        y.flatten(0, -2).addmm_(h, b.to(y.dtype).t(), alpha=scale)
        if bias is not None:
            y += bias.to(y.dtype)
        _, wants_weight, _, wants_a, wants_b, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_a or wants_weight else None, weight, a, b, h if wants_b else None, mask)
        ctx.scale, ctx.dropout, ctx.packed = scale, dropout, packed
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        x, weight, a, b, h, mask = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_a, wants_b, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            if x is None and wants_b:  # of h = x A^T the number is kept, not where it comes from
                once_only("a trained lora_b beside a frozen lora_a", "train both")
            x = input_like(gradient, a.shape[1]) if x is None else x
            bias = gradient.new_zeros(gradient.shape[-1]).requires_grad_() if wants_bias else None  # it is added
            plain = partial(_plain, mask=mask, scale=ctx.scale, dropout=ctx.dropout, packed=ctx.packed)
            return *differentiable(plain, (x, weight, bias, a, b), gradient, ctx.needs_input_grad[:5]), None, None, None
        g = products.wide(gradient.flatten(0, -2))  # (N, out)
        a, b = a.to(g.dtype), b.to(g.dtype)  # as in forward; autograd gives a gradient its parameter's dtype
        low = (g @ b).mul_(ctx.scale / (1 - ctx.dropout))  # (N, r): dh
        x_grad = weight_grad = bias_grad = a_grad = b_grad = None
        if wants_x:
            x_grad = products.times(g, _matrix(weight, ctx.packed, g.dtype))
            if mask is None:
                x_grad.addmm_(low, a)
            else:
                x_grad += _kept(low @ a, mask.flatten(0, -2))
            x_grad = x_grad.view(*gradient.shape[:-1], -1).to(gradient.dtype)
        rows = products.wide(x.flatten(0, -2)) if wants_a or wants_weight else None
        if wants_weight:
            weight_grad = products.columns(g, rows.shape[1]) @ rows
        if wants_bias:
            bias_grad = g.sum(0)
        if wants_a:
            a_grad = low.t() @ _kept(rows, None if mask is None else mask.flatten(0, -2))
        if wants_b:
            b_grad = (h.t() @ g).mul_(ctx.scale).t()  # up to twice as fast as g.t() @ h
        return x_grad, weight_grad, bias_grad, a_grad, b_grad, None, None, None


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    packed: Packed | None,
) -> Tensor:
    rows = products.wide(x)
    h = F.linear(_kept(rows, mask) / (1 - dropout), a.to(rows.dtype))
    y = F.linear(rows, _matrix(weight, packed, rows.dtype).to(rows.dtype)) + F.linear(h, b.to(rows.dtype)) * scale
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """What dropout leaves, its factor 1 / (1 - p) still to come: on the (N, r) side it costs nothing."""
    return (
        x if mask is None else torch.where(mask, x, 0.0)
    )  # a product with a mask of bools is five times slower on CPU


def _matrix(weight: Tensor, packed: Packed | None, dtype: torch.dtype) -> Tensor:
    """W as `products` takes it."""
    return weight if packed is None else quant.dequantise(weight, *packed, dtype)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float = 0.0,
    packed: Packed | None = None,
) -> Tensor:
    """(.., in) -> (.., out); `dropout` on the adapter's input, 0 outside training. All in x's dtype, to which parameters of
    another are cast. Not for autocast, which does not reach backward. Under mp: of these slices, sums are the caller's."""
    return _LoraLinear.apply(x, weight, bias, a, b, scale, dropout, packed)
