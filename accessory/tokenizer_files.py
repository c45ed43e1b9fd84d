"""The files of a tokenizer, read and not yet understood: where it lies, what lies beside it and names its special tokens,
Llama 3's ranks and how its text is cut, GPT-2's alphabet of bytes.

    tokenizer.model | tokenizer.json      find
    tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json     sidecars, added_beside
    "base64-token rank" lines             read_ranks

Test: pytest tests/unit/test_tokenizer.py
"""

import base64
import importlib
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

# What may lie beside a tokenizer and name its BOS and EOS, strongest first; the model's config.json comes after them.
SIDECARS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
ADDED_FILE = "added_tokens.json"  # {token: id} of what was added after the vocabulary of a tokenizer.model
MAX_ADDED_ID = 2**24
MAX_BYTES = 2**28  # the largest known has 2**25; a checkpoint named by mistake is not read
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s")
# Llama 3's pattern, limits on what tiktoken gets at once, and names, as in llama-models 0.3.0, llama3/tokenizer.py.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_MAX_CHARS, LLAMA3_MAX_RUN = 400_000, 25_000


def find(path: Path) -> Path:
    """A file as it is; in a directory tokenizer.model, else tokenizer.json. ValueError where there is neither."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"--tokenizer_path {path}: no such file or directory")
    for name in ("tokenizer.model", "tokenizer.json"):
        if (path / name).is_file():
            return path / name
    raise ValueError(f"--tokenizer_path {path}: no tokenizer.model or tokenizer.json there: name the file itself")


def read_ranks(path: Path, raw: bytes) -> dict[bytes, int]:
    """The lines "base64 rank" of a tiktoken file. ValueError names the line that is none, or a rank that is missing."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:  # binascii.Error is one too
            if line.strip():
                raise ValueError(f"{path}:{number}: not a line 'base64-token rank': copy the file again") from None
    missing = set(range(len(ranks))) - set(ranks.values())
    if missing or not all(bytes([b]) in ranks for b in range(256)):
        what = f"rank {min(missing)}" if missing else "a single byte"
        raise ValueError(f"{path}: {what} is missing among its {len(ranks)} tokens: copy the file again")
    return ranks


def llama3_parts(text: str) -> Iterator[str]:
    """`text` cut where Meta's code cuts it, so that tiktoken's regex survives: every 400,000 characters, and inside
    those wherever a run of spaces, or of anything but spaces, is longer than 25,000."""
    for start in range(0, len(text), LLAMA3_MAX_CHARS):
        part = text[start : start + LLAMA3_MAX_CHARS]
        runs = (m.span() for m in re.finditer(r"\s+|\S+", part)) if len(part) > LLAMA3_MAX_RUN else ()
        cuts = [cut for first, stop in runs for cut in range(first + LLAMA3_MAX_RUN, stop, LLAMA3_MAX_RUN)]
        yield from (part[a:b] for a, b in pairwise([0, *cuts, len(part)]))


def byte_alphabet() -> dict[int, str]:
    """GPT-2's character for each byte: itself where it is printable in Latin-1, else the next one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (b for b in range(256) if b not in printable)
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


BYTE_TO_CHAR = byte_alphabet()
CHAR_TO_BYTE = dict.fromkeys(range(256), "\uffff") | {ord(char): chr(byte) for byte, char in BYTE_TO_CHAR.items()}


def to_byte_level(token: bytes) -> str:
    return token.decode("latin-1").translate(BYTE_TO_CHAR)


def from_byte_level(piece: str) -> bytes:
    """The bytes of a piece; of one with other characters (a special token that is in the vocabulary), its UTF-8."""
    try:
        return piece.translate(CHAR_TO_BYTE).encode("latin-1")
    except UnicodeEncodeError:
        return piece.encode()


def sidecars(path: Path) -> dict[str, Any]:
    """What the files beside a tokenizer say of special tokens, a stronger file over a weaker one, nulls left out:
    {bos,eos,pad}_token as strings, {bos,eos,pad}_token_id, add_bos_token, legacy. ValueError names a file that is no object."""
    said: dict[str, Any] = {}
    for name in ("config.json", *reversed(SIDECARS)):
        file = path.with_name(name)
        if not file.is_file():
            continue
        for key, value in read_object(file).items():
            if isinstance(value, dict) and key.endswith("_token"):
                value = value.get("content")
            if value is not None and re.fullmatch(r"(bos|eos|pad)_token(_id)?|add_bos_token|legacy", key):
                said[key] = value
    return said


def added_beside(path: Path) -> dict[str, int]:
    """{token: id} of ADDED_FILE and of tokenizer_config.json's added_tokens_decoder. ValueError names the file."""
    config, file = path.with_name(SIDECARS[0]), path.with_name(ADDED_FILE)
    decoder = (read_object(config) if config.is_file() else {}).get("added_tokens_decoder") or {}
    try:
        said = {entry["content"]: int(i) for i, entry in decoder.items() if entry.get("special", True)}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{config}: added_tokens_decoder is not {{id: {{content: token}}}}: repair it") from None
    said |= read_object(file) if file.is_file() else {}
    for token, i in said.items():
        if not token or type(i) is not int or not 0 <= i < MAX_ADDED_ID:
            raise ValueError(f"{file}: {token!r}: {i!r} is not the id of a token: repair or remove it")
    return said


def read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}): repair or remove it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not a JSON object: repair or remove it")
    return content


def id_list(value: int | list[int] | None, vocab_size: int) -> list[int]:
    """generation_config's *_token_id, one id or several, without those that the tokenizer does not have."""
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and 0 <= i < vocab_size]


def require(library: str, path: Path) -> Any:
    """The imported library; ValueError with the line that installs it where it is not there."""
    try:
        return importlib.import_module(library)
    except ImportError:
        raise ValueError(f"{path} needs the package {library}: pip install {library}") from None
