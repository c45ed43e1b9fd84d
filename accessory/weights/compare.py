"""Two models, tensor by tensor: which they share, whether bit for bit, and how far apart they are. Pure, one piece at a time.

Difference is of numbers in fp32: `largest` is max |a - b|, `relative` is |a - b| / |b| in the Euclidean norm. Numbers whose
bits are equal differ by 0, NaN and infinities too. Test: tests/unit/test_inspect.py
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from accessory.weights import Source
from accessory.weights.diff import bits, blocks, with_output


class Compared(NamedTuple):
    """One tensor of both models."""

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[torch.dtype, torch.dtype]
    equal: bool  # dtype and every bit
    largest: float | None  # None: of different shapes
    relative: float | None

    @property
    def same_numbers(self) -> bool:
        return self.equal or self.largest == 0


def compare(a: Source, b: Source, name: str) -> Compared:
    shapes, dtypes = (a.shape(name), b.shape(name)), (a.dtype(name), b.dtype(name))
    if shapes[0] != shapes[1]:
        return Compared(name, shapes, dtypes, False, None, None)
    equal, largest, change, size = dtypes[0] == dtypes[1], 0.0, 0.0, 0.0
    for piece in blocks(shapes[0]):
        x, y = a.read(name, *piece), b.read(name, *piece)
        if dtypes[0] == dtypes[1]:
            same = bits(x) == bits(y)
        else:
            same = x.float() == y.float()
        equal = equal and bool(same.all())
        apart = (x.float() - y.float()).masked_fill_(same, 0.0)
        # max() of a NaN is NaN, but Python's max(0.0, nan) is 0.0
        largest = torch.tensor([largest, apart.abs().max().item() if apart.numel() else 0.0]).max().item()
        change += apart.double().square().sum().item()
        size += y.double().square().sum().item()
    relative = 0.0 if change == 0 else (change / size) ** 0.5 if size else float("inf")
    return Compared(name, shapes, dtypes, equal, largest, relative)


def differences(a: Source, b: Source, each: Callable[[list[str]], Iterable[str]] = iter) -> dict[str, Any]:
    """Plain JSON: verdict, only_in_a, only_in_b, output_is_embedding_in, tensors (`folded`). A tied model without
    output.weight has its embedding there. `each` may put a progress bar around the names."""
    ours, theirs = with_output(a, set(b.names())), with_output(b, set(a.names()))
    only_a, only_b = only_in(ours, theirs), only_in(theirs, ours)
    found = [compare(ours, theirs, n) for n in each([n for n in ours.names() if n not in only_a])]
    tied = [key for key, one, other in (("a", a, ours), ("b", b, theirs)) if one is not other]
    head = {"verdict": verdict(found, only_a + only_b), "output_is_embedding_in": tied}
    return head | {"only_in_a": only_a, "only_in_b": only_b, "tensors": folded(found)}


def only_in(a: Source, b: Source) -> list[str]:
    there = set(b.names())
    return [n for n in a.names() if n not in there]


def verdict(found: Sequence[Compared], only: Iterable[str]) -> str:
    """equal: the same names, bit for bit; same numbers: but for dtypes; else different."""
    if not list(only) and all(c.equal for c in found):
        return "equal"
    return "same numbers" if not list(only) and all(c.same_numbers for c in found) else "different"


def folded(found: Iterable[Compared]) -> list[dict[str, Any]]:
    """One row per kind of tensor instead of one per layer, with the worst layer named."""
    kinds: dict[tuple, list[Compared]] = {}
    for c in found:
        kinds.setdefault((kind_of(c.name), c.shapes, c.dtypes), []).append(c)
    rows = []
    for (kind, shapes, dtypes), members in kinds.items():
        worst = max(members, key=_distance)
        rows.append(
            {
                "tensors": kind,
                "count": len(members),
                "shapes": [list(s) for s in shapes],
                "dtypes": [str(d).removeprefix("torch.") for d in dtypes],
                "equal": sum(c.equal for c in members),
                "largest": worst.largest,
                "relative": max((c.relative for c in members if c.relative is not None), default=None),
                "largest_in": worst.name,
            }
        )
    return rows


def _distance(c: Compared) -> float:
    """NaN is farthest."""
    return -1.0 if c.largest is None else float("inf") if c.largest != c.largest else c.largest


def kind_of(name: str) -> str:
    """layers.3.attention.wq.weight -> layers.*.attention.wq.weight"""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def difference_lines(report: dict[str, Any]) -> list[str]:
    """`report`: that of `differences`, with the paths a and b -> an aligned table, and the verdict last."""
    shown = [f"a  {report['a']}", f"b  {report['b']}"]
    shown += [f"{key} is tied: its output.weight is its embedding" for key in report["output_is_embedding_in"]]
    for key in ("only_in_a", "only_in_b"):
        kinds: dict[str, int] = {}
        for name in report[key]:
            kinds[kind_of(name)] = kinds.get(kind_of(name), 0) + 1
        shown += [f"{key.replace('_', ' ')}  {count} x {kind}" for kind, count in kinds.items()]
    head = ("tensors", "count", "equal", "shape", "dtype", "largest", "relative", "largest in")
    table = [head] + [_row(row) for row in report["tensors"]]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    shown += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
    return shown + [report["verdict"]]


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    shapes, dtypes = ["x".join(map(str, s)) for s in row["shapes"]], row["dtypes"]
    apart = row["largest"] is not None
    return (
        row["tensors"],
        str(row["count"]),
        "all" if row["equal"] == row["count"] else str(row["equal"]),
        shapes[0] if shapes[0] == shapes[1] else f"{shapes[0]} | {shapes[1]}",
        dtypes[0] if dtypes[0] == dtypes[1] else f"{dtypes[0]} | {dtypes[1]}",
        f"{row['largest']:.3g}" if apart else "-",
        f"{row['relative']:.3g}" if apart else "-",
        row["largest_in"] if row["largest"] else "",
    )
