"""What a process does to a unit of text: read its documents, tokenise them. Started by corpus.py, once a process.

    Unit --READERS--> texts, bad lines --Encoder--> Encoded: all ids in one array, and where documents end in it

The ids of a document are tokenizer.encode's, whatever its length and whatever is tokenised beside it. No torch.
Test: pytest tests/unit/test_corpus.py
"""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import numpy as np

from ..config import flag
from ..tokenizer import Tokenizer
from . import store
from .readers import Unit, cut
from .words import open_words

LONG = 2**17  # bytes of text that are tokenised at once
SHORT = 2**13  # the same for a tokenizer.json: that library's time for a byte grows with the text


@dataclass
class CorpusArgs:
    """A build: what is read, how it is tokenised, what is written."""

    src: list[str] = flag([], "files, directories or - (standard input)")
    dst: str = flag("", "directory of the store")
    tokenizer_path: str = flag("", "tokenizer.model or tokenizer.json, or a directory with one")
    num_processes: int | None = flag(None, "processes that tokenise; 1: this one; none: one a core")
    input_format: str = flag("auto", "how files are read", choices=("auto", "txt", "jsonl", "parquet", "tfrecord"))
    field: str = flag("text", "where a record of .jsonl, .parquet, .tfrecord has its text")
    documents: str = flag("file", "what a document of a .txt is", choices=("file", "lines"))
    append_eos: bool = flag(True, "EOS after each document")
    prepend_bos: bool = flag(False, "BOS before each document")
    blocks: str = flag("none", "cut now, as other programs do", choices=("none", "cla", "minima"))
    block_size: int | None = flag(None, "tokens of a block, with --blocks")
    format: str = flag("store", "what is written", choices=("store", "tfrecord"))
    max_bad_lines: int = flag(1000, "stop at more unreadable lines than that")
    max_bad_share: float = flag(0.01, "stop when more than this share of the lines is unreadable")
    unit_bytes: int = flag(2**21, "text that a process gets at a time")

    def __post_init__(self) -> None:
        for name in ("src", "dst", "tokenizer_path"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing: --help shows what this tool takes")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} {getattr(self, name)}: choose one of {', '.join(allowed)}")
        if (self.blocks == "none") != (self.block_size is None) or (self.block_size or 2) < 2:
            raise ValueError(
                f"--blocks {self.blocks} --block_size {self.block_size}: give both (2 or more tokens) or none"
            )
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"--num_processes {self.num_processes}: 1 or more")
        if self.max_bad_lines < 0 or not 0 <= self.max_bad_share <= 1:
            raise ValueError("--max_bad_lines is a number from 0, --max_bad_share a share from 0 to 1")


CHOICES = {name: f.metadata["choices"] for name, f in CorpusArgs.__dataclass_fields__.items() if f.metadata["choices"]}


class Encoded(NamedTuple):
    """One unit, tokenised."""

    tokens: np.ndarray  # (n,) in the store's dtype
    ends: np.ndarray  # int64, where documents end in `tokens`
    lines: int
    bad: list[tuple[int, str]]  # (line of the unit from 0, reason)


