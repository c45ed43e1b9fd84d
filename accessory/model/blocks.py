"""Causal attention of short sequences on CPU: plain batched products over blocks of queries.

    a sequence of L tokens:   queries [i, j) see keys [0, j)      scores -> softmax -> times v, a block at a time
    kept for backward:        q, k, v; the probabilities are made again, as in flash attention

torch's flash kernel for the CPU multiplies 64 columns at a time, far below what a product of a whole head gives, but for its
forward where there is AMX. As there, scores, softmax and their gradients are fp32 and what is multiplied with v, q and k is in the
inputs' dtype. The blocks' memory is used again and again: a fresh one costs more, in page faults, than the product that fills it.
L is rounded up to a multiple of STEP, so that sequences of many lengths have few shapes (products.py): zeros, which come after
every key that counts. Proof: tests/unit/test_attention_blocks.py.

Shapes: T tokens of a packed row, L of a sequence, n of a block, S = j keys, H query heads, K kv heads, G = H / K, Dh head dim.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from accessory.parallel import products
from accessory.parallel.derivatives import once_only, transformed

QUERIES = 256 if products.AMX else 128  # of a block
STEP = products.GRANULE  # a block is as many queries or a multiple
# torch's kernel takes half the time forward there, backward it takes one and a half times as much
FLASH_FORWARD = products.AMX
LONGEST = 1024  # beyond, the flash kernel is as fast


def faster(q: Tensor, longest: int) -> bool:
    """Whether to use `attend` where the longest sequence has so many tokens: in bf16 alone, on CPUs that multiply it, faster
    than fp32."""
    takes = q.device.type == "cpu" and q.dtype == torch.bfloat16 and products.native(q) and not transformed()
    return takes and longest <= LONGEST and not torch.is_autocast_enabled("cpu")


def attend(q: Tensor, k: Tensor, v: Tensor, bounds: list[int]) -> Tensor:
    """Each sequence sees itself only. q (T, H, Dh); k, v (T, K, Dh); bounds 0, .., T -> (T, H, Dh)."""
    return _Attend.apply(q, k, v, bounds)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: list[int]) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.bounds = bounds
        return _forward(q, k, v, bounds)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        once_only("attention over packed sequences in bf16", "give each sequence a row, or take fp32")
        return *_backward(gradient, *ctx.saved_tensors, ctx.bounds), None


_opaque = partial(torch.library.custom_op, mutates_args=(), device_types="cpu")


@_opaque("accessory::attend")
def attend_opaque(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """`attend` as torch.compile takes it into a layer's graph: it looks no further into it, so lengths make no new graph."""
    return _forward(q, k, v, bounds.tolist())


