"""Files that are laid out first and filled afterwards, so that writing one holds one tensor whatever the file's size.

    write_torch        consolidated.00.pth   the zip that torch.save makes, its records filled in place, CRC-32 put in
    write_safetensors  model.safetensors     length, JSON header, data

`specs` says what will come: name -> (shape, dtype), in the file's order. The tensors may then come in any order, each
once. Several processes fill one .pth together: one calls `offsets = layout_torch(file, specs)`, each writes its bytes at
`offsets[name]` and on, and when all have written one calls `finish_torch(file)`. Tests: tests/unit/test_writers.py
"""

import contextlib
import json
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from accessory.checkpoint.formats_read import SAFETENSORS_DTYPES, safetensors_header

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
BLOCK = 2**24  # bytes read at a time to compute a CRC


class Record(NamedTuple):
    """One stored tensor of a .pth: where its bytes are, and where its CRC-32 is written (in one or two places)."""

    offset: int
    size: int
    crc_at: tuple[int, ...]


def specs_of(tensors: Mapping[str, Tensor]) -> Specs:
    """What `write_torch` and `write_safetensors` want to know of tensors that are there already."""
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


def write_torch(file: Path, specs: Specs, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """A flat dict of tensors as torch.save writes it (torch.load reads it, mapped or not; zipfile's test passes).

    Raises ValueError with the free space when the disk is full."""
    with _disk(file):
        records = dict(zip(specs, _layout(file, specs)))
    crcs = _fill(file, specs, {name: record.offset for name, record in records.items()}, tensors)
    with _disk(file), open(file, "r+b") as handle:
        for name, crc in crcs.items():
            _put_crc(handle, records[name], crc)


def layout_torch(file: Path, specs: Specs) -> dict[str, int]:
    """Makes a .pth of its final size with zeros for data; returns where each tensor's bytes begin.

    The data is row-major without gaps, and begins at a multiple of 64. Until `finish_torch` the CRCs are wrong, which
    torch.load does not mind and zipfile does. Called by one process."""
    with _disk(file):
        return {name: record.offset for name, record in zip(specs, _layout(file, specs))}


def finish_torch(file: Path) -> None:
    """Reads a filled .pth once and puts the CRC-32 of each tensor in. Called by one process, after all have written."""
    with _disk(file), open(file, "r+b") as handle:
        for record in _records(file):
            handle.seek(record.offset)
            crc = 0
            for start in range(0, record.size, BLOCK):
                crc = zlib.crc32(handle.read(min(BLOCK, record.size - start)), crc)
            _put_crc(handle, record, crc)


def write_safetensors(
    file: Path, specs: Specs, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> None:
    """A .safetensors file, checked with the library when it is written. Raises ValueError when the disk is full.

    Wider dtypes come first, so that every tensor begins at a multiple of its item size, as the library does it.
    Format: https://github.com/huggingface/safetensors#format"""
    dtypes = {dtype: word for word, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, dict] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offsets, end = {}, 0
    for name, (shape, dtype) in sorted(specs.items(), key=lambda item: -item[1][1].itemsize):
        offsets[name], end = end, end + _nbytes(shape, dtype)
        header[name] = {"dtype": dtypes[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with _disk(file), open(file, "wb") as handle:
        handle.write(len(raw).to_bytes(8, "little") + raw)
        handle.truncate(8 + len(raw) + end)
    _fill(file, specs, {name: 8 + len(raw) + offset for name, offset in offsets.items()}, tensors, crc=False)
    assert safetensors_header(file).keys() == specs.keys(), f"{file}: its header is not what was written"


def _layout(file: Path, specs: Specs) -> list[Record]:
    # Storages whose memory is never touched: the pages exist only by name. skip_data writes a hole for each.
    blank = {
        name: torch.empty(0, dtype=dtype).set_(torch.UntypedStorage(_nbytes(shape, dtype)), 0, shape)
        for name, (shape, dtype) in specs.items()
    }
    with torch.serialization.skip_data():
        torch.save(blank, file)
    records = _records(file)
    assert [r.size for r in records] == [_nbytes(*spec) for spec in specs.values()], f"{file}: records out of order"
    return records


def _records(file: Path) -> list[Record]:
    """The tensors of a .pth in the order of their numbers, which is the order of the dict."""
    with zipfile.ZipFile(file) as archive:
        entries, at = archive.infolist(), archive.start_dir
    found = {}
    with open(file, "rb") as handle:
        for entry in entries:
            handle.seek(entry.header_offset + 26)  # lengths of name and extra field in the local header
            offset = entry.header_offset + 30 + sum(struct.unpack("<2H", handle.read(4)))
            streamed = bool(entry.flag_bits & 8)  # then the CRC stands behind the data, not before it
            local = offset + entry.file_size + 4 if streamed else entry.header_offset + 14
            if match := re.search(r"/data/(\d+)$", entry.filename):
                found[int(match[1])] = Record(offset, entry.file_size, (at + 16, local) if entry.file_size else ())
            handle.seek(at + 28)
            at += 46 + sum(struct.unpack("<3H", handle.read(6)))  # to the next entry of the central directory
    return [found[number] for number in sorted(found)]


def _put_crc(handle, record: Record, crc: int) -> None:
    for at in record.crc_at:
        handle.seek(at)
        handle.write(struct.pack("<I", crc))


def _fill(
    file: Path, specs: Specs, offsets: Mapping[str, int], tensors: Iterable[tuple[str, Tensor]], crc: bool = True
) -> dict[str, int]:
    """Writes each tensor at its offset; returns their CRC-32 (0 without `crc`, for a format that keeps none)."""
    crcs: dict[str, int] = {}
    with open(file, "r+b", buffering=0) as handle:
        for name, tensor in tensors:  # outside of _disk: what goes wrong in reading is not this file's trouble
            shape, dtype = specs[name]
            assert name not in crcs and (tuple(tensor.shape), tensor.dtype) == (tuple(shape), dtype), (
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, announced was {tuple(shape)} {dtype}"
            )
            data = _bytes(tensor)
            crcs[name] = zlib.crc32(data) if crc else 0
            with _disk(file):
                _write_at(handle, offsets[name], data)
            del tensor, data  # before the next one is read
    assert crcs.keys() == specs.keys(), f"{file}: {sorted(specs.keys() - crcs.keys())[:3]} never came"
    return crcs


def _write_at(handle, offset: int, data: np.ndarray) -> None:
    handle.seek(offset)
    view = memoryview(data)
    while view:  # one call writes at most 2 GiB
        view = view[handle.write(view) :]


def _bytes(tensor: Tensor) -> np.ndarray:
    """The tensor's bytes in row-major order, copied only when it is not contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return prod(shape) * dtype.itemsize


@contextlib.contextmanager
def _disk(file: Path) -> Iterator[None]:
    """Turns what a full disk raises in the block into a ValueError with the free space."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError
        if isinstance(error, RuntimeError) and not re.search("PytorchStreamWriter failed|unexpected pos", str(error)):
            raise
        raise not_written(file, error) from error


def not_written(file: Path, error: Exception) -> ValueError:
    """One line that names the file, the free space and the system's reason."""
    free, why = shutil.disk_usage(file.parent).free / 2**20, str(error).splitlines()[0]
    return ValueError(
        f"{file}: could not be written, {free:.0f} MiB are free ({why}): make room or choose another disk"
    )
