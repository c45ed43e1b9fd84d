"""fairscale's parallel layers, made ready for a model that is built empty, shares its input copies and takes any vocabulary.

    column: W [out/mp, in]   x replicated  -> y [.., out/mp]      the caller copies x once per input (`copy_to_mp`), so that
    row:    W [out, in/mp]   x [.., in/mp] -> y replicated        q, k, v together cost one all-reduce in backward, not three

Shapes: B batch, T tokens, V vocab, /mp = this rank's slice.
"""

import contextlib
from typing import Iterator

import torch
from fairscale.nn.model_parallel import layers as fairscale_layers
from fairscale.nn.model_parallel.mappings import (
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import Tensor, nn
from torch.nn import functional as F

from accessory.parallel import groups

copy_to_mp = copy_to_model_parallel_region  # forward: nothing; backward: sum over mp
reduce_from_mp = reduce_from_model_parallel_region  # forward: sum over mp; backward: nothing
gather_from_mp = (
    gather_from_model_parallel_region  # forward: concatenate the last dim over mp; backward: this rank's part
)


@contextlib.contextmanager
def _unallocated() -> Iterator[None]:
    """fairscale 0.4.13 makes the full, unsharded weight on every rank to slice it; this skips that."""
    original = fairscale_layers._initialize_affine_weight
    fairscale_layers._initialize_affine_weight = lambda *args, **kwargs: None
    try:
        yield
    finally:
        fairscale_layers._initialize_affine_weight = original


def _to_meta(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="meta")))


class ColumnParallelLinear(fairscale_layers.ColumnParallelLinear):
    """y = x W^T + b with W's rows split over mp. x: replicated and already through `copy_to_mp`. Built on the meta device."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        with _unallocated():
            super().__init__(in_features, out_features, bias=bias, gather_output=False, init_method=lambda w: w)
        _to_meta(self)

    def forward(self, x: Tensor) -> Tensor:  # (.., in) -> (.., out/mp)
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(fairscale_layers.RowParallelLinear):
    """y = sum over mp of x W^T, plus a replicated bias. x: this rank's slice of the features. Built on the meta device."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        with _unallocated():
            super().__init__(in_features, out_features, bias=bias, input_is_parallel=True, init_method=lambda w: w)
        _to_meta(self)

    def forward(self, x: Tensor) -> Tensor:  # (.., in/mp) -> (.., out)
        y = reduce_from_mp(self.partial(x))
        return y if self.bias is None else y + self.bias

    def partial(self, x: Tensor) -> Tensor:
        """This rank's addend of the product, before the sum over mp."""
        return F.linear(x, self.weight)


class VocabParallelEmbedding(fairscale_layers.VocabParallelEmbedding):
    """Row i of the table for token i, rows split over mp. Holds `padded_vocab(V)` rows; those from V on are never looked up.

    Always split on the vocabulary: a split of the features, as in Llama 1/2 files, could not be tied to the head."""

    def __init__(self, vocab_size: int, dim: int):
        with _unallocated():
            super().__init__(padded_vocab(vocab_size), dim, init_method=lambda w: w)
        _to_meta(self)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, D), replicated
        outside = (tokens < self.vocab_start_index) | (tokens >= self.vocab_end_index)
        rows = F.embedding((tokens - self.vocab_start_index).masked_fill(outside, 0), self.weight)
        return reduce_from_mp(rows.masked_fill(outside.unsqueeze(-1), 0.0))


def padded_vocab(vocab_size: int) -> int:
    """Rows in memory for V true rows: the next multiple of mp. Files hold true rows only."""
    return -(-vocab_size // groups.mp_size()) * groups.mp_size()


def vocab_range(vocab_size: int) -> tuple[int, int]:
    """[start, stop) of this rank's true rows. Rows beyond, up to padded_vocab(V)/mp of them, are padding."""
    rows = padded_vocab(vocab_size) // groups.mp_size()
    start = min(groups.mp_rank() * rows, vocab_size)
    return start, min(start + rows, vocab_size)