@_opaque("accessory::attend_backward")
def _backward_opaque(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(gradient, q, k, v, bounds.tolist())


attend_opaque.register_fake(lambda q, k, v, bounds: torch.empty(q.shape, dtype=q.dtype))
_backward_opaque.register_fake(lambda _, q, k, v, bounds: tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)))
attend_opaque.register_autograd(
    lambda ctx, gradient: (*_backward_opaque(gradient, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _forward(q: Tensor, k: Tensor, v: Tensor, bounds: list[int]) -> Tensor:
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    if FLASH_FORWARD and q.dtype == torch.bfloat16:
        return _flash(q, k, v, bounds, y)
    work = _Work(q, k, bounds)
    for a, b in zip(bounds, bounds[1:]):
        whole = _rounded(b - a)
        keys, values = work.heads(k[a:b], whole), work.heads(v[a:b], whole)
        wide = keys.float()
        for i, j in _blocks(b - a):
            rows = slice(a + i, min(a + j, b))
            p = work.half(work.probabilities(work.heads(q[rows], j - i), wide, i, j))
            work.put(y[rows], torch.bmm(p, values[:, :j]))
    return y


def _backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    q_grad, k_grad, v_grad = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    work = _Work(q, k, bounds)
    for a, b in zip(bounds, bounds[1:]):
        whole = _rounded(b - a)
        keys, values = work.heads(k[a:b], whole), work.heads(v[a:b], whole)
        wide_keys, wide_values = keys.float(), values.float()
        for i, j in reversed(_blocks(b - a)):
            rows = slice(a + i, min(a + j, b))
            query, g = work.heads(q[rows], j - i), work.heads(gradient[rows], j - i)
            p = work.probabilities(query, wide_keys, i, j)
            of_v = torch.bmm(work.half(p).transpose(1, 2), g)
            s = work.half(work.scores_grad(g, wide_values, p, j))
            of_k = torch.bmm(s.transpose(1, 2), query)
            if j == whole:  # the last block sees all keys
                of_values, of_keys = (of_v, of_k) if i == 0 else (of_v.float(), of_k.float())
            else:  # of several the sum is fp32
                of_values[:, :j] += of_v
                of_keys[:, :j] += of_k
            work.put(q_grad[rows], torch.bmm(s, keys[:, :j]))
        work.put(k_grad[a:b], of_keys)
        work.put(v_grad[a:b], of_values)
    return q_grad, k_grad, v_grad


def _flash(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], y: Tensor) -> Tensor:
    """torch's kernel for each sequence, into y."""
    k, v = (x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    for a, b in zip(bounds, bounds[1:]):
        part = (x[a:b].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        found, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*part, 0.0, True)
        y[a:b] = found[0].transpose(0, 1)
    return y


class _Work:
    """The memory of one block, for the largest there is, and what is done in it."""

    def __init__(self, q: Tensor, k: Tensor, bounds: list[int]):
        self.kv, self.scale, self.dtype = k.shape[1], q.shape[-1] ** -0.5, q.dtype
        longest = _rounded(max(b - a for a, b in zip(bounds, bounds[1:])))
        largest = q.shape[1] * min(QUERIES, longest) * longest
        self.scores, self.change = (torch.empty(largest) for _ in range(2))  # fp32
        self.rounded = torch.empty(largest, dtype=q.dtype)
        self.later = torch.full((QUERIES, QUERIES), -torch.inf).triu_(1)  # added to scores of keys after the query

    def heads(self, x: Tensor, n: int) -> Tensor:
        """(n or fewer, H, Dh) -> (K, G n, Dh): the queries of a kv head below each other, so that no key is copied for them;
        zeros where there were fewer."""
        turned = x.unflatten(1, (self.kv, -1)).permute(1, 2, 0, 3)
        if len(x) < n:
            turned = F.pad(turned, (0, 0, 0, n - len(x)))
        return turned.contiguous().view(self.kv, -1, x.shape[-1])  # each use of another order would copy it

    def put(self, to: Tensor, x: Tensor) -> None:
        """The other way, into `to`, without those zeros' rows."""
        turned = to.unflatten(1, (self.kv, -1)).permute(1, 2, 0, 3)
        turned.copy_(x.unflatten(1, (turned.shape[1], -1))[:, :, : len(to)])

    def probabilities(self, query: Tensor, keys: Tensor, i: int, j: int) -> Tensor:
        """Of queries [i, j), (K, G n, Dh), over keys [0, j) of (K, L, Dh) in fp32 -> (K, G n, S) in fp32."""
        shape = (*query.shape[:2], j)
        scores = self.scaled(query, keys[:, :j], self.scores, shape)
        scores.unflatten(1, (-1, j - i))[..., i:].add_(self.later[: j - i, : j - i])
        return torch.softmax(scores, -1, out=scores)

    def scores_grad(self, gradient: Tensor, values: Tensor, p: Tensor, j: int) -> Tensor:
        """Of q k^T before its scale, from that of the block's result, (K, G n, Dh) -> (K, G n, S) in fp32."""
        of_p = self.scaled(gradient, values[:, :j], self.change, p.shape)
        return torch._softmax_backward_data(of_p, p, -1, p.dtype, grad_input=of_p)

    def scaled(self, x: Tensor, y: Tensor, memory: Tensor, shape: tuple[int, ...]) -> Tensor:
        """x y^T times the scale, in fp32."""
        to = _view(memory, shape)
        return torch.baddbmm(to, x.float(), y.transpose(1, 2), beta=0, alpha=self.scale, out=to)

    def half(self, x: Tensor) -> Tensor:
        """In the inputs' dtype, for products."""
        return x if x.dtype == self.dtype else _view(self.rounded, x.shape).copy_(x)


def _rounded(length: int) -> int:
    return length + -length % STEP


def _blocks(length: int) -> list[tuple[int, int]]:
    """[i, j) of each block, about equal; the last one ends at `_rounded(length)`."""
    whole = _rounded(length)
    size = _rounded(-(-length // -(-whole // QUERIES)))
    return [(i, min(i + size, whole)) for i in range(0, length, size)]


def _view(memory: Tensor, shape: tuple[int, ...]) -> Tensor:
    return memory[: shape[0] * shape[1] * shape[2]].view(shape)
