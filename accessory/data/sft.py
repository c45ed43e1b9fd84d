r"""Instruction data: records -> token ids with the prompt's length -> a training and a validation set.

    --data_config   file by file, see records.py:
        split: train --> --val_ratio of it held out --> validation set
                    \--> the rest, each `weight` times --> training set
        split: val   ---------------------------------> validation set

Tokenising is eager and happens alike on every rank: what is trained on is a pure function of the files, the tokenizer,
the flags and the seed, and `fingerprint` is its hash. Test: pytest tests/unit/test_sft.py
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import flag
from ..tokenizer import Tokenizer
from . import templates
from .records import Entry, Record, read_config, read_records

CHUNK = 128  # records that a thread tokenises at a time


@dataclass
class DataArgs:
    """Data: what is trained on, and how long an example may be."""

    data_config: str = flag("", "a YAML with a META list of {path, type, weight, split}, or one .json or .jsonl file")
    val_ratio: float = flag(
        0.0, "fraction of each training file held out for validation (at least one example if not 0)"
    )
    max_seq_len: int = flag(512, "longest example in tokens, BOS and EOS counted")
    on_long: str = flag(
        "truncate",
        "a longer example: truncate = its answer is cut before EOS (dropped where the prompt leaves no room); "
        "drop = left out and counted; error = the run stops and names it",
        choices=("truncate", "drop", "error"),
    )
    num_workers: int = flag(1, "threads that tokenise and that prepare batches ahead; 0 = none")

    def __post_init__(self) -> None:
        if not 0 <= self.val_ratio < 1:
            raise ValueError(f"--val_ratio {self.val_ratio}: a fraction of the examples, from 0 up to but without 1")
        if self.max_seq_len < 2:
            raise ValueError(f"--max_seq_len {self.max_seq_len}: at least 2, a token and the next one to learn")
        if self.num_workers < 0:
            raise ValueError(f"--num_workers {self.num_workers}: 0 or more threads")


class Example(NamedTuple):
    """One tokenised example. Labels are `ids` without the first `prompt_len`."""

    ids: np.ndarray  # (T,) int32
    prompt_len: int


class Report(NamedTuple):
    """What became of the records. The first three count records once, the last three an epoch with weights applied."""

    read: int
    truncated: int
    dropped: int
    examples: int
    tokens: int
    supervised_tokens: int  # targets after the shift: a sequence's first token is never one


class SFTDataset:
    """Examples in one flat array. Reading is thread-safe; an item is a view, not a copy.

    order[i] is the stored example that item i is: with a weight of 2 it names each of them twice."""

    def __init__(self, examples: list[Example], order: np.ndarray, fingerprint: str, counts: tuple[int, int, int]):
        self.ids = np.concatenate([e.ids for e in examples])
        self.starts = np.cumsum([0, *(len(e.ids) for e in examples)])
        self.prompt_lens = np.array([e.prompt_len for e in examples])
        self.order = order
        arrays = (self.ids, self.starts, self.prompt_lens, self.order)
        digest = hashlib.sha256(fingerprint.encode())
        for array in arrays:
            digest.update(array.astype("<i8").tobytes())
        self.fingerprint: str = digest.hexdigest()  # equal where training would see the same ids in the same places
        lengths = np.diff(self.starts)
        supervised = lengths - np.maximum(self.prompt_lens, 1)
        self.report = Report(*counts, len(order), int(lengths[order].sum()), int(supervised[order].sum()))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> Example:
        stored = self.order[i]
        return Example(self.ids[self.starts[stored] : self.starts[stored + 1]], int(self.prompt_lens[stored]))


class Part(NamedTuple):
    """The records of one file that go to one side, and how often each is seen in an epoch."""

    records: list[Record]
    split: str
    weight: float
    key: tuple[int, int]  # (seed, position of the file), for the choice that a fractional weight makes


def load_sft(
    args: DataArgs, tokenizer: Tokenizer, seed: int, show_progress: bool = False
) -> tuple[SFTDataset, SFTDataset | None]:
    """-> (training set, validation set or None where none is asked for). Same on every rank; one shows the bar.

    ValueError names the file and line of a bad record, the entry of a bad YAML, or says that nothing is left."""
    from tqdm import tqdm

    if not args.data_config:
        raise ValueError("--data_config is missing: a .json or .jsonl file of instructions, or a YAML that lists some")
    tokenizer.encode("", bos=tokenizer.add_bos, eos=True)  # says so, where the tokenizer names no EOS
    parts: list[Part] = []
    for position, entry in enumerate(read_config(Path(args.data_config).expanduser())):
        parts += split_entry(entry, read_records(entry.path), args.val_ratio, (seed, position))
    with tqdm(
        total=sum(len(p.records) for p in parts), desc="tokenise", unit=" examples", disable=not show_progress
    ) as bar:
        train = build([p for p in parts if p.split == "train"], args, tokenizer, "training", bar.update)
        held_out = [p for p in parts if p.split == "val"]
        val = build(held_out, args, tokenizer, "validation", bar.update) if held_out else None
    return train, val


def split_entry(entry: Entry, records: list[Record], val_ratio: float, key: tuple[int, int]) -> list[Part]:
    """One file's records -> its parts. What is held out is drawn from `key`, before weights: never in both parts."""
    if entry.split == "val" or not val_ratio:
        return [Part(records, entry.split, entry.weight, key)]
    count = max(1, math.floor(len(records) * val_ratio + 0.5))
    if count >= len(records):
        raise ValueError(
            f"--val_ratio {val_ratio} leaves nothing to train on of {entry.path} ({len(records)} examples)"
        )
    held_out = set(rng(*key, 0).permutation(len(records))[:count].tolist())
    train = [record for i, record in enumerate(records) if i not in held_out]
    return [Part(train, "train", entry.weight, key), Part([records[i] for i in sorted(held_out)], "val", 1.0, key)]


