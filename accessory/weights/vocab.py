"""A model with a larger vocabulary: more rows of tok_embeddings and output, everything else as it is, lazily.

    rows      [0, old)      bit for bit the source's
              [old, new)    new: normal | mean | pieces, in fp32, then rounded to the source's dtype
              [new, ...)    spare rows that the source has beyond both, as they are

old and new are the sizes of the two tokenizers. An embedding that was padded to a round number loses its spare rows to
the new tokens first, since nothing has been learned in them.

    normal    N(0, 0.02): Hugging Face's resize_token_embeddings up to 4.45, Chinese-LLaMA-Alpaca, MiniMA
    mean      the mean of the old rows, column by column: Stanford Alpaca's smart_tokenizer_and_embedding_resize
    pieces    each new token the mean of the rows that the old tokenizer cut its text into

A new row depends on (seed, name, row) alone, so that every slice, on rows or columns, is the same at any number of
shards. The old table is read in chunks, never whole. Test: pytest tests/unit/test_expand.py
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from accessory.weights import Source

TABLES = ("tok_embeddings.weight", "output.weight")
INITS = ("normal", "mean", "pieces")
STD = 0.02
CHUNK = 2048  # rows held at a time


class Expanded:
    """`source` with at least `new` rows in its tables, those in [old, new) new.

    `pieces[i]`: the old ids that row old + i is the mean of, for init "pieces"; none there: the mean of all. Raises
    ValueError for an unknown init, and where the source has too few rows for `old`."""

    def __init__(
        self,
        source: Source,
        old: int,
        new: int,
        init: str = "normal",
        seed: int = 0,
        pieces: Sequence[Sequence[int]] = (),
    ) -> None:
        if init not in INITS:
            raise ValueError(f"--init {init}: choose one of {', '.join(INITS)}")
        self.source, self.old, self.new, self.init, self.seed = source, old, new, init, seed
        self.pieces = [sorted(ids) for ids in pieces]
        self._means: dict[str, Tensor] = {}
        assert old <= new and (init != "pieces" or len(self.pieces) == new - old), (len(self.pieces), old, new)
        for name in self.tables():
            have = source.shape(name)[0]
            if have < old:
                raise ValueError(
                    f"{name} has {have} rows, but the tokenizer it was trained with {old} tokens: they do not belong "
                    "together, name the right one with --old_tokenizer_path"
                )
        self.rows = max([new, *(source.shape(name)[0] for name in self.tables())])

    def tables(self) -> list[str]:
        return [name for name in TABLES if name in self.source.names()]

    def names(self) -> list[str]:
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.source.shape(name)
        return (self.rows, *shape[1:]) if name in TABLES else shape

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(name)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        if name not in TABLES:
            return self.source.read(name, dim, start, stop)
        first, last = (start, self.rows if stop is None else stop) if dim == 0 else (0, self.rows)
        columns = (start, self.shape(name)[1] if stop is None else stop) if dim == 1 else (0, self.shape(name)[1])
        assert 0 <= first <= last <= self.rows, (name, first, last, self.rows)
        out = torch.empty(last - first, columns[1] - columns[0], dtype=self.dtype(name))
        for a, b, make in self._parts(name, first, last):
            out[a - first : b - first] = make(name, a, b, columns)
        return out

    def _parts(self, name: str, first: int, last: int) -> Iterator[tuple[int, int, Callable[..., Tensor]]]:
        """(start, stop, what makes those rows) over [first, last), CHUNK rows at most."""
        for start, stop, make in (
            (0, self.old, self._old),
            (self.old, self.new, self._new),
            (self.new, self.rows, self._old),
        ):
            start, stop = max(start, first), min(stop, last)
            yield from ((a, min(a + CHUNK, stop), make) for a in range(start, stop, CHUNK))

    def _old(self, name: str, first: int, last: int, columns: tuple[int, int]) -> Tensor:
        return self.source.read(name, 0, first, last)[:, columns[0] : columns[1]]

    def _new(self, name: str, first: int, last: int, columns: tuple[int, int]) -> Tensor:
        """Rows [first, last) of the new ones, fp32."""
        if self.init == "normal":
            return torch.stack([self._drawn(name, row)[columns[0] : columns[1]] for row in range(first, last)])
        new = self._mean(name)[columns[0] : columns[1]].repeat(last - first, 1)
        if self.init == "pieces":
            self._average(name, first, new, columns)
        return new

    def _drawn(self, name: str, row: int) -> Tensor:
        key = hashlib.sha256(f"{self.seed} {name} {row}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
        return torch.empty(self.shape(name)[1]).normal_(0, STD, generator=generator)

    def _mean(self, name: str) -> Tensor:
        """The mean of the old rows, summed in fp64, so that the order does not show."""
        if name not in self._means:
            total = torch.zeros(self.shape(name)[1], dtype=torch.float64)
            for a in range(0, self.old, CHUNK):
                total += self.source.read(name, 0, a, min(a + CHUNK, self.old)).double().sum(0)
            self._means[name] = (total / self.old).float()
        return self._means[name]

    def _average(self, name: str, first: int, new: Tensor, columns: tuple[int, int]) -> None:
        """Overwrites the rows of `new` that have pieces with the mean of those; one pass over the old rows needed."""
        wanted = [
            (old, i) for i, ids in enumerate(self.pieces[first - self.old : first - self.old + len(new)]) for old in ids
        ]
        if not wanted:
            return
        old, at = torch.tensor(sorted(wanted)).T
        counts = torch.bincount(at, minlength=len(new))[:, None]
        total = torch.zeros(new.shape, dtype=torch.float64)
        for a in range(0, self.old, CHUNK):
            here = (old >= a) & (old < a + CHUNK)
            if here.any():
                chunk = self._old(name, a, min(a + CHUNK, self.old), columns)
                total.index_add_(0, at[here], chunk[old[here] - a].double())
        new.copy_(torch.where(counts > 0, (total / counts.clamp(min=1)).float(), new))
