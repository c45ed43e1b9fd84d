"""Causal attention of short sequences on CPU: plain batched products over blocks of queries.

    a sequence of L tokens:   queries [i, j) see keys [0, j)      scores -> softmax -> times v, a block at a time
    kept for backward:        q, k, v, y and the logarithms of softmax's sums, of which the probabilities are made again, as in
                              flash attention: p = exp(scores - lse); of short sequences, where asked for, p itself (`KEPT`)
    of the scores:            p (g v^T - mean), mean = sum(g y): one product of g | -mean with v | 1, the mean in two numbers where
                              that is in 16 bit

torch's flash kernel for the CPU multiplies 64 columns at a time, far below what a product of a whole head gives, but for its
forward where there is AMX. As there, scores and softmax are fp32 and what is multiplied with v, q and k is in the inputs' dtype;
so is, with AMX, the difference with the mean, but it is taken in the product's own fp32 and rounded once. The exponential is
the faster of exp and exp2, for which the scale takes log2(e) along. The scale is in k, and in v for the gradients, where
they are in fp32: no product has a factor then. The blocks' memory is used again and again: a fresh one
costs more, in page faults, than the product that fills it.
L is rounded up to a multiple of STEP, so that sequences of many lengths have few shapes (products.py): zeros, which come after
every key that counts. Proof: tests/unit/test_attention_blocks.py.

Shapes: T tokens of a packed row, L of a sequence, n of a block, S = j keys, H query heads, K kv heads, G = H / K, Dh head dim.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from accessory.parallel import products
from accessory.parallel.derivatives import once_only, transformed

QUERIES = 256 if products.AMX else 128  # of a block
STEP = products.GRANULE if products.AMX else 16  # a block is as many queries or a multiple
# torch's kernel takes half the time forward there, backward it takes one and a half times as much
FLASH_FORWARD = products.AMX
FLASH_ROWS = 16  # at a time: of other numbers it takes the rest without AMX
# of p's gradient less its mean: in the inputs' dtype, where a product in fp32 takes three times as long
ROUNDED_CHANGE = products.AMX
# exp is MKL's: there a third of the time of torch's softmax, but on an AMD more than all of it, and three times that of exp2
BY_EXP = products.AMX
LOG2_E = math.log2(math.e)
LONGEST = 1024  # beyond, the flash kernel is as fast
# probabilities, a query head and token, of which there is room for backward: as many as sequences of up to two blocks have. In
# fp16, which holds what lies in [0, 1] eight times as finely as bf16
KEPT = 192


def faster(q: Tensor, longest: int) -> bool:
    """Whether to use `attend` where the longest sequence has so many tokens: in bf16 alone, on CPUs that multiply it, faster
    than fp32."""
    takes = q.device.type == "cpu" and q.dtype == torch.bfloat16 and products.native(q) and not transformed()
    return takes and longest <= LONGEST and not torch.is_autocast_enabled("cpu")


def kept_bytes(device: torch.device, dtype: torch.dtype) -> int:
    """A query head and token, where `attend` keeps."""
    takes = device.type == "cpu" and dtype == torch.bfloat16 and products.CPU_MULTIPLIES[dtype]
    return 2 * KEPT if takes and not FLASH_FORWARD else 0


def attend(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], keeps: bool = False) -> Tensor:
    """Each sequence sees itself only. q (T, H, Dh); k, v (T, K, Dh); bounds 0, .., T -> (T, H, Dh). `keeps`: H KEPT numbers a
    token more for a backward that takes three quarters of the time."""
    return _Attend.apply(q, k, v, bounds, keeps)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: list[int], keeps: bool) -> Tensor:
        y, *beside = _forward(q, k, v, bounds, keeps)
        ctx.save_for_backward(q, k, v, y, *beside)
        ctx.bounds = bounds
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        once_only("attention over packed sequences in bf16", "give each sequence a row, or take fp32")
        *qkv, y, lse, kept = ctx.saved_tensors
        # within the caches; compiled, it is one pass
        means = torch.cat([_means(*some) for some in zip(gradient.split(QUERIES), y.split(QUERIES))])
        return *_backward(gradient, *qkv, means, lse, kept, ctx.bounds), None, None


_opaque = partial(torch.library.custom_op, mutates_args=(), device_types="cpu")


@_opaque("accessory::attend")
def attend_opaque(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, keeps: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`attend` as torch.compile takes it into a layer's graph: it looks no further into it, so lengths make no new graph. The
    second and third result are for backward alone."""
    return _forward(q, k, v, bounds.tolist(), keeps)


@_opaque("accessory::attend_backward")
def _backward_opaque(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, means: Tensor, lse: Tensor, kept: Tensor, bounds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(gradient, q, k, v, means, lse, kept, bounds.tolist())


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *qkv, bounds, _ = inputs
    ctx.save_for_backward(*qkv, *output, bounds)
    ctx.mark_non_differentiable(*output[1:])


def _traced_backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *qkv, y, lse, kept, bounds = ctx.saved_tensors
    return *_backward_opaque(gradient, *qkv, _means(gradient, y), lse, kept, bounds), None, None


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype)


