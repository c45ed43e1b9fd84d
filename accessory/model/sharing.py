"""Attention over sequences that begin with the same tokens, where the row has those once (data/sharing.py).

    the row     p p p | a a | b b b         bounds 0 3 5 8, after -1 0 0
    spread      p p p a a | p p p b b b     q, k and v of whole sequences, as ordinary attention takes them
    gathered    p p p | a a | b b b         of its results; p's from the first sequence, they are alike in all

Backward, k and v of p get the sum over the sequences. What q of p's further copies gave was not used, so q gets the first's.
All indices are made on the host, once a batch: no GPU is waited for, and sums have one order. Proof: tests/unit/test_sharing.py.
Shapes: T tokens of the row, W of the whole sequences, R tokens of the row that are in n of these each.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from accessory.parallel import groups


class Repeated(NamedTuple):
    """The tokens that are in equally many whole sequences."""

    rows: Tensor  # (R,) in the row
    copies: Tensor  # (n R,) in the whole sequences: all of them once, then once more, ..
    times: int  # n


class Spread:
    """From the row to the whole sequences and back."""

    def __init__(self, bounds: list[int], after: list[int], device: torch.device):
        """`after`: of each sequence of the row, the one that its tokens come after, -1 for none. Raises ValueError where that
        one is not earlier in the row."""
        own = [torch.arange(a, b) for a, b in zip(bounds, bounds[1:])]  # places in the row
        places: list[list[Tensor]] = [[] for _ in after]  # and, once each time, in the whole sequences
        rows: list[Tensor] = []
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
                start, end = end, end + len(own[part])
                places[part].append(torch.arange(start, end))
                rows.append(own[part])
            self.bounds.append(end)
        first = torch.cat([there[0] for there in places])
        self.rows = groups.sent(torch.cat(rows), device)  # (W,): of whole sequences' tokens, the places in the row
        self.first = groups.sent(first, device)  # (T,): of the row's tokens, where they first are in whole sequences
        self.repeated = []
        for times in sorted({len(there) for there in places} - {1}):
            alike = [i for i, there in enumerate(places) if len(there) == times]
            copies = torch.cat([torch.stack(places[i]) for i in alike], 1).flatten()
            of_row = torch.cat([own[i] for i in alike])
            self.repeated.append(Repeated(groups.sent(of_row, device), groups.sent(copies, device), times))

    def queries(self, q: Tensor) -> Tensor:
        """(1, T, H, Dh) -> (1, W, H, Dh), of whose results only `gathered` may be used."""
        return _Spread.apply(q, self, False)

    def keys(self, x: Tensor) -> Tensor:
        """Keys or values, (1, T, K, Dh) -> (1, W, K, Dh)."""
        return _Spread.apply(x, self, True)

    def gathered(self, y: Tensor) -> Tensor:
        """(1, W, ..) -> (1, T, ..)"""
        return y.index_select(1, self.first)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spread: Spread, sums: bool) -> Tensor:
        ctx.spread, ctx.sums = spread, sums
        return x.index_select(1, spread.rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.index_select(1, ctx.spread.first)
        for rows, copies, times in ctx.spread.repeated if ctx.sums else ():
            each = gradient.index_select(1, copies).unflatten(1, (times, -1))
            total.index_copy_(1, rows, each.sum(1))  # in fp32 inside, of 16 bit too
        return total, None, None
