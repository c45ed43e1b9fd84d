"""A difference on disk: what `tools/weight_diff.py make` writes, and how it, or Accessory's, is added to a base.

    consolidated.00-of-01.model-diff.pth   tuned - raw, Meta's names (weights/diff.py); this file alone is Accessory's format
    consolidated.corrections.safetensors   the numbers that rounding would lose, when there are any
    weight_diff.json                       format_version
                                           raw:   {tensor: sha256 of its numbers in fp32}   any format, mp or dtype of raw fits
                                           tuned: {tensor: [dtype, sha256 of its numbers]}
    params.json  tokenizer.*               tuned's

The hashes are of tensors, not of files. Test: tests/unit/test_diff.py
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.formats import DIFF_SUFFIX, Checkpoint, open_kind, recognise
from accessory.checkpoint.formats_read import SafetensorsFiles, read_json
from accessory.checkpoint.formats_stream import write_safetensors
from accessory.checkpoint.formats_write import write_json, write_meta
from accessory.weights import Source
from accessory.weights.diff import INDEX, VALUE, Difference, Sum, content_sha256, recovered, with_output

RECORD, CORRECTIONS, FORMAT_VERSION = "weight_diff.json", "consolidated.corrections.safetensors", 1
NAMED = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_CORRECTED = 0.25  # of a model's numbers: above, the two have nothing in common


def write_difference(
    directory: Path,
    tuned: Checkpoint,
    raw: Checkpoint,
    shards: int = 1,
    dtype: torch.dtype | None = None,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Writes tuned - raw into a new directory: every tensor is read twice, one piece at a time. Returns figures: tensors,
    largest (name, size), corrected, numbers."""
    if tuned.adapter or raw.adapter:
        raise ValueError(
            f"{(tuned if tuned.adapter else raw).path} has LoRA in it: merge it first: tools/merge_lora.py"
        )
    difference = Difference(tuned.source, raw.source, dtype)
    for name in tuned.source.names():
        if tuned.source.dtype(name) not in NAMED.values():
            raise ValueError(
                f"{tuned.path}: {name} is {tuned.source.dtype(name)}: take the model in bf16, fp16 or fp32"
            )
    counts: dict[str, int] = {}
    record: dict[str, Any] = {"format_version": FORMAT_VERSION, "raw": {}, "tuned": {}}
    for name in bar(tuned.source.names(), "comparing", show_progress):
        if name in difference.raw.source.names():
            record["raw"][name] = content_sha256(difference.raw.source, name)
        stored = tuned.source.dtype(name)
        record["tuned"][name] = [str(stored).removeprefix("torch."), content_sha256(tuned.source, name, stored)]
        counts[name] = len(difference.corrections(name)[0])
    total, corrected = sum(_count(tuned.source, n) for n in counts), sum(counts.values())
    if corrected > MAX_CORRECTED * total:
        raise ValueError(
            f"--tuned {tuned.path} is too far from --raw {raw.path} ({corrected} of {total} numbers cannot be told as a "
            "difference): give the model it was tuned from, or publish the model itself"
        )
    _write_corrections(directory / CORRECTIONS, difference, {n: c for n, c in counts.items() if c})
    style = "consolidated_diff"
    write_meta(directory, difference, tuned.params, tuned.tokenizer, None, shards, 0, style, show_progress)
    write_json(directory / RECORD, record)
    return {"tensors": len(counts), "numbers": total, "corrected": corrected}


def _write_corrections(file: Path, difference: Difference, counts: dict[str, int]) -> None:
    if not counts:
        return
    specs = {}
    for name, count in counts.items():
        index = torch.int64 if _count(difference, name) >= 2**31 else torch.int32
        specs |= {name + INDEX: ((count,), index), name + VALUE: ((count,), difference.tuned.dtype(name))}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in counts:
            yield from zip((name + INDEX, name + VALUE), difference.corrections(name))

    write_safetensors(file, specs, tensors())


def open_difference(path: Path, params: dict[str, Any]) -> tuple[Checkpoint, Source | None, dict[str, Any]]:
    """(the differences, their corrections, weight_diff.json; None and {} for Accessory's own). `params`: the base's."""
    kind, files = recognise(path)
    if kind != "consolidated_diff":
        raise ValueError(
            f"{path} holds {kind} weights, not differences (*{DIFF_SUFFIX}): give what weight_diff.py make wrote"
        )
    record = read_json(path / RECORD) if (path / RECORD).is_file() else {}
    if record and record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path / RECORD}: format_version {record.get('format_version')}, this version reads {FORMAT_VERSION}"
        )
    corrections = SafetensorsFiles([path / CORRECTIONS]) if (path / CORRECTIONS).is_file() else None
    return open_kind(path, kind, files, params), corrections, record


def dtypes_of(record: dict[str, Any], path: Path) -> dict[str, torch.dtype]:
    """Of tuned's tensors. Raises ValueError naming the file when it does not tell them."""
    try:
        return {name: NAMED[dtype] for name, (dtype, _) in record["tuned"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{path / RECORD}: is damaged: copy the difference again") from None


def added_to(base: Checkpoint, path: Path) -> tuple[Source, Checkpoint]:
    """(base + the differences at `path`, these): in a list of checkpoints. Accessory's own keep the base's dtype."""
    difference, corrections, record = open_difference(path, base.params)
    dtypes = dtypes_of(record, path) if record else {}
    try:
        return Sum(base.source, difference.source, dtypes, corrections, tuple(dtypes)), difference
    except ValueError as error:
        raise ValueError(f"{path}: {error}: is {base.path} what it was made from?") from None


def recover(raw: Checkpoint, path: Path, show_progress: bool = False) -> tuple[Source, Checkpoint, dict[str, Any]]:
    """(tuned, the differences, the record), once raw's numbers are found to be the ones that the difference was made from.

    Raises ValueError naming the first tensor that is not."""
    difference, corrections, record = open_difference(path, raw.params)
    if not record:
        raise ValueError(
            f"{path / RECORD}: is missing: without it nothing can be checked; open it as RAW,{path} instead"
        )
    dtypes = dtypes_of(record, path)
    source = with_output(raw.source, set(record["raw"]))
    there = set(source.names())
    for name in bar(record["raw"], "checking raw", show_progress):
        if name not in there or content_sha256(source, name) != record["raw"][name]:
            state = "holds other numbers" if name in there else "is missing"
            raise ValueError(f"--raw {raw.path} is not the model that {path} was made from: {name} {state}")
    try:
        return recovered(source, difference.source, dtypes, corrections), difference, record
    except ValueError as error:
        raise ValueError(f"--diff {path}: {error}") from None


def check_tuned(written: Source, record: dict[str, Any], path: Path, show_progress: bool = False) -> None:
    """Raises ValueError naming the first tensor of `written` that is not tuned's, bit for bit."""
    if odd := sorted(set(written.names()) ^ set(record["tuned"])):
        raise ValueError(f"--diff {path}: {odd[0]} is in only one of the recovered and the tuned model")
    for name in bar(written.names(), "checking the result", show_progress):
        dtype, expected = record["tuned"][name]
        if written.dtype(name) != NAMED[dtype] or content_sha256(written, name, NAMED[dtype]) != expected:
            raise ValueError(
                f"--diff {path}: {name} is not recovered exactly: the difference is damaged, copy it again"
            )


def bar(names: Any, text: str, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(list(names), text, unit="tensor", disable=not show)


def _count(source: Source, name: str) -> int:
    return torch.Size(source.shape(name)).numel()