def _empty(q: Tensor, keeps: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `_forward` fills."""
    room = q.shape[0] * q.shape[1] * KEPT if keeps and not FLASH_FORWARD else 0
    return _like(q), torch.empty(q.shape[1], q.shape[0]), torch.empty(room, dtype=torch.float16)


attend_opaque.register_fake(lambda q, k, v, bounds, keeps: _empty(q, keeps))
attend_opaque.register_autograd(_traced_backward, setup_context=_keep)
_backward_opaque.register_fake(lambda gradient, q, k, v, means, lse, kept, bounds: (_like(q), _like(k), _like(v)))


def _means(gradient: Tensor, y: Tensor) -> Tensor:
    """(T, H) in fp32, of the probabilities' gradient, weighted with them: what softmax's backward takes off."""
    return (gradient.float() * y).sum(-1)


def _forward(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], keeps: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The result; log(sum(exp(scores))) of each head and query, (H, T) in fp32; probabilities in fp16, as `_places` has them."""
    y, lse, kept = _empty(q, keeps)
    if FLASH_FORWARD and q.dtype == torch.bfloat16:
        _flash(q, k, v, bounds, y, lse)
        return y, lse, kept
    places = _places(bounds, q.shape[1], kept)
    work = _Work(q, k, bounds)
    queries, keys, values, to = (work.heads(x) for x in (q, k, v, y))
    for a, b in zip(bounds, bounds[1:]):
        key, value = work.rows(keys, a, b), work.rows(values, a, b)
        wide = key.float() * (work.scale * LOG2_E)
        for i, j in _blocks(b - a):
            own = a + i, min(a + j, b)
            p, sums = work.softmax(work.scores_of(work.rows(queries, *own), wide[:, :j]), i)
            work.put(to, *own, torch.bmm(work.half(p), value[:, :j]))
            work.put(work.numbers(lse), *own, sums)
            if (place := places.get(a + i)) is not None:
                _view(kept[place:], p.shape).copy_(p)
    return y, lse, kept


def _backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, means: Tensor, lse: Tensor, kept: Tensor, bounds: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    places = _places(bounds, q.shape[1], kept)
    found = tuple(_like(x) for x in (q, k, v))
    work, unit = _Work(q, k, bounds), 1.0 if BY_EXP else LOG2_E
    queries, keys, values, gradients, *to = (work.heads(x) for x in (q, k, v, gradient, *found))
    less_means = work.heads(_in_two(-means, q.dtype) if ROUNDED_CHANGE else -means.unsqueeze(-1))
    lse, ones = work.numbers(lse * unit), torch.ones(less_means.shape[-1])
    for a, b in zip(bounds, bounds[1:]):
        key, value = work.rows(keys, a, b), work.rows(values, a, b, ones)
        if not ROUNDED_CHANGE:
            value *= work.scale
        again = any(a + i not in places for i, _ in _blocks(b - a))
        wide = key.float() * (work.scale * unit) if again else None
        for i, j in reversed(_blocks(b - a)):
            own = a + i, min(a + j, b)
            query, g = work.rows(queries, *own), work.rows(gradients, *own)
            if (place := places.get(a + i)) is not None:
                shape = *query.shape[:2], j
                p = _view(work.scores, shape).copy_(_view(kept[place:], shape))
            else:
                p = work.softmax_again(work.scores_of(query, wide[:, :j]), lse[:, :, slice(*own)], i)
            of_v = torch.bmm(work.half(p).transpose(1, 2), g)
            less = work.rows(gradients, *own, less_means[:, :, slice(*own)])
            s = work.half(p.mul_(work.change_of(less, value[:, :j])))
            of_k = torch.bmm(s.transpose(1, 2), query)
            if j == key.shape[1]:  # the last block sees all keys
                sums = (of_v, of_k) if i == 0 else (of_v.float(), of_k.float())
            else:  # of several the sum is fp32
                sums[0][:, :j] += of_v
                sums[1][:, :j] += of_k
            work.put(to[0], *own, torch.bmm(s, key[:, :j]))
        work.put(to[1], a, b, sums[1])
        work.put(to[2], a, b, sums[0])
    return found


def _in_two(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, H) in fp32 -> (T, H, 2): rounded, and what that left."""
    rounded = x.to(dtype)
    return torch.stack((rounded, (x - rounded).to(dtype)), -1)


def _flash(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], y: Tensor, lse: Tensor) -> None:
    """torch's kernel for each sequence, into y and lse."""
    k, v = (x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    for a, b in zip(bounds, bounds[1:]):
        part = (_whole_tiles(x[a:b]).transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*part, 0.0, True)
        y[a:b] = found[0, :, : b - a].transpose(0, 1)
        lse[:, a:b] = sums[0, :, : b - a]


def _whole_tiles(x: Tensor) -> Tensor:
    """With rows of zeros, later than all that count, to a multiple of FLASH_ROWS."""
    if not (missing := -len(x) % FLASH_ROWS):
        return x
    whole = x.new_empty(len(x) + missing, *x.shape[1:])
    whole[: len(x)], whole[len(x) :] = x, 0
    return whole


class _Work:
    """The memory of one block, for the largest there is, and what is done in it."""

    def __init__(self, q: Tensor, k: Tensor, bounds: list[int]):
        self.kv, self.scale, self.dtype = k.shape[1], q.shape[-1] ** -0.5, q.dtype
        longest = _rounded(max(b - a for a, b in zip(bounds, bounds[1:])))
        queries = min(QUERIES, longest)
        largest = q.shape[1] * queries * longest
        self.later = torch.full((queries, queries), -torch.inf).triu_(1)
        self.scores = torch.empty(largest)  # fp32
        self.rounded = torch.empty(largest, dtype=q.dtype)
        self.change = torch.empty(largest, dtype=q.dtype if ROUNDED_CHANGE else torch.float32)

    def heads(self, x: Tensor) -> Tensor:
        """(T, H, Dh) -> (K, G, T, Dh), a view."""
        return x.view(len(x), self.kv, -1, x.shape[-1]).permute(1, 2, 0, 3)

    def numbers(self, x: Tensor) -> Tensor:
        """(H, T) -> (K, G, T, 1), a view."""
        return x.view(self.kv, -1, x.shape[-1], 1)

    def rows(self, x: Tensor, start: int, stop: int, beside: Tensor | None = None) -> Tensor:
        """Of (K, G, T, Dh) those from start to stop, n when rounded up, with zeros -> (K, G n, Dh): the queries of a kv head
        below each other, so that no key is copied for them. A copy: each use of another order would make one. `beside`: for columns
        more; then in the dtype of the change."""
        (k, g, _, size), length, n = x.shape, stop - start, _rounded(stop - start)
        x = x[:, :, start:stop]
        if beside is None and length == n:
            return x.contiguous().view(k, g * n, size)
        columns, dtype = (0, None) if beside is None else (beside.shape[-1], self.change.dtype)
        to = x.new_empty(k, g, n, size + columns, dtype=dtype)
        to[:, :, :length, :size] = x
        if beside is not None:
            to[:, :, :length, size:] = beside
        if length < n:
            to[:, :, length:] = 0
        return to.view(k, g * n, -1)

    def put(self, to: Tensor, start: int, stop: int, x: Tensor) -> None:
        """The other way, into `to`, without the zeros' rows."""
        x = x.view(*to.shape[:2], -1, x.shape[-1])
        to[:, :, start:stop] = x if x.shape[2] == stop - start else x[:, :, : stop - start]

    def scores_of(self, query: Tensor, keys: Tensor) -> Tensor:
        """(K, G n, Dh) and, in fp32 and scaled, (K, S, Dh) -> (K, G n, S) in fp32."""
        to = _view(self.scores, (*query.shape[:2], keys.shape[1]))
        return torch.bmm(query.float(), keys.transpose(1, 2), out=to)

    def change_of(self, gradient: Tensor, values: Tensor) -> Tensor:
        """Of the probabilities less its mean, scaled: (K, G n, S)."""
        to = _view(self.change, (*gradient.shape[:2], values.shape[1]))
        if not ROUNDED_CHANGE:  # v is scaled
            return torch.bmm(gradient, values.transpose(1, 2), out=to)
        return torch.baddbmm(to, gradient, values.transpose(1, 2), beta=0, alpha=self.scale, out=to)

    def softmax(self, scores: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """In place, of queries from i on, which see no later key, scores to the base 2; and the logarithms of the sums, (K, G n, 1),
        to the base e."""
        n = scores.shape[-1] - i
        scores.view(-1, n, i + n)[..., i:].add_(self.later[:n, :n])
        highest = scores.amax(-1, keepdim=True)
        p = scores.sub_(highest).exp2_()
        total = p.sum(-1, keepdim=True)
        return p.mul_(total.reciprocal()), total.log2_().add_(highest).div_(LOG2_E)

    def softmax_again(self, scores: Tensor, lse: Tensor, i: int) -> Tensor:
        """The same in place, from the logarithms (K, G, n or fewer, 1), to the base of the scores: 2, or e BY_EXP."""
        by_query = scores.view(*lse.shape[:2], -1, scores.shape[-1])
        by_query[:, :, : lse.shape[2]].sub_(lse)
        # later keys may have more than 0, but are cut off now
        scores.clamp_(products.LEAST_EXP, 0).exp_() if BY_EXP else scores.exp2_()
        by_query.tril_(i)
        return scores

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


def _places(bounds: list[int], heads: int, kept: Tensor) -> dict[int, int]:
    """Where in `kept` the probabilities of the block are that begins with a query of the row, as long as there is room."""
    places, used = {}, 0
    for a, b in zip(bounds, bounds[1:]):
        for i, j in _blocks(b - a):
            if used + (size := heads * (j - i) * j) <= len(kept):
                places[a + i] = used
                used += size
    return places


def _view(memory: Tensor, shape: tuple[int, ...]) -> Tensor:
    return memory.as_strided(shape, (shape[1] * shape[2], shape[2], 1))
