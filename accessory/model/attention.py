"""Causal attention over one sequence per row, over packed sequences, or over a cache.

    packed row:   [ a a a a | b b | c c c ]    cu_seqlens 0 4 6 9: each sequence sees itself only, nothing is padding
                                               after -1 0 0: b and c go on from a, which they see too (sharing.py)

On CUDA in half precision packed rows go through torch's varlen kernel, one sequence alone too unless its length is one of few;
elsewhere sequence by sequence (measured on CPU, ten documents in 2048 tokens: 9 times faster than a block mask), short ones on
CPU as plain products (blocks.py).
Proof: tests/unit/test_device_paths.py, tests/unit/test_attention_blocks.py, tests/gpu.
Shapes: B batch, T tokens, S keys, H query heads, K kv heads, Dh head dim.
"""

import functools
import inspect
from functools import cached_property
from typing import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from accessory.model import blocks
from accessory.model.sharing import Spread
from accessory.parallel import groups, products

HALF = (torch.bfloat16, torch.float16)  # what the flash kernels take
# for one sequence alone an H200 has cuDNN's kernel, which is fast but built anew, within the step, for every length that comes
# the first time (torch 2.11 to 2.13): so for lengths that are multiples of this, as blocks of a corpus are, and no others
LENGTHS = 128


class Segments:
    """Bounds of the sequences packed in a row, in the forms that attention, rotary embedding and loss need. Made once a batch.

    `device` is the tokens'. `cu_seqlens` had better be on the host: reading it from a GPU waits for the GPU. `after` (S,), there
    too: of each sequence, the number of the one that its tokens come after, -1 for none; several may come after one."""

    def __init__(self, cu_seqlens: Tensor, device: torch.device, after: Tensor | None = None):
        self.bounds: list[int] = cu_seqlens.tolist()
        self.rising = all(a < b for a, b in zip(self.bounds, self.bounds[1:]))
        if after is not None and not (self.rising and len(after) == len(self.bounds) - 1):
            raise ValueError(
                f"cu_seqlens {tuple(cu_seqlens.shape)}, after {tuple(after.shape)}: rising bounds and one number for each "
                "sequence between them are expected"
            )
        alone = after is None or bool((after == -1).all())
        self.spread = None if alone else Spread(self.bounds, after.tolist(), device)
        whole = self.bounds if self.spread is None else self.spread.bounds
        self.whole = None if self.spread is None else Segments(torch.tensor(whole), device)
        self.longest = max((b - a for a, b in zip(whole, whole[1:])), default=0)  # with what it comes after
        self.alone = len(self.bounds) == 2
        self.cu_seqlens = groups.sent(cu_seqlens.int(), device)  # (S+1,)
        self.starts = self.cu_seqlens[:-1].long()
        self.kernel = _varlen_kernel(device)

    @cached_property
    def positions(self) -> Tensor:  # (1, T)
        if self.spread is not None:
            return self.spread.gathered(self.whole.positions)
        lengths = self.cu_seqlens.diff().long()
        index = torch.arange(self.bounds[-1], device=lengths.device)
        return (index - self.starts.repeat_interleave(lengths, output_size=self.bounds[-1])).unsqueeze(0)


def segments(tokens: Tensor, cu_seqlens: Tensor | Segments | None) -> Segments | None:
    """Checks the bounds against the tokens (B, T). Raises ValueError when they do not cover one row exactly."""
    if cu_seqlens is None:
        return None
    fits = (
        isinstance(cu_seqlens, Tensor)
        and cu_seqlens.dim() == 1
        and len(cu_seqlens)
        and not cu_seqlens.is_floating_point()
    )
    if not isinstance(cu_seqlens, Segments) and not fits:
        raise ValueError(
            "cu_seqlens: a tensor of whole numbers is expected, 0, the end of each sequence, .., all tokens"
        )
    packed = cu_seqlens if isinstance(cu_seqlens, Segments) else Segments(cu_seqlens, tokens.device)
    if tokens.shape[0] != 1 or packed.bounds[:1] != [0] or packed.bounds[-1] != tokens.shape[1] or not packed.rising:
        raise ValueError(
            f"cu_seqlens {packed.bounds[:3]}..{packed.bounds[-1]} do not cut one row of tokens {tuple(tokens.shape)}"
        )
    return packed