class Encoder:
    """Units -> ids. One in every process."""

    def __init__(self, args: CorpusArgs):
        self.args, self.tokenizer = args, Tokenizer.open(args.tokenizer_path)
        self.joins = joins_of(self.tokenizer)
        self.piece = min(LONG, SHORT) if self.tokenizer.kind == "hf" else LONG
        t, cla = self.tokenizer, args.blocks == "cla"
        self.head = [t._required(t.bos_id, "BOS")] if args.prepend_bos or cla else []
        self.tail = [t._required(t.eos_id, "EOS")] if args.append_eos or args.blocks == "minima" else []
        if args.blocks == "minima":
            self.tail.append(t._required(t.bos_id, "BOS"))
        self.dtype = np.dtype(store.token_dtype(t.vocab_size))
        self.words = open_words(t, self.dtype)

    def __call__(self, unit: Unit) -> Encoded:
        if unit.kind == "ids":
            return self.ready_ids(unit.payload)
        texts, lines, bad = READERS[unit.kind](unit.payload, self.args)
        flat, ends = self.flat(texts, first=unit.first or unit.kind != "text")
        if unit.kind == "text" and unit.last:
            flat = np.concatenate([flat, np.array(self.tail, self.dtype)])
            ends = [len(flat)]
        if self.args.blocks == "cla":
            flat, ends = cla_blocks(flat, self.args.block_size)
        return Encoded(flat, np.array(ends, np.int64), lines, bad)

    def flat(self, texts: list[str | tuple[str]], first: bool) -> tuple[np.ndarray, list[int]]:
        """All ids in one array, and where documents end. A text in a tuple is part of a document: no end is set."""
        parts: list[bytes] = []
        ends: list[int] = []
        size, last = 0, 0
        head, tail = self.packed(self.head), self.packed(self.tail)
        for text, ids in self.batched(texts, first):
            whole = not isinstance(text, tuple)
            parts += (head if whole or first else b"", ids, tail if whole else b"")
            size += sum(map(len, parts[-3:]))
            if whole and size > last:
                last = size
                ends.append(size // self.dtype.itemsize)
        return np.frombuffer(b"".join(parts), self.dtype), ends

    def packed(self, ids: list[int]) -> bytes:
        return np.array(ids, self.dtype).tobytes()

    def batched(self, texts: list, first: bool) -> Iterator[tuple[Any, bytes]]:
        """(text, its ids as bytes) in order, short texts many at a time."""
        if self.words is not None:
            for text in texts:
                part = isinstance(text, tuple)
                yield text, self.words.encode(text[0] if part else text, first or not part)
            return
        batch: list[str] = []
        size = 0
        for text in texts:
            part = isinstance(text, tuple)
            if part or len(text) > self.piece // 4:
                yield from zip(batch, map(self.packed, encode_batch(self.tokenizer, batch)))
                batch, size = [], 0
                yield text, self.packed(self.long(text[0] if part else text, first or not part))
                continue
            batch.append(text)
            size += len(text)
            if size > LONG:
                yield from zip(batch, map(self.packed, encode_batch(self.tokenizer, batch)))
                batch, size = [], 0
        yield from zip(batch, map(self.packed, encode_batch(self.tokenizer, batch)))

    def long(self, text: str, first: bool) -> list[int]:
        """The ids of a text of any length; not `first`: as it goes on after earlier text."""
        data, parts = text.encode(), []
        while data:
            place, size = None, self.piece
            while place is None and size < len(data):
                place, size = cut(data[:size], self.joins), 2 * size
            place = place or len(data)
            parts.append(data[:place].decode())
            data = data[place:]
        if not self.tokenizer._adds_space:  # a text goes on as it begins
            return [i for ids in encode_batch(self.tokenizer, parts) for i in ids]
        head = self.tokenizer.encode(parts[0]) if parts and first else []
        return head + [i for part in parts[first:] for i in self.tokenizer.encode_continuation(part)]

    def ready_ids(self, rows: list[np.ndarray]) -> Encoded:
        """Rows of a TFRecord: as they are, EOS and all."""
        bad, good = [], []
        for number, row in enumerate(rows):
            wrong = len(row) and (row.min() < 0 or row.max() >= self.tokenizer.vocab_size)
            if wrong:
                bad.append((number, f"id {row.min() if row.min() < 0 else row.max()} is none of the tokenizer's"))
            elif len(row):
                good.append(row.astype(self.dtype))
        tokens = np.concatenate([np.zeros(0, self.dtype), *good])
        return Encoded(tokens, np.cumsum([len(r) for r in good], dtype=np.int64), len(rows), bad)


def encode_batch(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """[tokenizer.encode(t) for t in texts], with the libraries' own loop and without their threads."""
    if not texts:
        return []
    if tokenizer.kind == "sentencepiece":
        return tokenizer.model.encode(texts, num_threads=1)
    if tokenizer.kind == "hf":
        return [e.ids for e in tokenizer.model.encode_batch_fast(texts, add_special_tokens=False)]
    return [tokenizer.encode(text) for text in texts]


def joins_of(tokenizer: Tokenizer) -> Callable[[str, str], bool]:
    """(left, right) -> whether their ids one after the other are the ids of left + right."""

    def joins(left: str, right: str) -> bool:
        return tokenizer.encode(left) + tokenizer.encode_continuation(right) == tokenizer.encode(left + right)

    return joins


def read_text(payload: bytes, args: CorpusArgs) -> tuple[list, int, list]:
    """A part of a document -> ([(text,)], lines, bad). Lines that are no UTF-8 are left out of it."""
    lines, bad = payload.count(b"\n"), []
    try:
        return [(payload.decode(),)], lines, bad
    except UnicodeDecodeError:
        kept = []
        for number, line in enumerate(payload.split(b"\n")):
            try:
                kept.append(line.decode())
            except UnicodeDecodeError as error:
                bad.append((number, not_utf8(error)))
        return [("\n".join(kept),)], lines, bad


def read_lines(payload: bytes, args: CorpusArgs) -> tuple[list[str], int, list]:
    texts: list[str] = []
    bad = []
    lines = payload.removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines):
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            bad.append((number, not_utf8(error)))
            continue
        if args.blocks == "cla" or text.strip():
            texts.append(text)
    return texts, len(lines), bad


def read_jsonl(payload: bytes, args: CorpusArgs) -> tuple[list[str], int, list]:
    texts: list[str] = []
    bad = []
    lines = payload.removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
            text = record[args.field]
            if b"\\u" in line:
                text.encode()  # half of a surrogate pair is no character
            if not isinstance(text, str):
                raise TypeError
            texts.append(text)
        except UnicodeDecodeError as error:
            bad.append((number, not_utf8(error)))
        except UnicodeEncodeError:
            bad.append((number, f'"{args.field}" holds half of a surrogate pair'))
        except ValueError as error:
            bad.append((number, f"not JSON ({error})"))
        except (KeyError, TypeError, AttributeError, RecursionError):
            bad.append((number, f'not a record with text in "{args.field}"'))
    return texts, len(lines), bad


def read_texts(payload: list[str | None], args: CorpusArgs) -> tuple[list[str], int, list]:
    bad = [(number, f'no text in "{args.field}"') for number, text in enumerate(payload) if text is None]
    return [text for text in payload if text is not None], len(payload), bad


READERS = {"text": read_text, "lines": read_lines, "jsonl": read_jsonl, "texts": read_texts}


def not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} is not UTF-8"


def cla_blocks(flat: np.ndarray, size: int) -> tuple[np.ndarray, list[int]]:
    """Chinese-LLaMA-Alpaca's grouping of one batch of lines: whole blocks, the rest dropped; fewer ids than a block are
    one short block."""
    total = len(flat) // size * size or len(flat)
    return flat[:total], [*range(size, total + 1, size)] or ([total] if total else [])


_encoder: Encoder | None = None


def start_worker(args: CorpusArgs) -> None:
    """In a new process: opens the tokenizer, and sees to it that the process ends when its parent does."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's own switch: its threads would share our cores

    def leave_with_parent() -> None:
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    _encoder = Encoder(args)


def work(unit: Unit) -> Encoded:
    return _encoder(unit)
