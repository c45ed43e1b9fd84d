"""Instruction files on disk -> checked records. Whatever is wrong is one ValueError that names file and line.

    data.yaml           META: a list of {path, type, weight?, split?}     LLaMA2-Accessory's files are read as they are
    data.json           one list of records
    data.jsonl          a record a line
    record              {"instruction": text, "input"?: text or null, "output": text}; other keys are left alone

Of Accessory's keys `type` only groups, `ratio` is `weight` where that is absent, `root` is where images would be,
`prompt_type: alpaca` is the only one. A relative path is looked for beside the YAML, then in the working directory.
A byte order mark, CRLF and empty lines are taken as they come. Test: pytest tests/unit/test_sft.py
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..config import unknown_name
from . import templates

ENTRY_KEYS = ("path", "type", "weight", "split", "ratio", "prompt_type", "preprocess", "root")
JSON_NAMES = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}


class Record(NamedTuple):
    """One example in words."""

    where: str  # for messages: "data.jsonl:17"
    prompt: str
    output: str


class Entry(NamedTuple):
    """One data set of --data_config. `weight`: how often an example of it is seen in an epoch."""

    path: Path
    weight: float
    split: str


def read_config(path: Path) -> list[Entry]:
    """--data_config -> the files it names, in their order. ValueError names the file, the entry and the key."""
    import yaml

    if not path.is_file():
        raise ValueError(f"--data_config {path}: no such file")
    if path.suffix.lower() in (".json", ".jsonl"):
        return [Entry(path, 1.0, "train")]
    try:
        content = yaml.safe_load(decode_utf8(path.read_bytes(), str(path)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{where}: not YAML ({problem}): repair the line") from None
    entries = content.get("META") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: no META list of data sets: write META: and below it - {{path: a.json, type: text}}")
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
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise ValueError(f"{where}: weight {weight!r}: a number above 0 (0.5 = half of the examples, 2 = each twice)")
    if split == "val" and weight != 1:
        raise ValueError(f"{where}: weight {weight} with split val: validation sees each example once, leave it out")
    path = Path(entry["path"]).expanduser()
    tried = [path] if path.is_absolute() else [beside / path, path]
    for file in tried:
        if file.is_file():
            return Entry(file, float(weight), split)
    raise ValueError(f"{where}: no such file: {' or '.join(str(file) for file in tried)}: correct the path")


def read_records(path: Path) -> list[Record]:
    """A .json or .jsonl file, checked whole.

    ValueError names the first bad line (.jsonl) or item (.json, from 1), or says that the file holds no example."""
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    readers = {".json": read_json, ".jsonl": read_jsonl}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: data is .json (a list) or .jsonl (a record a line): convert it, or rename it")
    records = list(readers[path.suffix.lower()](path, raw))
    if not records:
        raise ValueError(f"{path}: empty, not one example in it: name another file")
    return records


def read_jsonl(path: Path, raw: bytes) -> Iterator[Record]:
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield check(parse_json(decode_utf8(line, str(path), number), path, number), where)


def read_json(path: Path, raw: bytes) -> Iterator[Record]:
    if not raw.strip():
        return
    items = parse_json(decode_utf8(raw, str(path)), path)
    if not isinstance(items, list):
        raise ValueError(f"{path}: {name_of(items)}, not a list of records: put it in [ ], or name the file .jsonl")
    for number, item in enumerate(items, 1):
        yield check(item, f"{path}: item {number}")


def parse_json(text: str, path: Path, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        remedy = "repair or remove the line"
        if error.msg == "Extra data" and path.suffix.lower() == ".json":
            remedy = "if each line is a record of its own, name the file .jsonl"
        where = f"{path}:{line + error.lineno - 1}"
        raise ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno}): {remedy}") from None


def decode_utf8(raw: bytes, path: str, line: int = 1) -> str:
    """UTF-8 -> text; `line` is the number of the first line of `raw`. ValueError names the line that is none."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        number = line + raw[: error.start].count(b"\n")
        raise ValueError(
            f"{path}:{number}: byte 0x{raw[error.start]:02x} is not UTF-8: save the file as UTF-8"
        ) from None


def check(item: Any, where: str) -> Record:
    """One parsed record -> its prompt and output. ValueError says what is missing or of the wrong type."""
    if not isinstance(item, dict):
        raise ValueError(f'{where}: {name_of(item)}, not a record: write {{"instruction": ..., "output": ...}}')
    for key in ("instruction", "input", "output"):
        value = item.get(key)
        if key == "input" and value is None:
            continue
        if key not in item:
            keys = ", ".join(map(str, item)) or "none"
            raise ValueError(f'{where}: "{key}" is missing (keys there: {keys}): a record needs instruction and output')
        if not isinstance(value, str):
            raise ValueError(f'{where}: "{key}" is {name_of(value)}, not text: put it in quotes')
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f'{where}: "{key}" holds half of a surrogate pair: write the character itself')
    if item.get("image"):
        raise ValueError(f"{where}: it has an image, and only text is trained on: remove such records")
    return Record(where, templates.prompt(item["instruction"], item.get("input") or ""), item["output"])


def name_of(value: Any) -> str:
    return JSON_NAMES.get(type(value), "null")
