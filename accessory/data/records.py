"""Instruction files on disk -> checked records. Whatever is wrong is one ValueError that names file and line.

    data.yaml           META: a list of {path, type, ...}     LLaMA2-Accessory's files are read as they are
    data.json           one list of records
    data.jsonl          a record a line
    data.parquet        a record a row (pip install pyarrow)
    .json.gz .jsonl.gz  the same, packed

    weight: 0.5         how often an example is seen in an epoch: half of them once; 2: each twice
    limit: 1000         the first so many records of the file
    split: val          not trained on
    format: sharegpt    insist on a format, else each record says it by its keys (formats.py)
    template: llama3    instead of --template
    system: text        the system message of dialogs that have none

Of Accessory's keys `type` only groups, `ratio` is `weight` where that is absent, `root` is where images would be,
`prompt_type: alpaca` is the only one. A relative path is looked for beside the YAML, then in the working directory.
A byte order mark, CRLF and empty lines are taken as they come. Test: pytest tests/unit/test_sft.py
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..config import unknown_name
from .dialog import Dialog, Message
from .formats import READERS, name_of, parse, shown

ENTRY_KEYS = (
    *("path", "type", "weight", "split", "limit", "format", "template", "system"),
    *("ratio", "prompt_type", "preprocess", "root"),
)
MAX_WEIGHT = 1000
TOKENS = "tokens.json"  # beside a file of whole texts: {"tokens": [...]}, the special tokens in them


class Entry(NamedTuple):
    """One data set of --data_config. `weight`: how often an example of it is seen in an epoch."""

    path: Path
    weight: float = 1.0
    split: str = "train"
    limit: int | None = None
    format: str | None = None
    template: str | None = None
    system: str | None = None


def read_config(path: Path) -> list[Entry]:
    """--data_config -> the files it names, in their order. ValueError names the file, the entry and the key."""
    import yaml

    if not path.is_file():
        raise ValueError(f"--data_config {path}: no such file")
    if kind_of(path) is not None:
        return [Entry(path)]
    text = decode_utf8(path.read_bytes(), str(path))
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{where}: not YAML ({problem}): repair the line") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())}): repair it") from None
    entries = content.get("META") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"{path}: no META list of data sets: write META: and below it - {{path: a.json, type: text}}; data itself is "
            "named .json (a list), .jsonl (a record a line) or .parquet"
        )
    return [read_entry(entry, f"{path}: META entry {i}", path.parent) for i, entry in enumerate(entries, 1)]


def read_entry(entry: Any, where: str, beside: Path) -> Entry:
    """One item of META, checked. Keys that mean nothing here may be there as long as they ask for nothing."""
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise ValueError(f"{where}: no path: write it as {{path: a.json, type: text}}")
    for key in entry:
        if key not in ENTRY_KEYS:
            raise ValueError(f"{where}: {unknown_name('key', str(key), ENTRY_KEYS)}")
    if entry.get("prompt_type") not in (None, "alpaca") or entry.get("preprocess") is not None:
        raise ValueError(f"{where}: only prompt_type alpaca without preprocess is known: remove the keys, or convert")
    split, weight = entry.get("split") or "train", entry.get("weight", entry.get("ratio", 1))
    if split not in ("train", "val"):
        raise ValueError(f"{where}: split {split!r}: choose train or val")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= MAX_WEIGHT:
        remedy = f"a number above 0, up to {MAX_WEIGHT} (0.5 = half of the examples, 2 = each twice)"
        raise ValueError(f"{where}: weight {weight!r}: {remedy}")
    if split == "val" and weight != 1:
        raise ValueError(f"{where}: weight {weight} with split val: validation sees each example once, leave it out")
    limit, format = entry.get("limit"), entry.get("format")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"{where}: limit {limit!r}: a whole number of records, 1 or more")
    if format is not None and format not in tuple(READERS):
        raise ValueError(f"{where}: {unknown_name('format', str(format), tuple(READERS))}")
    for key in ("template", "system"):
        if not isinstance(entry.get(key), str | None):
            raise ValueError(f"{where}: {key} is {name_of(entry[key])}, not text: put it in quotes")
    path = Path(os.path.expanduser(entry["path"]))
    tried = [path] if path.is_absolute() else [beside / path, path]
    for file in tried:
        if file.is_file():
            return Entry(file, float(weight), split, limit, format, entry.get("template"), entry.get("system"))
    raise ValueError(f"{where}: no such file: {' or '.join(str(file) for file in tried)}: correct the path")


def kind_of(path: Path) -> str | None:
    """json, jsonl or parquet, by the name; None: another."""
    name = path.name.lower().removesuffix(".gz")
    return next((kind for kind in ("jsonl", "json", "parquet") if name.endswith(f".{kind}")), None)


def read_dialogs(entry: Entry) -> list[Dialog]:
    """The records of an entry's file, all checked, the first `limit` of them.

    ValueError names the first bad line (.jsonl), item (.json) or row (.parquet), from 1, or says that there is none."""
    path, kind = entry.path, kind_of(entry.path)
    if kind is None:
        raise ValueError(
            f"{path}: data is .json (a list), .jsonl (a record a line) or .parquet: convert it, or rename it"
        )
    dialogs = [parse(item, where, entry.format) for item, where in islice(ITEMS[kind](path), entry.limit)]
    if not dialogs:
        raise ValueError(f"{path}: empty, not one example in it: name another file")
    return [with_system(d, entry.system) for d in dialogs] if entry.system is not None else dialogs


def with_system(dialog: Dialog, text: str) -> Dialog:
    if dialog.kind == "text" or dialog.messages[0].role == "system":
        return dialog
    return dialog._replace(messages=(Message("system", text), *dialog.messages))


def read_tokens(beside: Path) -> list[str]:
    """The special tokens in the whole texts of a file: those of TOKENS beside it, none where it is not there."""
    path = beside.with_name(TOKENS)
    if not path.is_file():
        return []
    content = parse_json(decode_utf8(path.read_bytes(), str(path)), path)
    tokens = content.get("tokens") if isinstance(content, dict) else None
    if not isinstance(tokens, list) or not all(isinstance(t, str) and t for t in tokens):
        raise ValueError(f'{path}: expected {{"tokens": ["<A>", ...]}}: repair or remove it')
    return tokens


def read_bytes(path: Path) -> bytes:
    raw = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a whole gzip file ({error}): fetch it again, or leave it out") from None
    return raw.removeprefix(b"\xef\xbb\xbf")


def read_jsonl(path: Path) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        if line.strip():
            yield parse_json(decode_utf8(line, str(path), number), path, number), f"{path}:{number}"


def read_json(path: Path) -> Iterator[tuple[Any, str]]:
    raw = read_bytes(path)
    if not raw.strip():
        return
    items = parse_json(decode_utf8(raw, str(path)), path)
    if not isinstance(items, list):
        raise ValueError(f"{path}: {name_of(items)}, not a list of records: put it in [ ], or name the file .jsonl")
    yield from ((item, f"{path}: item {number}") for number, item in enumerate(items, 1))


def read_parquet(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path} needs the package pyarrow: pip install pyarrow") from None
    try:
        rows = parquet.ParquetFile(io.BytesIO(read_bytes(path))).read().to_pylist()
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        reason = shown(" ".join(str(error).split()))
        raise ValueError(f"{path}: not a whole parquet file ({reason}): fetch it again") from None
    for number, row in enumerate(rows, 1):  # a column that a record does not have is null there
        yield {key: value for key, value in row.items() if value is not None}, f"{path}: row {number}"


def parse_json(text: str, path: Path, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        remedy = "repair or remove the line"
        if error.msg == "Extra data" and kind_of(path) == "json":
            remedy = "if each line is a record of its own, name the file .jsonl"
        where = f"{path}:{line + error.lineno - 1}"
        raise ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno}): {remedy}") from None
    except (RecursionError, ValueError):  # ValueError: a number of thousands of digits
        raise ValueError(f"{path}:{line}: JSON too deep, or with too long a number: remove the line") from None


def decode_utf8(raw: bytes, path: str, line: int = 1) -> str:
    """UTF-8 -> text; `line` is the number of the first line of `raw`. ValueError names the line that is none."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        number = line + raw[: error.start].count(b"\n")
        raise ValueError(
            f"{path}:{number}: byte 0x{raw[error.start]:02x} is not UTF-8: save the file as UTF-8"
        ) from None


ITEMS: dict[str, Callable[[Path], Iterator[tuple[Any, str]]]] = {
    "json": read_json,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
}
