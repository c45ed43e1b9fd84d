"""What a run's checkpoint holds beside resume/: its weights in the published layout, or the adapter.

    everything trains, or --only_save_trainable false:   consolidated.00-of-02.model.pth ...   one file per mp rank
    something is frozen:                                 adapter.safetensors + adapter.json    whole tensors, and the base's identity

Nothing is gathered. A consolidated file is laid out by one rank, and every dp rank writes its own rows where they belong; the
adapter is put together from the pieces in resume/, which has the same numbers. Padding rows of the vocabulary and (in the
adapter) copies of kv heads are not written. The functions here run in the saving threads (save.py).
"""

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor, nn

from accessory.checkpoint.adapter import base_record, by_part, place, write_adapter
from accessory.checkpoint.formats_stream import finish_torch, layout_torch
from accessory.checkpoint.formats_write import write_json
from accessory.checkpoint.pieces import Box, Piece, StateFiles, pieces, within
from accessory.model.args import ModelArgs
from accessory.parallel import groups

AT_ONCE = 2**26  # bytes cast and written in one go


class BaseIdentity:
    """Path, sizes and sha256 of the base's files, hashed on rank 0 while the run goes on; `record()` waits for the hash.

    `expected`: what the checkpoint that is continued says of its base. Raises ValueError when this is another one, at once
    by the sizes or in `record()` by the hashes."""

    def __init__(self, checkpoint: Any, expected: dict[str, Any] | None = None):
        self.error: BaseException | None = None
        self.value = base_record(checkpoint, hashes=False)
        self.expected = expected or {}
        self._compare("size")
        self.thread = threading.Thread(target=self._hash, args=(checkpoint,), daemon=True)
        if groups.rank() == 0:
            self.thread.start()

    def _hash(self, checkpoint: Any) -> None:
        try:
            self.value = base_record(checkpoint, hashes=True)
        except OSError as error:
            self.error = error

    def record(self) -> dict[str, Any]:
        """The base's path, sizes and hashes, on rank 0, which alone knows them. Raises ValueError when it is another base."""
        self.thread.join()
        if self.error is not None:
            raise self.error
        self._compare("sha256")
        return self.value

    def _compare(self, key: str) -> None:
        then, now = self.expected.get(key, {}), self.value.get(key, {})
        if then and now and by_part(then) != by_part(now):
            raise ValueError(
                f"--pretrained_path {place(self.value)} is not the base this run started from ({place(self.expected)}; the "
                f"{key} of its files differs): give that one, or start anew in another --output_dir"
            )


@dataclass
class Weights:
    """All parameters, in the dtypes of the checkpoint they came from, as consolidated files: `save.Beside`.

    `embedding_dim` 1 splits tok_embeddings over its features, as Llama 1 and 2 files do. `about`: keys for the manifest;
    `also(directory)` writes further files and returns them; both are called on rank 0."""

    model: nn.Module
    params: dict[str, Any]
    dtypes: dict[str, torch.dtype]
    embedding_dim: int
    about: Callable[[], dict[str, Any]]
    also: Callable[[Path], list[Path]]

    def file(self, directory: Path, mp_rank: int) -> Path:
        return directory / f"consolidated.{mp_rank:02d}-of-{groups.mp_size():02d}.model.pth"

    def boxes(self, held: dict[str, Piece]) -> dict[str, list[Box]]:
        """Of each parameter, the part of the whole in each mp rank's file, as far as this rank writes there."""
        mp, found = groups.mp_size(), {}
        for name, piece in held.items():
            found[name] = [piece.slice if k == groups.mp_rank() else () for k in range(mp)]
            if name == "tok_embeddings.weight" and self.embedding_dim == 1:
                (rows, columns) = piece.shape
                found[name] = [((0, rows), (k * columns // mp, (k + 1) * columns // mp)) for k in range(mp)]
        return found

    def dtype(self, name: str) -> torch.dtype:
        return self.dtypes.get(name, self.model.get_parameter(name).dtype)

    def lay_out(self, directory: Path) -> dict[str, int]:
        if groups.dp_rank() != 0:
            return {}
        here = {name: boxes[groups.mp_rank()] for name, boxes in self.boxes(pieces(self.model)).items()}
        specs = {n: (tuple(stop - start for start, stop in box), self.dtype(n)) for n, box in here.items()}
        return layout_torch(self.file(directory, groups.mp_rank()), specs)

    def write(self, directory: Path, layouts: list[Any], held: dict[str, Piece], tensors: dict[str, Tensor]) -> None:
        boxes = self.boxes(held)
        for k in range(groups.mp_size()):  # but for the embedding, this mp rank's file only
            names = [n for n, piece in held.items() if piece.written and boxes[n][k]]
            if not names:
                continue
            with open(self.file(directory, k), "r+b") as handle:
                for name in names:
                    box, piece, dtype = boxes[name][k], held[name], self.dtype(name)
                    mine = (piece.box[0], *box[1:])  # these rows, the file's columns
                    start, row = piece.box[0][0] - box[0][0], _row_bytes(box, dtype)
                    at = layouts[k][name] + start * row  # dp rank 0 of mp rank k is rank k
                    _write_rows(handle.fileno(), at, tensors[name][within(mine, piece.box)], dtype)
                os.fsync(handle.fileno())

    def complete(self, directory: Path, step: int) -> list[Path]:
        files = []
        if groups.dp_rank() == 0:
            files.append(self.file(directory, groups.mp_rank()))
            finish_torch(files[0])
        if groups.rank() == 0:
            write_json(directory / "params.json", self.params)
            files += [directory / "params.json", *self.also(directory)]
        return files


def _row_bytes(box: Box, dtype: torch.dtype) -> int:
    return torch.Size(stop - start for start, stop in box[1:]).numel() * dtype.itemsize


def _write_rows(handle: int, at: int, rows: Tensor, dtype: torch.dtype) -> None:
    """Writes a tensor's bytes in `dtype` at an offset of an open file."""
    for some in rows.split(max(1, AT_ONCE * len(rows) // max(1, rows.nbytes))):
        data = memoryview(some.to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy())
        while data:
            written = os.pwrite(handle, data, at)
            data, at = data[written:], at + written


@dataclass
class Adapter:
    """Parameters that are in resume/, whole, as an adapter directory that rank 0 writes and reads back: `save.Beside`.

    `terms`: adapter.json's keys but for the base, which `about` has; the rest as for `Weights`."""

    names: list[str]
    terms: dict[str, Any]
    params: dict[str, Any]
    about: Callable[[], dict[str, Any]]
    also: Callable[[Path], list[Path]]

    def lay_out(self, directory: Path) -> None: ...

    def write(
        self, directory: Path, layouts: list[Any], held: dict[str, Piece], tensors: dict[str, Tensor]
    ) -> None: ...

    def complete(self, directory: Path, step: int) -> list[Path]:
        if groups.rank() != 0:
            return []
        terms = self.terms | {"base": self.about()["base"]}
        state = StateFiles(directory / "resume")
        write_json(directory / "params.json", self.params)
        tensors, args = {n: state.read(n) for n in self.names}, ModelArgs.from_dict(self.params)
        written = write_adapter(directory, tensors, terms, expect_trained=step > 0, args=args)
        return [*written, directory / "params.json", *self.also(directory)]
