"""fairscale's parallel layers, made ready for a model that is built empty, shares its input copies and takes any vocabulary.

    column: W [out/mp, in]   x replicated  -> y [.., out/mp]      the caller copies x once per input (`copy_to_mp`), so that
    row:    W [out, in/mp]   x [.., in/mp] -> y replicated        q, k, v together cost one all-reduce in backward, not three

Sequence parallel (Korthikanti et al. 2022): between a row layer and the next column layer each rank has 1/mp of the tokens

    all-reduce            = reduce-scatter, then all-gather       scatter_tokens after a row layer, gather_tokens before a
    x replicated (B, T, D)  x (N/mp, D) between the two           column layer: the bytes sent are the same

N = B T, rounded up to a multiple of mp; the rows added are zeros, and nothing is ever read from them.

Shapes: B batch, T tokens, V vocab, D features, /mp = this rank's slice. Test: tests/dist/test_layers.py, test_sequence_parallel.py
"""

import contextlib
from functools import partial
from types import SimpleNamespace
from typing import Any, Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import layers as fairscale_layers
from fairscale.nn.model_parallel.mappings import (
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import Tensor, nn
from torch.nn import functional as F

from accessory.parallel import exchange, groups, products, spare
from accessory.parallel.derivatives import by_hand, differentiable, input_like


def _over_mp(region: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Nothing at all on one rank: torch.func takes no autograd function without a rule of its own."""
    return lambda x: x if groups.mp_size() == 1 else region(x)


copy_to_mp = _over_mp(copy_to_model_parallel_region)  # forward: nothing; backward: sum over mp
reduce_from_mp = _over_mp(reduce_from_model_parallel_region)  # forward: sum over mp; backward: nothing
# forward: concatenate the last dim over mp; backward: this rank's part
gather_from_mp = _over_mp(gather_from_model_parallel_region)

# torch 2.13 renamed them; the old names warn there
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _by_exchange(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()  # which knows torch's own collectives only


def _gathered(part: Tensor) -> Tensor:  # (n, D) -> (mp n, D)
    whole = part.new_empty(part.shape[0] * groups.mp_size(), *part.shape[1:])
    gather = exchange.all_gather if _by_exchange(part) else _all_gather
    gather(whole, part.contiguous(), group=groups.mp_group())
    return whole


def _scattered(addend: Tensor) -> Tensor:  # (mp n, D) -> (n, D) of the sum over mp
    part = addend.new_empty(addend.shape[0] // groups.mp_size(), *addend.shape[1:])
    scatter = exchange.reduce_scatter if _by_exchange(addend) else _reduce_scatter
    scatter(part, addend.contiguous(), group=groups.mp_group())
    return part


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        return _gathered(part)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _scattered(gradient)


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, addend: Tensor) -> Tensor:
        return _scattered(addend)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _gathered(gradient)


def gather_tokens(part: Tensor, shape: Sequence[int]) -> Tensor:
    """(N/mp, D) of every rank -> (B, T, D), the same on all. Backward: this rank's tokens of the sum over mp. Collective."""
    batch, length = shape
    return _GatherTokens.apply(part)[: batch * length].view(batch, length, -1)


def scatter_tokens(addend: Tensor) -> Tensor:
    """(B, T, D), an addend -> (N/mp, D): this rank's tokens of the sum over mp. Backward: all tokens. Collective."""
    rows = addend.flatten(0, 1)
    return _ScatterTokens.apply(F.pad(rows, (0, 0, 0, -rows.shape[0] % groups.mp_size())))


def gather_rows(part: Tensor, rows: Tensor) -> Tensor:
    """The tokens of these numbers (M,), rising, of (N/mp, D) of every rank: (M, D), the same on all. Only they are sent, as
    many from each rank as from the one that has most. `rows` is on the host, where sizes are read. Backward: as of
    `gather_tokens`. Collective."""
    mine = part.shape[0]
    owner = rows // mine
    counts = torch.bincount(owner, minlength=groups.mp_size())
    starts = counts.cumsum(0) - counts
    first, count, most = torch.stack((starts[groups.mp_rank()], counts[groups.mp_rank()], counts.max())).tolist()
    own, most = rows[first : first + count] - groups.mp_rank() * mine, max(1, most)
    own = F.pad(own, (0, most - count))  # fills up with row 0, which nobody takes
    place = owner * most + torch.arange(len(rows)) - starts[owner]
    own, place = groups.sent(own, part.device), groups.sent(place, part.device)
    return _GatherTokens.apply(part[own])[place]


class _CastLinear(torch.autograd.Function):
    """x W^T with W cast for the product, if its dtype or the device wants it; cast again in backward, so that no copy of a
    layer waits for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return products.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        if torch.is_grad_enabled():
            x = input_like(gradient, weight.shape[1]) if x is None else x
            return differentiable(_cast_linear, (x, weight), gradient, ctx.needs_input_grad)
        g = products.wide(gradient)
        x_grad = products.times(g, weight).to(gradient.dtype) if wants_x else None
        weight_grad = _weight_grad(g, products.wide(x)) if wants_weight else None
        return x_grad, weight_grad


class _TurnedLinear(torch.autograd.Function):
    """The same for torch.compile, with the weight's gradient of rows turned before. It is cast again by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _cast_linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), _weight_grad(gradient, x).to(weight.dtype)


def _weight_grad(g: Tensor, x: Tensor) -> Tensor:  # (.., out), (.., in) -> (out, in)
    return products.columns(g.flatten(0, -2), x.shape[-1]) @ x.flatten(0, -2)


def _cast_linear(x: Tensor, weight: Tensor) -> Tensor:
    rows = products.wide(x)
    return F.linear(rows, weight.to(rows.dtype)).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in x's dtype, whatever that of the parameters: (.., in) -> (.., out). Their gradients come in their own."""
    if weight.dtype == x.dtype and products.native(x):
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if by_hand():
        y = _CastLinear.apply(x, weight)
    elif torch.compiler.is_compiling() and weight.requires_grad and products.turns(x, x.shape[-1]):
        y = _TurnedLinear.apply(x, weight)
    else:  # compiled, it is cast again by itself
        y = _cast_linear(x, weight)
    return y if bias is None else y + bias.to(y.dtype)


# what fairscale's constructors take from torch: their weights without memory, which the allocator else has to find for each
_NOWHERE = SimpleNamespace(Tensor=partial(torch.empty, device="meta"), no_grad=torch.no_grad)


@contextlib.contextmanager
def _unallocated() -> Iterator[None]:
    """fairscale 0.4.13 makes the full, unsharded weight on every rank to slice it, and in fp32; this makes neither."""
    original = fairscale_layers._initialize_affine_weight, fairscale_layers.torch
    fairscale_layers._initialize_affine_weight, fairscale_layers.torch = lambda *args, **kwargs: None, _NOWHERE
    try:
        yield
    finally:
        fairscale_layers._initialize_affine_weight, fairscale_layers.torch = original


class ColumnParallelLinear(fairscale_layers.ColumnParallelLinear):
    """y = x W^T + b with W's rows split over mp. x: replicated and already through `copy_to_mp`. Built on the meta device."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        with _unallocated():
            super().__init__(in_features, out_features, bias=bias, gather_output=False, init_method=lambda w: w)

    def forward(self, x: Tensor) -> Tensor:  # (.., in) -> (.., out/mp)
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return _sizes(self)


class RowParallelLinear(fairscale_layers.RowParallelLinear):
    """y = sum over mp of x W^T, plus a replicated bias. x: this rank's slice of the features. Built on the meta device."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        with _unallocated():
            super().__init__(in_features, out_features, bias=bias, input_is_parallel=True, init_method=lambda w: w)

    def forward(self, x: Tensor) -> Tensor:  # (.., in/mp) -> (.., out)
        y = reduce_from_mp(self.partial(x))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def divided(self, x: Tensor) -> Tensor:  # (B, T, in/mp) -> (N/mp, out)
        """y of this rank's share of the tokens, for sequence parallel. The bias's gradient is then an addend."""
        y = scatter_tokens(self.partial(x))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def partial(self, x: Tensor) -> Tensor:
        """This rank's addend of the product, before the sum over mp."""
        return linear(x, self.weight)

    def extra_repr(self) -> str:
        return _sizes(self)


def _sizes(layer: nn.Module) -> str:
    over = f", split over {groups.mp_size()} ranks" if groups.mp_size() > 1 else ""
    return f"{layer.in_features}, {layer.out_features}, bias={layer.bias is not None}{over}"


class _Lookup(torch.autograd.Function):
    """Rows of a table. torch makes the table's gradient, zeros but for some rows, in fresh memory each time."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight = weight
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        (tokens,), weight = ctx.saved_tensors, ctx.weight
        if torch.is_grad_enabled():
            return None, *differentiable(partial(F.embedding, tokens), (weight,), gradient, (True,))
        table = spare.take(weight).zero_()
        return None, table.index_add_(0, tokens.flatten(), gradient.flatten(0, -2))


def _lookup(tokens: Tensor, weight: Tensor) -> Tensor:
    return _Lookup.apply(tokens, weight) if by_hand() and weight.device.type == "cpu" else F.embedding(tokens, weight)


class VocabParallelEmbedding(fairscale_layers.VocabParallelEmbedding):
    """Row i of the table for token i, rows split over mp. Holds `padded_vocab(V)` rows; those from V on are never looked up.

    Always split on the vocabulary: a split of the features, as in Llama 1/2 files, could not be tied to the head."""

    def __init__(self, vocab_size: int, dim: int):
        with _unallocated():
            super().__init__(padded_vocab(vocab_size), dim, init_method=lambda w: w)
        self.compute_dtype: torch.dtype | None = None  # of what it gives; None: its weight's

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, D), replicated
        return reduce_from_mp(self.partial(tokens))

    def divided(self, tokens: Tensor) -> Tensor:  # (B, T) -> (N/mp, D)
        """This rank's share of the tokens, for sequence parallel."""
        return scatter_tokens(self.partial(tokens))

    def partial(self, tokens: Tensor) -> Tensor:
        """The rows that this rank holds, zeros for the others: an addend."""
        if groups.mp_size() == 1:
            return _lookup(tokens, self.weight).to(self.compute_dtype or self.weight.dtype)
        start = groups.mp_rank() * len(self.weight)  # by the weight: one may have been put in that has more rows
        outside = (tokens < start) | (tokens >= start + len(self.weight))
        rows = _lookup((tokens - start).masked_fill(outside, 0), self.weight)
        return rows.masked_fill(outside.unsqueeze(-1), 0.0).to(self.compute_dtype or rows.dtype)


def padded_vocab(vocab_size: int) -> int:
    """Rows in memory for V true rows: the next multiple of mp. Files hold true rows only."""
    return -(-vocab_size // groups.mp_size()) * groups.mp_size()


def vocab_range(vocab_size: int) -> tuple[int, int]:
    """[start, stop) of this rank's true rows. Rows beyond, up to padded_vocab(V)/mp of them, are padding."""
    rows = padded_vocab(vocab_size) // groups.mp_size()
    start = min(groups.mp_rank() * rows, vocab_size)
    return start, min(start + rows, vocab_size)
