"""Attention over sequences that begin with the same tokens, where the row has those once (data/sharing.py).

    the row     p p p | a a | b b b         bounds 0 3 5 8, after -1 0 0
    spread      p p p a a | p p p b b b     q, k and v of whole sequences, as ordinary attention takes them
    gathered    p p p | a a | b b b         of its results; p's from the first sequence, they are alike in all

Backward, k and v of p get the sum over the sequences, in fp32; p's results of the others were not used, so theirs is zero.
All indices are made on the host, once a batch: no GPU is waited for, and sums have one order. Proof: tests/unit/test_sharing.py.
Shapes: T tokens of the row, W of the whole sequences, n sequences that begin with P tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from accessory.parallel import groups


class Beginning(NamedTuple):
    start: int  # in the row
    length: int
    copies: Tensor  # (n P,) where it is in the whole sequences, one copy after the other


class Spread:
    """From the row to the whole sequences and back."""

    def __init__(self, bounds: list[int], after: list[int], device: torch.device):
        """`after`: of each sequence of the row, the one that its tokens come after, -1 for none. Raises ValueError where that
        one is not earlier in the row."""
        rows: list[Tensor] = []
        places: list[list[Tensor]] = [[] for _ in after]  # of each sequence of the row, in the whole ones
        self.bounds, begins = [0], set(after)
        for i, before in enumerate(after):
            if not -1 <= before < i:
                raise ValueError(f"sequence {i} of a packed row cannot come after {before}, but after an earlier one")
            if i in begins:
                continue  # not the end of a whole sequence
            parts = [i]
            while (before := after[parts[0]]) >= 0:
                parts.insert(0, before)
            end = self.bounds[-1]
            for part in parts:
                start, end = end, end + bounds[part + 1] - bounds[part]
                places[part].append(torch.arange(start, end))
                rows.append(torch.arange(bounds[part], bounds[part + 1]))
            self.bounds.append(end)
        first = torch.cat([there[0] for there in places])
        self.rows = groups.sent(torch.cat(rows), device)  # (W,): of whole sequences' tokens, the places in the row
        self.first = groups.sent(first, device)  # (T,): of the row's tokens, where they first are in whole sequences
        self.beginnings = [
            Beginning(bounds[i], bounds[i + 1] - bounds[i], groups.sent(torch.cat(places[i]), device))
            for i in sorted(begins - {-1})
        ]

    def spread(self, x: Tensor) -> Tensor:
        """(1, T, ..) -> (1, W, ..)"""
        return _Spread.apply(x, self)

    def gathered(self, y: Tensor) -> Tensor:
        """(1, W, ..) -> (1, T, ..)"""
        return y.index_select(1, self.first)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spread: Spread) -> Tensor:
        ctx.spread = spread
        return x.index_select(1, spread.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.index_select(1, ctx.spread.first)
        for start, length, copies in ctx.spread.beginnings:
            of_each = gradient.index_select(1, copies).unflatten(1, (-1, length))
            total[:, start : start + length] = of_each.sum(1, dtype=torch.float32)
        return total, None
