"""The difference of two models, and their sum again: lazy sources, bit-exact there and back.

    raw   --ZeroExtended--> raw, with tuned's names and shapes: new vocabulary rows and new tensors are zeros
    tuned - raw             Difference: computed in fp32, stored in tuned's dtype; plus `corrections`
    raw + difference        Sum: computed in fp32, returned in tuned's dtype, corrected where rounding lost a bit

Why floats and not the difference of the bit patterns, which is exact by itself: floats mean something (their size is how
far training moved a weight), and they are what Accessory's `consolidated_diff` files hold, so a difference can also be
added by naming it after its base. In one dtype tuned - raw is exact wherever they are within a factor of two of each
other (Sterbenz), which fine-tuning leaves nearly everywhere; the few numbers for which raw + difference is not tuned, bit
for bit, are kept as they are: their index in the flattened tensor and their value. Test: tests/unit/test_diff.py
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from accessory.weights import Renamed, Source

EMBEDDING, OUTPUT = VOCABULARY = ("tok_embeddings.weight", "output.weight")  # what may have more rows in tuned
BLOCK = 2**22  # numbers that are in fp32 at a time
INDEX, VALUE = ".index", ".value"  # a tensor's corrections under its name and these


class ZeroExtended:
    """A source with the names and shapes given: what it does not have, rows or whole tensors, reads as zeros.

    Raises ValueError for a tensor that differs in more than additional rows of the vocabulary."""

    def __init__(self, source: Source, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.source, self.shapes, self._own = source, dict(shapes), set(source.names())
        for name in self.shapes:
            if name in self._own:
                check_growth(name, source.shape(name), self.shapes[name])

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(name) if name in self._own else torch.float32

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        if name in self._own and self.source.shape(name) == self.shapes[name]:
            return self.source.read(name, dim, start, stop)
        shape = list(self.shapes[name])
        stop = shape[dim] if dim is not None and stop is None else stop
        if dim is not None:
            shape[dim] = stop - start
        out = torch.zeros(shape, dtype=self.dtype(name))
        if name in self._own:
            rows = self.source.shape(name)[0]
            old = self.source.read(name, dim, *((min(start, rows), min(stop, rows)) if dim == 0 else (start, stop)))
            out[: len(old)] = old
        return out


def with_output(source: Source, wanted: set[str]) -> Source:
    """A tied source with its embedding as output.weight too, where that is wanted; files of one model differ in this."""
    if OUTPUT not in wanted or OUTPUT in source.names() or EMBEDDING not in source.names():
        return source
    return Renamed(source, {n: n for n in source.names()} | {OUTPUT: EMBEDDING})


def check_growth(name: str, old: tuple[int, ...], new: tuple[int, ...]) -> None:
    """Raises ValueError unless the shapes are equal, or `new` has more rows of the vocabulary."""
    if new != old and not (name in VOCABULARY and len(new) == len(old) == 2 and new[1] == old[1] and new[0] > old[0]):
        raise ValueError(
            f"{name} is {_x(old)} in the base and {_x(new)} in what is laid over it: they do not go together"
        )


class Difference:
    """tuned - raw, in `dtype` (None: tuned's). Raises ValueError when they are not a model and its tuned version."""

    def __init__(self, tuned: Source, raw: Source, dtype: torch.dtype | None = None) -> None:
        names = set(tuned.names())
        if missing := [n for n in raw.names() if n not in names and n != OUTPUT]:  # tuned may be tied where raw is not
            raise ValueError(f"{missing[0]} is in raw but not in tuned ({len(missing)} such tensors): not one model's")
        self.tuned, self.stored = tuned, dtype
        self.raw = ZeroExtended(with_output(raw, names), {n: tuned.shape(n) for n in tuned.names()})

    def names(self) -> list[str]:
        return self.tuned.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tuned.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.stored or self.tuned.dtype(name)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        tuned = self.tuned.read(name, dim, start, stop)
        return _in_fp32(torch.sub, tuned, _rows(self.raw, name, dim, start, stop), self.dtype(name))

    def corrections(self, name: str) -> tuple[Tensor, Tensor]:
        """(index, value): where raw + difference is not tuned bit for bit, and what tuned is there."""
        shape, found = (
            self.shape(name),
            [(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=self.tuned.dtype(name)))],
        )
        for piece in blocks(shape):
            tuned = self.tuned.read(name, *piece)
            again = _in_fp32(torch.add, self.raw.read(name, *piece), _rows(self, name, *piece), tuned.dtype)
            wrong = (
                bits(again) != bits(tuned)
            ) | tuned.isnan()  # what a sum does to NaN's payload is the processor's choice
            wrong = wrong.flatten().nonzero().squeeze(1)
            found.append((wrong + piece[1] * prod(shape[1:]), tuned.flatten()[wrong]))
        index, value = (torch.cat(parts) for parts in zip(*found))
        return index if prod(shape) >= 2**31 else index.int(), value


