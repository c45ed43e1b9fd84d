"""The token store: a corpus as one array of ids that is mapped, not read, so that opening it costs the same at any size.

    DIR/meta.json       version, dtype, counts, tokenizer, settings of the build, sources, size and sha256 of the files
    DIR/tokens.bin      every document's ids, one after the other: uint16 below 65536 tokens of vocabulary, else uint32
    DIR/documents.bin   int64: where each document ends in tokens.bin, so document i is tokens[ends[i-1] : ends[i]]
    DIR/bad_lines.txt   file:line and reason of what was left out (absent when nothing was)

All little-endian. numpy only: no torch. Written by corpus.py. Test: pytest tests/unit/test_store.py
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 1
FORMAT = "accessory token store"
META, TOKENS, ENDS = "meta.json", "tokens.bin", "documents.bin"
REBUILD = "build it again with tools/build_corpus.py"
AGAIN = f"copy the store again, or {REBUILD}"


def token_dtype(vocab_size: int) -> np.dtype:
    """What ids below vocab_size are stored in."""
    return np.dtype("<u2" if vocab_size < 2**16 else "<u4")


class Store:
    """An opened store. Reading is thread-safe; slices are views of the file.

    tokens   (N,) uint16 or uint32
    ends     (D,) int64, not decreasing, ends[-1] == N
    meta     meta.json"""

    def __init__(self, directory: Path, meta: dict[str, Any], tokens: np.ndarray, ends: np.ndarray):
        self.directory, self.meta, self.tokens, self.ends = directory, meta, tokens, ends

    @staticmethod
    def open(directory: str | Path) -> "Store":
        """Maps the files of a store. Their sizes are held against meta.json, their content is not read (see verify).

        ValueError names the store and what is wrong with it: none, of another version, cut off."""
        directory = Path(directory)
        meta = read_meta(directory)
        tokens = mapped(directory, TOKENS, np.dtype(meta["dtype"]), meta["tokens"])
        ends = mapped(directory, ENDS, np.dtype("<i8"), meta["documents"])
        if not len(ends) or ends[-1] != len(tokens):
            raise ValueError(f"{directory / ENDS}: does not end where {TOKENS} does: {AGAIN}")
        return Store(directory, meta, tokens, ends)

    def __len__(self) -> int:
        return len(self.ends)

    def document(self, i: int) -> np.ndarray:
        """The ids of document i, a view."""
        return self.tokens[self.ends[i - 1] if i else 0 : self.ends[i]]

    def ends_between(self, start: int, stop: int) -> np.ndarray:
        """The document ends e with start < e < stop: where a slice of the stream has to be cut. A binary search."""
        first = np.searchsorted(self.ends, np.int64(start), side="right")
        last = np.searchsorted(self.ends, np.int64(stop), side="left")
        return self.ends[first:last]

    def require(self, tokenizer: Any) -> None:
        """ValueError unless the store was built with this tokenizer."""
        built = self.meta["tokenizer"]
        if built["fingerprint"] != tokenizer.fingerprint:
            raise ValueError(
                f"{self.directory}: built with another tokenizer ({built['name']}, {built['vocab_size']} tokens) than "
                f"{tokenizer.path} ({tokenizer.vocab_size}): name that one with --tokenizer_path, or {REBUILD}"
            )

    def verify(self) -> None:
        """Reads everything and compares the hashes. ValueError names the file that was changed."""
        for name, known in self.meta["files"].items():
            if not (self.directory / name).is_file() or sha256(self.directory / name) != known["sha256"]:
                raise ValueError(
                    f"{self.directory / name}: not what was built, its sha256 differs: copy the store again"
                )

    @property
    def fingerprint(self) -> str:
        """What the ids and their documents are, from the hashes in meta.json."""
        return "".join(self.meta["files"][name]["sha256"] for name in (TOKENS, ENDS))


def read_meta(directory: Path) -> dict[str, Any]:
    """meta.json of a finished store, of a version that is known."""
    if not (directory / META).is_file():
        unfinished = directory.with_name(directory.name + ".part")
        if unfinished.is_dir():
            raise ValueError(f"{directory}: only begun ({unfinished}): run the same tools/build_corpus.py to finish it")
        raise ValueError(f"{directory}: no token store, {META} is missing: build one with tools/build_corpus.py")
    try:
        meta = json.loads((directory / META).read_bytes())
        found = meta["format"], meta["version"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{directory / META}: not the description of a token store: {REBUILD}") from None
    if found != (FORMAT, VERSION):
        raise ValueError(f"{directory}: {found[0]}, version {found[1]}; this program reads {VERSION}: {REBUILD}")
    if not (directory / TOKENS).is_file() and TOKENS not in meta["files"]:
        raise ValueError(f"{directory}: TFRecord files, no token store: give them to tools/build_corpus.py as --src")
    return meta


def mapped(directory: Path, name: str, dtype: np.dtype, count: int) -> np.ndarray:
    """A file as a read-only array, if it has the size that it should have."""
    file, expected = directory / name, count * dtype.itemsize
    size = file.stat().st_size if file.is_file() else 0
    if size != expected:
        word = "is missing" if not file.is_file() else f"has {size:,} of {expected:,} bytes"
        raise ValueError(f"{file} {word}, the store is incomplete: copy it again, or {REBUILD}")
    return np.asarray(np.memmap(file, dtype, "r", shape=(count,))) if count else np.zeros(0, dtype)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