def attend(
    q: Tensor, k: Tensor, v: Tensor, packed: Segments | None, mask: Tensor | None, keeps: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v, causal. q (B, T, H, Dh); k, v (B, S, K, Dh) -> (B, T, H, Dh). `mask` as SDPA takes it.
    `keeps`: more may be kept for backward where that makes it faster (blocks.py)."""
    if packed is None:
        return _sdpa(q, k, v, mask)
    takes = packed.kernel is not None and q.dtype in HALF and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    if packed.alone and not (takes and packed.longest % LENGTHS):
        return _sdpa(q, k, v, mask)
    if takes and packed.spread is None:
        return packed.kernel(q[0], k[0], v[0], packed.cu_seqlens, packed.longest).unsqueeze(0)
    if not torch.compiler.is_compiling():
        return _one_by_one(q, k, v, packed, keeps)
    if blocks.faster(q, packed.longest) and packed.spread is None:
        q, k, v = (x.squeeze(0) for x in (q, k, v))  # x[0]'s backward is a pass over memory
        return blocks.attend_opaque(q, k, v, packed.cu_seqlens, keeps)[0].unsqueeze(0)
    return _uncompiled(q, k, v, packed, keeps)


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, packed: Segments, keeps: bool) -> Tensor:
    """Never compiled: the bounds differ in every batch, each would be a new graph; so would they as an argument."""
    if packed.spread is not None:
        to = packed.spread
        return to.gathered(attend(to.queries(q), to.keys(k), to.keys(v), packed.whole, None, keeps))
    if blocks.faster(q, packed.longest):
        return blocks.attend(q[0], k[0], v[0], packed.bounds, keeps).unsqueeze(0)
    lengths = [b - a for a, b in zip(packed.bounds, packed.bounds[1:])]
    parts = zip(q.split(lengths, dim=1), k.split(lengths, dim=1), v.split(lengths, dim=1))
    return torch.cat([_sdpa(*part, None) for part in parts], dim=1)


# torch.compiler.disable would import the compiler here and now, this at the first call: 2 s of every run
_uncompiled = torch._disable_dynamo(_one_by_one)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    dtype = q.dtype
    q, k, v = (products.wide(t).transpose(1, 2) for t in (q, k, v))  # (B, H|K, T|S, Dh)
    grouped = q.shape[1] != k.shape[1]
    if grouped and not (
        q.is_cuda and q.dtype in HALF and mask is None
    ):  # only flash knows groups: others would take the slow path
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        grouped = False
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return y.transpose(1, 2).to(dtype)


@functools.cache
def _varlen_kernel(device: torch.device) -> Callable | None:
    """torch.nn.attention.varlen as f(q, k, v, cu_seqlens, longest), causal, q (T, H, Dh), k and v (T, K, Dh); None where it
    cannot run: on CPU, on a GPU before Ampere, in a torch without it."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return causal_varlen(varlen_attn)


def keeps_groups(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed rows keep k and v for backward once a kv head; if not, once a query head."""
    if dtype not in HALF or _varlen_kernel(device) is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def causal_varlen(varlen_attn: Callable) -> Callable:
    """Evens out its signatures: a window, in which causal is (-1, 0); from torch 2.12 on grouped heads too."""
    causal = {"window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        return lambda q, k, v, cu, longest: varlen_attn(
            q, k, v, cu, cu, longest, longest, enable_gqa=q.shape[1] != k.shape[1], **causal
        )

    def repeated(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        return varlen_attn(q, k, v, cu, cu, longest, longest, **causal)

    return repeated
