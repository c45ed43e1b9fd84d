"""Writes one .gguf file from a lazy Source under Meta's names, a block of rows at a time, whatever the model's size.

    header, keys, tensor table   the gguf package's GGUFWriter
    data                         read, reordered, rounded or quantised, appended: at most BLOCK numbers in memory

The file appears under its name only when it is whole. What goes into it is decided in accessory/weights/gguf*.py.
Test: tests/unit/test_gguf_write.py
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.formats_write import cast, completed, sync
from accessory.model.args import ModelArgs
from accessory.weights import Overlay, Renamed, Source, TensorSource, expected_shapes, gguf, require_keys
from accessory.weights.gguf_rope import ROPE_FACTORS, rope_factors

DTYPES = ("f32", "f16", "bf16", "q8_0")
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # ggml's types that torch has
BLOCK = 2**24  # numbers read and rounded at a time: 64 MiB in fp32
Mapped = tuple[str, str, tuple[int, ...], Any]  # Meta's name, GGUF's, shape, type: for report.mapping_lines


def dtype_of(flag: str | None, source: Source) -> str:
    """--dtype f32, f16, bf16 or q8_0 (fp32 and fp16 too); None: as the embedding is stored."""
    if flag is None:
        return {dtype: kind.lower() for kind, dtype in PLAIN.items()}.get(source.dtype("tok_embeddings.weight"), "f32")
    if (dtype := {"fp32": "f32", "fp16": "f16"}.get(flag, flag)) not in DTYPES:
        raise ValueError(f"--dtype {flag}: choose one of {', '.join(DTYPES)}")
    return dtype


@contextlib.contextmanager
def new_file(dst: str | Path) -> Iterator[Path]:
    """A path that becomes `dst` only when the block ends well: until then it is `dst`.tmp-PID, which a failure removes.

    Raises ValueError when `dst` is already there or is not called .gguf."""
    dst = Path(dst).expanduser()
    if dst.suffix != ".gguf":
        raise ValueError(f"--dst {dst}: name a file that ends in .gguf")
    if dst.exists() or dst.is_symlink():
        raise ValueError(f"--dst {dst} is already there: choose another, or remove it first")
    dst.parent.mkdir(parents=True, exist_ok=True)
    file = dst.with_name(f"{dst.name}.tmp-{os.getpid()}")
    try:
        yield file
        sync(file)
        os.replace(file, dst)
        sync(dst.parent)
    finally:
        file.unlink(missing_ok=True)


def write_gguf(
    file: Path,
    source: Source,
    params: dict[str, Any],
    vocabulary: dict[str, Any],
    dtype: str,
    name: str,
    show_progress: bool = False,
) -> list[Mapped]:
    """One GGUF file of architecture llama, qwen2 or qwen3; returns what became of each tensor.

    `vocabulary`: the keys after "tokenizer.", one token per row of the embedding. `dtype`: one of DTYPES. Raises ValueError
    for weights that do not fit `params`, a model that llama.cpp has no architecture for, or a disk without room."""
    params = completed(source, params)
    args = ModelArgs.from_dict(params)
    require_keys(source, args, "the weights")
    if (count := len(vocabulary["ggml.tokens"])) != args.vocab_size:
        raise ValueError(
            f"the tokenizer has {count} tokens, but the embedding {args.vocab_size} rows: "
            "give the model's own tokenizer with --tokenizer_path"
        )
    names = {gguf.gguf_name(n): n for n in expected_shapes(args, args.tie_word_embeddings)}  # the model's order
    target = Renamed(gguf.to_gguf(Renamed(source, {n: n for n in names.values()}), args), {n: n for n in names})
    if args.rope_scaling and args.rope_scaling["rope_type"] == "llama3":
        factors = rope_factors(args.head_size, args.rope_theta, args.rope_scaling)
        target = Overlay(target, TensorSource({ROPE_FACTORS: factors}))
    kinds = {n: gguf.stored_as(n, target.shape(n), dtype) for n in target.names()}
    keys = gguf.metadata_from_args(args) | _general(name, dtype) | {f"tokenizer.{k}": v for k, v in vocabulary.items()}
    _write_header(file, target, kinds, keys)
    _append_data(file, target, kinds, show_progress)
    return [(names.get(n, n), n, target.shape(n), PLAIN.get(k, k.lower())) for n, k in kinds.items()]


def _general(name: str, dtype: str) -> dict[str, Any]:
    try:
        import gguf as library
    except ImportError:
        raise ValueError("writing GGUF needs the gguf package: pip install gguf") from None
    kind = int(getattr(library.LlamaFileType, FILE_TYPES[dtype]))
    general = {"type": "model", "name": name, "file_type": kind, "quantization_version": library.GGML_QUANT_VERSION}
    return {f"general.{k}": v for k, v in general.items()}


def _write_header(file: Path, target: Source, kinds: dict[str, str], keys: dict[str, Any]) -> None:
    """Everything before the data."""
    import gguf as library
    import numpy as np

    writer = library.GGUFWriter(file, keys["general.architecture"])
    for key, value in keys.items():
        if key != "general.architecture":  # the writer has put it in already
            _add(writer, key, value)
    for name, kind in kinds.items():
        writer.add_tensor_info(
            name,
            target.shape(name),
            np.dtype(np.float32),
            _stored_bytes(target.shape(name), kind),
            raw_dtype=library.GGMLQuantizationType[kind],
        )
    need, free = sum(_stored_bytes(target.shape(n), k) for n, k in kinds.items()), shutil.disk_usage(file.parent).free
    if need > free:
        raise ValueError(f"{file.parent}: {need / 2**20:.0f} MiB are needed, {free / 2**20:.0f} are free: make room")
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    """A key with GGUF's type of the value; an array's is that of its first element, bytes are an array of uint8."""
    if key.endswith(".precompiled_charsmap"):
        value = bytes(value)
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array", bytes: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def _stored_bytes(shape: tuple[int, ...], kind: str) -> int:
    import gguf as library

    per_block, size = library.GGML_QUANT_SIZES[library.GGMLQuantizationType[kind]]
    return torch.Size(shape).numel() // per_block * size


def _append_data(file: Path, target: Source, kinds: dict[str, str], show_progress: bool) -> None:
    import gguf as library
    from tqdm import tqdm

    pad = library.GGUF_DEFAULT_ALIGNMENT
    try:
        with (
            open(file, "ab") as out,
            tqdm(total=len(kinds), desc="writing", unit="tensor", disable=not show_progress) as bar,
        ):
            for name, kind in kinds.items():
                out.write(bytes(-out.tell() % pad))
                for rows in _blocks(target, name):
                    out.write(_stored(name, rows, kind))
                bar.update()
            out.write(bytes(-out.tell() % pad))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(f"{file}: could not be written, the disk is full: make room or choose another disk") from error


def _stored(name: str, rows: Tensor, kind: str) -> Any:
    """The bytes of some rows in ggml's type `kind`."""
    import gguf as library

    if kind in PLAIN:
        return cast(name, rows, PLAIN[kind]).view(torch.uint8).numpy().data
    return library.quants.quantize(rows.float().numpy(), library.GGMLQuantizationType[kind]).data


def _blocks(target: Source, name: str) -> Iterator[Tensor]:
    """A tensor's rows, at most BLOCK numbers at a time."""
    shape = target.shape(name)
    if len(shape) == 1:
        yield target.read(name)
        return
    step = max(1, BLOCK // shape[1])
    for row in range(0, shape[0], step):
        yield target.read(name, 0, row, min(row + step, shape[0]))
