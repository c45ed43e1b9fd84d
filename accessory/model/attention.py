"""Causal attention over one sequence per row, over packed sequences, or over a cache.

    packed row:   [ a a a a | b b | c c c ]    cu_seqlens 0 4 6 9: each sequence sees itself only, nothing is padding

On CUDA in half precision packed rows go through torch's varlen kernel; elsewhere sequence by sequence (measured on CPU, ten
documents in 2048 tokens: 9 times faster than a block mask). Shapes: B batch, T tokens, S keys, H query heads, K kv heads, Dh head dim.
"""

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F


class Segments:
    """Bounds of the sequences packed in a row, in the forms that attention, rotary embedding and loss need. Made once a batch."""

    def __init__(self, cu_seqlens: Tensor):
        self.cu_seqlens = cu_seqlens.int()  # (S+1,)
        self.starts = cu_seqlens[:-1].long()
        self.bounds: list[int] = cu_seqlens.tolist()
        self.longest = max((b - a for a, b in zip(self.bounds, self.bounds[1:])), default=0)

    @cached_property
    def positions(self) -> Tensor:  # (1, T)
        lengths = self.cu_seqlens.diff().long()
        index = torch.arange(self.bounds[-1], device=lengths.device)
        return (index - self.starts.repeat_interleave(lengths, output_size=self.bounds[-1])).unsqueeze(0)


def segments(tokens: Tensor, cu_seqlens: Tensor | None) -> Segments | None:
    """Checks the bounds against the tokens (B, T). Raises ValueError when they do not cover one row exactly."""
    if cu_seqlens is None:
        return None
    if isinstance(cu_seqlens, Segments):
        return cu_seqlens
    packed = Segments(cu_seqlens)
    rising = all(a < b for a, b in zip(packed.bounds, packed.bounds[1:]))
    if tokens.shape[0] != 1 or packed.bounds[0] != 0 or packed.bounds[-1] != tokens.shape[1] or not rising:
        raise ValueError(f"cu_seqlens {packed.bounds[:3]}..{packed.bounds[-1]} do not cut one row of tokens {tuple(tokens.shape)}")
    return packed


def attend(q: Tensor, k: Tensor, v: Tensor, packed: Segments | None, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v, causal. q (B, T, H, Dh); k, v (B, S, K, Dh) -> (B, T, H, Dh). `mask` as SDPA takes it."""
    if packed is None or len(packed.bounds) == 2:
        return _sdpa(q, k, v, mask)
    varlen = _varlen_kernel() if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) else None
    if varlen is not None:
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
        cu, longest = packed.cu_seqlens, packed.longest
        return varlen(q[0], k[0], v[0], cu, cu, longest, longest).unsqueeze(0)
    return _one_by_one(q, k, v, packed.bounds)


@torch.compiler.disable  # the bounds differ in every batch: compiled, each would be a new graph
def _one_by_one(q: Tensor, k: Tensor, v: Tensor, bounds: list[int]) -> Tensor:
    lengths = [b - a for a, b in zip(bounds, bounds[1:])]
    parts = zip(q.split(lengths, dim=1), k.split(lengths, dim=1), v.split(lengths, dim=1))
    return torch.cat([_sdpa(*part, None) for part in parts], dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H|K, T|S, Dh)
    grouped = q.shape[1] != k.shape[1]
    if grouped and not q.is_cuda:  # the CPU kernel has no grouping: it would fall back to a slow one
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        grouped = False
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return y.transpose(1, 2)


def _varlen_kernel():
    """torch.nn.attention.varlen (from torch 2.10) as f(q, k, v, cu_q, cu_k, longest_q, longest_k), causal; None without it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    import inspect

    if "window_size" in inspect.signature(varlen_attn).parameters:  # later signature: causal is a window that looks back only
        return lambda *a: varlen_attn(*a, window_size=(-1, 0))
    return lambda *a: varlen_attn(*a, is_causal=True)
