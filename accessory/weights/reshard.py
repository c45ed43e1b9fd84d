"""Shards of m ranks -> whole tensors -> shards of n ranks, one slice at a time; neither m nor n need divide the other.

    file 0 |=====|           whole |===============|          rank 0 |=======|
    file 1 |=====|   Merged ------>                  split -> rank 1 |=======|
    file 2 |=====|                    (never built)

`Merged` answers a slice of the whole tensor from the files that overlap it, so any rank count reads any file count.
On which dim a weight is split stands beside the model (`shard_dim`); three things only files can tell, by their shapes:

  tok_embeddings  columns = dim / m (Llama 1, 2, Code Llama) or rows = part of the vocabulary (Llama 3)
  output          uneven rows: 49953 over 2 files is 24976 + 24977
  wk, wv          stored m / n_kv_heads times over when m > n_kv_heads (neighbours share a head)

Test: tests/unit/test_reshard.py
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from accessory.model import shard_dim
from accessory.model.args import ModelArgs, check_model_parallel
from accessory.weights import Source, read_into, view

EMBEDDING = "tok_embeddings.weight"


def _read(source: Source, *part: Any) -> Tensor:
    return source.read(*part)


class Merged:
    """The shards of one checkpoint, in rank order, as one Source of whole tensors.

    `files` names them in messages. `params` (params.json's keys) is needed to recognise repeated kv heads. Raises
    ValueError, naming the tensor and the file, when the shards do not belong together."""

    def __init__(self, shards: Sequence[Source], params: dict[str, Any], files: Sequence[object]) -> None:
        assert shards and len(shards) == len(files)
        self.shards, self.files = list(shards), [str(f) for f in files]
        self._check_names()
        self._unknown = {n for n in self.names() if not _is_known(n)}  # left for the strict check to report
        self.embedding_dim = self._embedding_split(params)
        self._repeats = {name: self._kv_repeats(name, params) for name in self.shards[0].names()}
        for name in self.names():
            if name not in self._unknown:
                self._check_shapes(name)

    def names(self) -> list[str]:
        return self.shards[0].names()

    def dtype(self, name: str) -> torch.dtype:
        return self.shards[0].dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        shape, dim = list(self.shards[0].shape(name)), self._dim(name)
        if dim is not None:
            shape[dim] = sum(size for _, size in self._pieces(name))
        return tuple(shape)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        return self._whole(_read, name, dim, start, stop)

    def view(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """Of one file, where that has all of it, as a rank's of so many ranks has; what several files hold together has to be
        copied."""
        return self._whole(view, name, dim, start, stop)

    def _whole(self, of_one: Callable[..., Tensor], name: str, dim: int | None, start: int, stop: int | None) -> Tensor:
        """`of_one` is `_read` or `view`."""
        split_on = self._dim(name)
        if split_on is None or len(self.shards) == 1:
            self._check_copies(name, self.shards)
            return of_one(self.shards[0], name, dim, start, stop)
        if self._repeats[name] > 1:
            self._check_repeats(name)
        shape = list(self.shape(name))
        if dim is not None:
            stop = shape[dim] if stop is None else stop
            assert 0 <= start <= stop <= shape[dim], f"slice [{start}:{stop}) of {name} {shape} on dim {dim}"
            shape[dim] = stop - start
        if dim != split_on:  # whole on the files' dim: a part of every file
            return self._gather(of_one, name, shape, split_on, 0, None, dim, start, stop)
        return self._gather(of_one, name, shape, split_on, start, stop, None, 0, None)

    def _gather(
        self,
        of_one: Callable[..., Tensor],
        name: str,
        shape: list[int],
        split_on: int,
        first: int,
        last: int | None,
        dim: int | None,
        start: int,
        stop: int | None,
    ) -> Tensor:
        """[first:last) of the whole on the files' dim; on `dim` of each file [start:stop)."""
        out, at, offset = torch.empty(shape, dtype=self.dtype(name)), 0, 0
        last = self.shape(name)[split_on] if last is None else last
        for shard, size in self._pieces(name):
            low, high = max(first - offset, 0), min(last - offset, size)
            if low < high:
                part = (dim, start, stop) if dim is not None else (split_on, low, high)
                if at == 0 and high - low == last - first:
                    return of_one(shard, name, *part)
                read_into(out.narrow(split_on, at, high - low), shard, name, *part)
                at += high - low
            offset += size
        assert at == last - first, f"{name}: gathered {at} of {last - first}"
        return out

    def _dim(self, name: str) -> int | None:
        if name in self._unknown:
            return None
        return self.embedding_dim if name == EMBEDDING else shard_dim(name)

    def _pieces(self, name: str) -> list[tuple[Source, int]]:
        """The shards that hold distinct parts of `name`, in order, with their sizes on its dim."""
        dim = self._dim(name)
        assert dim is not None
        return [(s, s.shape(name)[dim]) for s in self.shards[:: self._repeats[name]]]

    def _embedding_split(self, params: dict[str, Any]) -> int | None:
        """0 or 1: the dim on which the files split tok_embeddings; None for one file, or without an embedding."""
        if len(self.shards) == 1 or EMBEDDING not in self.shards[0].names():
            return None
        first = self.shards[0]
        norms = [
            n for n in first.names() if n.endswith(("attention_norm.weight", "ffn_norm.weight")) or n == "norm.weight"
        ]
        dim = first.shape(norms[0])[0] if norms else params.get("dim", 4096)
        columns = [s.shape(EMBEDDING)[1] for s in self.shards]
        if all(c == dim for c in columns):
            return 0
        if sum(columns) == dim:
            return 1
        raise ValueError(
            f"{self.files[0]}: {EMBEDDING} has {columns} columns in {len(columns)} shards, neither dim {dim} in each "
            f"nor {dim} together: a shard is missing, or one of another checkpoint is in the directory"
        )

    def _kv_repeats(self, name: str, params: dict[str, Any]) -> int:
        """How many neighbouring shards hold the same rows of a wk or wv tensor; 1 for everything else."""
        module = name.split(".attention.")[-1].split(".")[0]
        kv = params.get("n_kv_heads") or params.get("n_heads")
        if module not in ("wk", "wv") or not kv or self._dim(name) != 0 or len(self.shards) <= kv:
            return 1
        head = params.get("head_dim") or params.get("dim", 4096) // params.get("n_heads", 32)
        rows, repeats = sum(s.shape(name)[0] for s in self.shards), len(self.shards) // kv
        return repeats if rows == repeats * kv * head else 1

    def _check_names(self) -> None:
        first = set(self.shards[0].names())
        for shard, file in zip(self.shards[1:], self.files[1:]):
            if odd := sorted(first ^ set(shard.names())):
                has, lacks = (self.files[0], file) if odd[0] in first else (file, self.files[0])
                raise ValueError(
                    f"{lacks}: {odd[0]} is missing, but {has} has it ({len(odd)} such keys): "
                    "the files are not shards of one checkpoint"
                )

    def _check_shapes(self, name: str) -> None:
        """Everything but the split dim, and the dtype, must agree."""
        dim, first = self._dim(name), self.shards[0]
        if dim is not None and dim >= len(first.shape(name)):
            raise ValueError(
                f"{self.files[0]}: {name} has shape {first.shape(name)}, expected one that can be split on dim {dim}"
            )

        def rest(shard: Source) -> tuple:
            return shard.dtype(name), *(s for i, s in enumerate(shard.shape(name)) if i != dim)

        for shard, file in zip(self.shards[1:], self.files[1:]):
            if rest(shard) != rest(first):
                raise ValueError(
                    f"{file}: {name} is {shard.shape(name)} {shard.dtype(name)}, which does not go with "
                    f"{first.shape(name)} {first.dtype(name)} in {self.files[0]}: not shards of one checkpoint"
                )

    def _check_copies(self, name: str, shards: Sequence[Source]) -> None:
        """Raises ValueError unless all `shards` hold the same bits of `name`."""
        if len(shards) == 1:
            return
        first = _bits(shards[0].read(name))
        for shard in shards[1:]:
            if not torch.equal(first, _bits(shard.read(name))):
                file, other = (self.files[self.shards.index(s)] for s in (shard, shards[0]))
                raise ValueError(
                    f"{file}: {name} differs from {other}, but both must hold the same copy: "
                    "the files are not shards of one checkpoint, or one is damaged"
                )

    def _check_repeats(self, name: str) -> None:
        for i in range(0, len(self.shards), self._repeats[name]):
            self._check_copies(name, self.shards[i : i + self._repeats[name]])


def _is_known(name: str) -> bool:
    try:
        shard_dim(name)
    except ValueError:
        return False
    return True


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, so that NaN equals itself and -0 differs from 0."""
    return tensor.contiguous().flatten().view(torch.uint8)


def shard_range(
    name: str, shape: Sequence[int], args: ModelArgs, size: int, rank: int, embedding_dim: int = 0
) -> tuple[int | None, int, int | None]:
    """(dim, start, stop): which slice of a whole tensor of `shape` goes into file `rank` of `size`; dim None: all of
    it.

    The vocabulary may be uneven: floor(V / size) rows each and the rest in the last file, as published files have
    it."""
    dim = embedding_dim if name == EMBEDDING else shard_dim(name)
    if dim is None:
        return None, 0, None
    total, module = shape[dim], name.split(".attention.")[-1].split(".")[0]
    if module in ("wk", "wv") and dim == 0 and size > args.kv_heads:
        rank, size = rank // (size // args.kv_heads), args.kv_heads
    part = total // size
    if total % size and not (dim == 0 and name in (EMBEDDING, "output.weight")):
        raise ValueError(
            f"{name} has {total} {'rows' if dim == 0 else 'columns'}, which {size} shards cannot share evenly"
        )
    return dim, rank * part, total if rank == size - 1 else (rank + 1) * part


def split(source: Source, args: ModelArgs, mp: int, rank: int, embedding_dim: int = 0) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of shard `rank` of `mp`, as files hold them. Raises ValueError when `mp` is not allowed for
    `args`."""
    check_model_parallel(args, mp)
    for name in source.names():
        yield name, source.read(name, *shard_range(name, source.shape(name), args, mp, rank, embedding_dim))


def split_shapes(
    source: Source, args: ModelArgs, mp: int, rank: int, embedding_dim: int = 0
) -> dict[str, tuple[int, ...]]:
    """What `split` will yield, in its order: name -> shape. Reads nothing; raises as `split` does."""
    check_model_parallel(args, mp)
    shapes = {}
    for name in source.names():
        shape = list(source.shape(name))
        dim, start, stop = shard_range(name, shape, args, mp, rank, embedding_dim)
        if dim is not None:
            shape[dim] = (shape[dim] if stop is None else stop) - start
        shapes[name] = tuple(shape)
    return shapes