def build(
    parts: list[Part], args: DataArgs, tokenizer: Tokenizer, kind: str, update: Callable[[int], Any]
) -> SFTDataset:
    """Tokenises the parts of one side and applies their weights."""
    examples: list[Example] = []
    orders: list[np.ndarray] = []
    truncated = 0

    def work(chunk: list[Record]) -> list[tuple[Example | None, bool]]:
        return [tokenise(record, args, tokenizer) for record in chunk]

    for part in parts:
        first = len(examples)
        chunks = [part.records[i : i + CHUNK] for i in range(0, len(part.records), CHUNK)]
        for done in ordered_map(work, chunks, args.num_workers):
            examples += [example for example, _ in done if example is not None]
            truncated += sum(cut for _, cut in done)
            update(len(done))
        orders.append(first + weighted(len(examples) - first, part.weight, part.key))
    read = sum(len(p.records) for p in parts)
    order = np.concatenate(orders) if orders else np.zeros(0, np.int64)
    if not len(order):
        reason = f"{read} read, {read - len(examples)} dropped as longer than --max_seq_len {args.max_seq_len}"
        raise ValueError(f"--data_config {args.data_config}: no {kind} example left ({reason}): give more or longer")
    return SFTDataset(examples, order, tokenizer.fingerprint, (read, truncated, read - len(examples)))


def tokenise(record: Record, args: DataArgs, tokenizer: Tokenizer) -> tuple[Example | None, bool]:
    """-> (the example, or None where it is dropped; whether its answer was cut).

    Cutting keeps the prompt whole, as many tokens of the answer as fit (at least one, or the example is dropped), and
    EOS as the last token, so that every example that is trained on ends."""
    ids, prompt_len = templates.encode_example(tokenizer, record.prompt, record.output)
    if len(ids) <= args.max_seq_len:
        return Example(np.array(ids, np.int32), prompt_len), False
    if args.on_long == "error":
        raise ValueError(
            f"{record.where}: {len(ids)} tokens, more than --max_seq_len {args.max_seq_len}: "
            "raise it, shorten the example, or choose --on_long truncate or drop"
        )
    if args.on_long == "drop" or prompt_len + 2 > args.max_seq_len:
        return None, False
    return Example(np.array([*ids[: args.max_seq_len - 1], ids[-1]], np.int32), prompt_len), True


def weighted(n: int, weight: float, key: tuple[int, int]) -> np.ndarray:
    """The indices of n examples in an epoch: round(n * weight) of them, each floor(weight) times or once more.

    Which ones come once more is drawn from `key`, and is the same in every epoch."""
    count = math.floor(n * weight + 0.5)
    whole, rest = divmod(count, n) if n else (0, 0)
    chosen = np.sort(rng(*key, 1).permutation(n)[:rest])
    return np.concatenate([np.tile(np.arange(n), whole), chosen]).astype(np.int64)


def rng(*key: int) -> np.random.RandomState:
    """A generator for a tuple of whole numbers >= 0. RandomState's streams are frozen: numpy never changes them."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))


def ordered_map(function: Callable, items: Iterable, num_workers: int) -> Iterator:
    """map(function, items) with `num_workers` threads working ahead, at most two items each; 0 works in the caller.

    An exception comes out where its result would have. Leaving the loop early ends the threads."""
    if not num_workers:
        yield from map(function, items)
        return
    pool, ahead = ThreadPoolExecutor(num_workers), deque()
    try:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * num_workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
