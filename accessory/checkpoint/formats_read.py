"""Lazy readers, one per kind of file: names, shapes and dtypes at once, data one slice at a time, nothing trusted.

    TorchFile         consolidated.00.pth      mmap, weights_only, zip checked before it is opened
    SafetensorsFile   model.safetensors        mmap, header checked
    TorchFiles, SafetensorsFiles               several of them as one (pytorch_model-*.bin, model-*.safetensors)
    GGUFFile          model.gguf               mmap, dequantised in blocks of rows

Every `read` copies its slice out of the map, and the maps are let go after every 256 MiB read, so that going through
a 13.5 GB file holds one slice and not the file. A file that is truncated, damaged or holds code is a ValueError that
names it. Tests: tests/unit/test_formats.py
"""

import json
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from accessory.weights import owned_slice, sliced

MAPPED_LIMIT = 256 * 2**20  # bytes of mapped pages after which a file is closed and mapped anew
HEADER_LIMIT = 10 * 2**20  # of a safetensors file; real ones are below 1 MiB
GGUF_ARRAY_LIMIT = 2**22  # values in one list of a GGUF file; the largest vocabularies have 2**18 tokens
DAMAGED = "is truncated or damaged: copy or download it again"


class Mapped:
    """What files that are mapped have in common. `view` is a part of the map itself, which lasts as long as the tensor."""

    _read_bytes = 0

    def view(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        raise NotImplementedError

    def _let_go(self) -> None:
        raise NotImplementedError

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        found = self.view(name, dim, start, stop).clone(memory_format=torch.contiguous_format)
        self._count(name, dim, found)
        return found

    def read_into(self, out: Tensor, name: str, dim: int | None, start: int, stop: int | None) -> None:
        """As `read`, to memory that is there."""
        out.copy_(self.view(name, dim, start, stop))
        self._count(name, dim, out)

    def _count(self, name: str, dim: int | None, found: Tensor) -> None:
        """A slice of columns touches every page."""
        self._read_bytes += prod(self.shape(name)) * found.itemsize if dim else found.nbytes
        if self._read_bytes > MAPPED_LIMIT:
            self._let_go()
            self._read_bytes = 0


class TorchFile(Mapped):
    """One .pth file holding a dict of tensors, flat or under {"model": ...}; Accessory's `llma.` prefix is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records = check_zip(path)
        self._tensors: dict[str, Tensor] | None = self._map()
        self._meta = {name: (tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def names(self) -> list[str]:
        return list(self._meta)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._meta[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._meta[name][1]

    def view(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        if self._tensors is None:
            self._tensors = self._map()
        return sliced(self._tensors[name], dim, start, stop)

    def _let_go(self) -> None:
        self._tensors = None

    def _map(self) -> dict[str, Tensor]:
        payload = load_torch(self.path, mmap=True)
        payload = payload["model"] if isinstance(payload, dict) and isinstance(payload.get("model"), dict) else payload
        if not isinstance(payload, dict) or not payload:
            raise ValueError(f"{self.path}: holds a {type(payload).__name__}, not a dict of tensors")
        for name, tensor in payload.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise ValueError(
                    f"{self.path}: {name!r} is a {type(tensor).__name__}, but a checkpoint holds tensors only"
                )
            if not _is_plain(tensor):
                raise ValueError(
                    f"{self.path}: {name} is {tensor.dtype}, {tensor.layout}, on {tensor.device}: "
                    "a checkpoint holds plain tensors only"
                )
            if tensor.nbytes > tensor.untyped_storage().nbytes():
                raise ValueError(
                    f"{self.path}: {name} claims {tensor.nbytes} bytes, "
                    f"the file stores {tensor.untyped_storage().nbytes()}: the file is not to be trusted"
                )
        storages = {s.data_ptr(): s.nbytes() for t in payload.values() if (s := t.untyped_storage()).nbytes()}
        if odd := Counter(storages.values()) - self._records:  # a map would show the bytes of what lies behind
            raise ValueError(f"{self.path}: {DAMAGED} (stores no tensor of {min(odd)} bytes, but its pickle says so)")
        return {name.removeprefix("llma."): tensor.detach() for name, tensor in payload.items()}


def _is_plain(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, Parameter) and tensor.layout == torch.strided
    return plain and tensor.device.type == "cpu" and tensor.dtype in SAFETENSORS_DTYPES.values()


def check_zip(path: Path) -> Counter[int]:
    """Raises ValueError unless `path` is a complete zip of uncompressed entries no larger together than the file: a
    compressed one can expand a thousandfold. Returns the sizes of the tensors stored in it."""
    if not path.is_file():
        raise ValueError(f"{path}: this file of the checkpoint is missing: download it")
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        with open(path, "rb") as file:
            start = file.read(4)
        if start[:1] == b"\x80":
            raise ValueError(
                f"{path}: is in torch's format from before 1.6: load it with an old torch and save it again"
            ) from error
        known = start == b"PK\x03\x04"
        raise ValueError(f"{path}: {DAMAGED if known else 'is not a torch checkpoint (no zip): ' + DAMAGED}") from error
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
        raise ValueError(f"{path}: holds compressed entries, which torch never writes: the file is not to be trusted")
    if sum(e.file_size for e in entries) > size:
        raise ValueError(
            f"{path}: its entries claim to be larger than the file ({size} bytes): the file is not to be trusted"
        )
    return Counter(e.file_size for e in entries if re.search(r"/data/\d+$", e.filename))


def load_torch(path: Path, mmap: bool = False) -> Any:
    """torch.load that never runs code. Raises ValueError naming the file and what is wrong with it. Check the zip
    first."""
    try:
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+) (?:was not|whose)", str(error))
        what = f"{found[1]} in its pickle" if found else "its pickle is damaged or holds more than plain tensors, which"
        raise ValueError(
            f"{path}: {what} could run code when loaded, so it is refused: "
            "copy it again, or save it as a plain dict of tensors"
        ) from error
    except (
        RuntimeError,
        EOFError,
        KeyError,
        ValueError,
        TypeError,
        IndexError,
        AttributeError,
        UnicodeDecodeError,
    ) as error:
        raise ValueError(
            f"{path}: {DAMAGED} ({str(error).splitlines()[0][:120] if str(error) else type(error).__name__})"
        ) from error


class SafetensorsFile(Mapped):
    """One .safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: Any = None
        header = safetensors_header(path)
        self._meta = {n: (tuple(e["shape"]), SAFETENSORS_DTYPES[e["dtype"]]) for n, e in header.items()}

    def names(self) -> list[str]:
        return list(self._meta)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._meta[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._meta[name][1]

    def view(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        from safetensors import safe_open

        if self._handle is None:
            self._handle = safe_open(self.path, "pt")
        return sliced(
            self._handle.get_tensor(name), dim, start, stop
        )  # of the map: pages are read when they are touched

    def _let_go(self) -> None:
        self._handle = None


class Files:
    """Several files, opened, as one source. `weight_map` (the index's) says which file holds which name; without it the
    files do. Raises ValueError when two hold the same name, or one does not hold what the index says."""

    def __init__(self, parts: Iterable[TorchFile | SafetensorsFile], weight_map: dict[str, Path] | None = None) -> None:
        self._part: dict[str, TorchFile | SafetensorsFile] = {}
        for part in parts:
            for name in part.names():
                if name in self._part:
                    raise ValueError(
                        f"{part.path}: {name} is also in {self._part[name].path}: "
                        "the directory mixes files of two checkpoints"
                    )
                self._part[name] = part
        for name, path in (weight_map or {}).items():
            if name not in self._part or self._part[name].path != path:
                raise ValueError(
                    f"{path}: {name} is missing, but the index says that it is there: download the file again"
                )

    def names(self) -> list[str]:
        return list(self._part)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._part[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._part[name].dtype(name)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        return self._part[name].read(name, dim, start, stop)

    def view(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        return self._part[name].view(name, dim, start, stop)


class SafetensorsFiles(Files):
    """model-00001-of-00002.safetensors and its siblings."""

    def __init__(self, files: list[Path], weight_map: dict[str, Path] | None = None) -> None:
        super().__init__(map(SafetensorsFile, files), weight_map)


class TorchFiles(Files):
    """pytorch_model-00001-of-00002.bin and its siblings."""

    def __init__(self, files: list[Path], weight_map: dict[str, Path] | None = None) -> None:
        super().__init__(map(TorchFile, files), weight_map)


SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> {"dtype", "shape", "data_offsets"}. Raises ValueError for a missing, truncated or damaged file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path}: this file of the checkpoint is missing: download it")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(HEADER_LIMIT, path.stat().st_size - 8):
            raise ValueError(f"{path}: {DAMAGED} (its header claims {length} bytes)")
        raw = file.read(length)
    try:
        with safe_open(path, "pt"):  # the library checks offsets, overlaps and that the data is all there
            pass
        header = json.loads(raw, object_pairs_hook=_no_twice)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {DAMAGED} ({error})") from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: {name} is stored as {entry['dtype']}: take the model in bf16, fp16 or fp32")
    return header


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's members; readers differ in which of two with one name they take."""
    names = [name for name, _ in pairs]
    if twice := [n for n in names if names.count(n) > 1] if len(set(names)) < len(names) else []:
        raise ValueError(f"{twice[0]!r} is there twice")
    return dict(pairs)


class GGUFFile:
    """One .gguf file: `metadata` (key -> value) and tensors under GGUF's names, quantised ones dequantised to fp32,
    F16 and BF16 as they are. Rows are quantised one by one, so a slice of rows dequantises only those."""

    BLOCK = 2**22  # numbers dequantised at a time

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise ValueError(f"{path}: reading GGUF needs the gguf package: pip install gguf") from None
        self.path = path
        try:
            reader = _bounded_gguf_reader(path)
            self.metadata = {name: field.contents() for name, field in reader.fields.items()}
            self._tensors = {
                t.name: (tuple(int(n) for n in t.shape[::-1]), t.tensor_type, t.data_offset, t.n_bytes)
                for t in reader.tensors
            }
        except Exception as error:  # the reader runs into numpy errors of many kinds
            raise ValueError(
                f"{path}: {DAMAGED} ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            ) from error
        for name, (_, _, offset, count) in self._tensors.items():
            if offset + count > path.stat().st_size:
                raise ValueError(f"{path}: {DAMAGED} ({name} lies beyond its end)")
        native = gguf.GGMLQuantizationType
        self._native = {native.F16: torch.float16, native.BF16: torch.bfloat16}

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._native.get(self._tensors[name][1], torch.float32)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        import gguf
        import numpy as np

        shape, kind, offset, count = self._tensors[name]
        if len(shape) not in (1, 2):
            raise ValueError(f"{self.path}: {name} has {len(shape)} dimensions, which no weight of a LLaMA has")
        if len(shape) == 1 and dim == 0:
            return owned_slice(self.read(name), dim, start, stop)
        rows, columns = shape if len(shape) == 2 else (1, shape[0])
        stop = (rows if dim != 1 else columns) if stop is None else stop
        first, last = (start, stop) if dim == 0 else (0, rows)
        low, high = (start, stop) if dim == 1 else (0, columns)
        data = np.memmap(self.path, mode="r", offset=offset, shape=(rows, count // rows), dtype=np.uint8)
        out = torch.empty(last - first, high - low, dtype=self.dtype(name))
        step = max(1, self.BLOCK // columns)
        for row in range(first, last, step):
            try:
                block = gguf.quants.dequantize(np.array(data[row : min(row + step, last)]), kind)
            except NotImplementedError:
                raise ValueError(
                    f"{self.path}: {name} is stored as {kind.name}, which the gguf package cannot dequantise"
                ) from None
            out[row - first : row - first + len(block)] = torch.from_numpy(block)[:, low:high]
        return out if len(shape) == 2 else out[0]


def _bounded_gguf_reader(path: Path) -> Any:
    """The gguf package's reader, which takes what lies beyond the end of the file for nothing and would count to 2**64."""
    import gguf
    import numpy as np

    class Bounded(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **override: Any) -> Any:
            found = super()._get(offset, dtype, count, *order, **override)
            if len(found) < count:
                raise ValueError("cut short")
            return found

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == gguf.GGUFValueType.ARRAY and self._get(orig_offs + 4, np.uint64)[0] > GGUF_ARRAY_LIMIT:
                raise ValueError("a list of millions of values")
            return super()._get_field_parts(orig_offs, raw_type)

    return Bounded(path)


def file_sha256(path: str | Path) -> str:
    """The file's sha256 in hex, read in pieces."""
    import hashlib

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`. Raises ValueError naming the file (and the line) when it is none."""
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected one JSON object")
    return content