class Sum:
    """base + difference, in fp32, in the base's dtype or, where `dtypes` names the tensor, in that one.

    `corrections` (see Difference) are put in last. Raises ValueError for a difference to a tensor that the base has not,
    unless it is in `added`: that one is a difference to zero."""

    def __init__(
        self,
        base: Source,
        difference: Source,
        dtypes: Mapping[str, torch.dtype] | None = None,
        corrections: Source | None = None,
        added: tuple[str, ...] = (),
    ) -> None:
        self._touched = set(difference.names())
        base = with_output(base, self._touched & set(added))
        known = set(base.names())
        if unknown := sorted(self._touched - known - set(added)):
            raise ValueError(f"{unknown[0]} is added to, but is in nothing before it ({len(unknown)} such tensors)")
        self.difference, self.dtypes, self.corrections = difference, dict(dtypes or {}), corrections
        self._corrected = {n.removesuffix(INDEX) for n in corrections.names()} if corrections else set()
        shapes = {n: base.shape(n) for n in base.names()} | {n: difference.shape(n) for n in difference.names()}
        self.base = ZeroExtended(base, shapes)

    def names(self) -> list[str]:
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.dtypes.get(name, self.base.dtype(name))

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        out = self.base.read(name, dim, start, stop)
        if name not in self._touched:
            return out
        out = _in_fp32(torch.add, out, _rows(self.difference, name, dim, start, stop), self.dtype(name))
        if name in self._corrected:
            self._correct(out, name, dim, start)
        return out

    def _correct(self, out: Tensor, name: str, dim: int | None, start: int) -> None:
        """Puts the corrections of the whole tensor that lie in the slice `out` where they belong."""
        index, value = self.corrections.read(name + INDEX).long(), self.corrections.read(name + VALUE)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < prod(self.shape(name)):
            raise ValueError(f"{name}: its corrections point outside of it: the difference is damaged")
        places = list(torch.unravel_index(index, self.shape(name)))
        if dim is not None:
            places[dim] = places[dim] - start
            inside = (places[dim] >= 0) & (places[dim] < out.shape[dim])
            places, value = [p[inside] for p in places], value[inside]
        out[tuple(places)] = value.to(out.dtype)


def recovered(raw: Source, difference: Source, dtypes: Mapping[str, torch.dtype], corrections: Source | None) -> Source:
    """tuned again: `dtypes` names its tensors; what else raw has (a repeated, tied output) is left out."""
    total = Sum(raw, difference, dtypes, corrections, tuple(dtypes))
    return Renamed(total, {name: name for name in dtypes})


def _in_fp32(
    operation: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    rows_of_y: Callable[[int, int], Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """operation(x, y) rounded to `dtype`, a few rows at a time, in x's own memory where it has that dtype."""
    out = x if x.dtype == dtype else torch.empty(x.shape, dtype=dtype)
    for _, start, stop in blocks(tuple(x.shape)):
        out[start:stop] = operation(x[start:stop].float(), rows_of_y(start, stop).float())
    return out


def _rows(source: Source, name: str, dim: int | None, first: int, last: int | None) -> Callable[[int, int], Tensor]:
    """Rows of the slice [first:last) on `dim`: read when they are asked for, unless the slice is one of columns."""
    if dim in (None, 0):
        return lambda start, stop: source.read(name, 0, first + start, first + stop)
    columns = source.read(name, dim, first, last)
    return lambda start, stop: columns[start:stop]


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(0, start, stop): the rows in pieces of about BLOCK numbers."""
    step = max(1, BLOCK // max(1, prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield 0, start, min(start + step, shape[0])


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns as whole numbers, so that NaN equals itself and -0 differs from 0."""
    return tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def content_sha256(source: Source, name: str, dtype: torch.dtype = torch.float32) -> str:
    """Of a whole tensor's shape and numbers in `dtype`: the same whatever the format, the shards and the file's dtype."""
    digest = hashlib.sha256(repr(tuple(source.shape(name))).encode())
    for piece in blocks(source.shape(name)):
        block = source.read(name, *piece)
        if block.dtype != dtype:  # NaN becomes the one NaN: how its payload is converted is the processor's choice
            block = block.to(dtype)
            block[block.isnan()] = torch.nan
        digest.update(block.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
