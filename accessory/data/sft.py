r"""Instruction data: records -> token ids with labels -> a training and a validation set.

    --data_config   file by file, see records.py:
        split: train --> --val_ratio of it held out --> validation set
                    \--> the rest, each `weight` times --> training set (--packing best_fit: several examples an item)
        split: val   ---------------------------------> validation set

    record --formats.py--> dialog --templates.py, dialog.py--> ids, and the spans of them that are learnt

Tokenising is eager and happens alike on every rank: what is trained on is a pure function of the files, the tokenizer,
the flags and the seed, and `fingerprint` is its hash. Test: pytest tests/unit/test_sft.py
"""

import hashlib
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import flag
from ..tokenizer import Tokenizer
from . import carried
from .dialog import TOKENIZE, TRAIN_ON, Dialog, Encoded, Encoder, Rules, Template, encode_dialog
from .packing import packs_of
from .records import Entry, read_config, read_dialogs, read_tokens
from .templates import open_template

CHUNK = 128  # records that a thread tokenises at a time


@dataclass
class DataArgs:
    """Data: what is trained on, and how long an example may be."""

    data_config: str = flag(
        "", "a YAML with a META list of {path, type, weight, split, ...}, or one .json, .jsonl or .parquet file"
    )
    val_ratio: float = flag(
        0.0, "fraction of each training file held out for validation (at least one example if not 0)"
    )
    template: str | None = flag(
        None,
        "words around a dialog: alpaca, cla1, cla2, llama2-chat, llama3, chatml, vicuna, minichat, zephyr, accessory, none; "
        "checkpoint = the chat_template beside the tokenizer; or a .jinja file. none given: alpaca for instructions, none "
        "for prompt and completion, checkpoint for dialogs",
    )
    template_date: str | None = flag(
        None, "the date that a chat_template is told, YYYY-MM-DD; none: 2024-07-26, always"
    )
    train_on: str = flag(
        "all",
        "what is learnt: all = every answer and its end; last = the last answer; flagged = as `train` of each message says; "
        "text = everything; pads = everything, and EOS up to max_seq_len (as fixed-length collators do, for comparison)",
        choices=TRAIN_ON,
    )
    tokenize: str | None = flag(
        None, "prompt and answer tokenised as one text, or each by itself; none: as the template does", choices=TOKENIZE
    )
    max_seq_len: int = flag(512, "longest example in tokens, BOS and EOS counted")
    on_long: str = flag(
        "truncate",
        "a longer example: truncate = its oldest turns are left out, then its answer is cut before EOS (dropped where the "
        "prompt leaves no room); drop = left out and counted; error = the run stops and names it",
        choices=("truncate", "drop", "error"),
    )
    packing: str = flag(
        "none",
        "best_fit: an item is as many examples as fit into max_seq_len tokens, each a sequence of its own; batch_size "
        "counts items",
        choices=("none", "best_fit"),
    )
    num_workers: int = flag(1, "threads that tokenise and that prepare batches ahead; 0 = none")
    preview: int = flag(0, "print so many training items, what is learnt of them in colour, and stop")

    def __post_init__(self) -> None:
        if not 0 <= self.val_ratio < 1:
            raise ValueError(f"--val_ratio {self.val_ratio}: a fraction of the examples, from 0 up to but without 1")
        if self.max_seq_len < 2:
            raise ValueError(f"--max_seq_len {self.max_seq_len}: at least 2, a token and the next one to learn")
        if self.num_workers < 0:
            raise ValueError(f"--num_workers {self.num_workers}: 0 or more threads")
        if self.preview < 0:
            raise ValueError(f"--preview {self.preview}: 0 or more items")

    @property
    def rules(self) -> Rules:
        return Rules(self.train_on, self.tokenize, self.max_seq_len, self.on_long)


class Example(NamedTuple):
    """One tokenised sequence. What is learnt of it: `ids` without the first `prompt_len`, or, with `spans`, those only."""

    ids: np.ndarray  # (T,) int32
    prompt_len: int  # ids before the first one that is learnt
    spans: np.ndarray | None = (
        None  # (n, 2) int32: [start, stop) of what is learnt, in order; None: all from prompt_len
    )

    def learnt(self) -> np.ndarray:
        """(T,) bool: the targets. A sequence's first token is never one."""
        places = np.arange(len(self.ids))
        if self.spans is None:
            return places >= max(self.prompt_len, 1)
        edges = np.searchsorted(self.spans.reshape(-1), places, side="right")
        return (edges % 2 == 1) & (places > 0)


class Report(NamedTuple):
    """What became of the records. The first four count records once, the others an epoch with weights applied."""

    read: int
    truncated: int  # turns or a part of the answer left out
    dropped: int  # as too long
    unlabelled: int  # dropped as well: nothing in it to learn
    examples: int
    tokens: int
    supervised_tokens: int  # targets after the shift: a sequence's first token is never one
    packs: int  # items, where several examples are one; else 0


class SFTDataset:
    """Examples in one flat array. Reading is thread-safe; an item is a view, not a copy.

    order[i] is the stored example at place i of an epoch: with a weight of 2 it is there twice. An item is the example at
    a place, or with `packs`, (places of each item), the list of those at its places. `template`: see carried.py."""

    def __init__(
        self,
        examples: Sequence[Example],
        order: np.ndarray,
        fingerprint: str,
        counts: tuple[int, int, int, int],
        packs: list[list[int]] | None = None,
        template: dict[str, Any] | None = None,
    ):
        self.ids = np.concatenate([e.ids for e in examples])
        self.starts = np.cumsum([0, *(len(e.ids) for e in examples)])
        spans = [e.spans if e.spans is not None else [[min(e.prompt_len, len(e.ids)), len(e.ids)]] for e in examples]
        self.spans = np.concatenate([np.asarray(s, np.int32).reshape(-1, 2) for s in spans])
        self.span_starts = np.cumsum([0, *map(len, spans)])
        self.order, self.packs, self.template = order, packs, template
        arrays = [self.ids, self.starts, self.spans, self.span_starts, order]
        if packs is not None:
            arrays += [np.array([place for pack in packs for place in pack]), np.array([len(pack) for pack in packs])]
        digest = hashlib.sha256(fingerprint.encode())
        for array in arrays:
            digest.update(array.astype("<i8").tobytes())
        self.fingerprint: str = digest.hexdigest()  # equal where training would see the same ids in the same places
        lengths = np.diff(self.starts)
        supervised = np.array([e.learnt().sum() for e in examples])
        totals = (len(order), int(lengths[order].sum()), int(supervised[order].sum()))
        self.report = Report(*counts, *totals, len(packs or ()))

    def __len__(self) -> int:
        return len(self.order) if self.packs is None else len(self.packs)

    def __getitem__(self, i: int) -> Example | list[Example]:
        return self.at(i) if self.packs is None else [self.at(place) for place in self.packs[i]]

    def at(self, place: int) -> Example:
        """The example at a place of an epoch."""
        stored = self.order[place]
        ids = self.ids[self.starts[stored] : self.starts[stored + 1]]
        spans = self.spans[self.span_starts[stored] : self.span_starts[stored + 1]]
        whole = len(spans) == 1 and spans[0, 1] == len(ids)
        return Example(ids, int(spans[0, 0]), None if whole else spans)

    def longest(self, count: int) -> list[int]:
        """Tokens of the `count` longest items, or of all where there are fewer."""
        lengths = np.diff(self.starts)[self.order]
        if self.packs is not None:
            lengths = np.array([lengths[pack].sum() for pack in self.packs])
        return np.sort(lengths)[::-1][:count].tolist()


class Part(NamedTuple):
    """The records of one file that go to one side, and how often each is seen in an epoch."""

    records: list[Dialog]
    split: str
    weight: float
    key: tuple[int, int]  # (seed, position of the file), for the choice that a fractional weight makes
    template_of: Callable[[str], Template]  # the format of a record -> its template


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
    held_out_of: dict[Path, set[int]] = {}
    for position, entry in enumerate(read_config(Path(args.data_config).expanduser())):
        dialogs = read_dialogs(entry)
        part = Part(dialogs, entry.split, entry.weight, (seed, position), templates_of(entry, dialogs, args, tokenizer))
        parts += split_part(part, args.val_ratio, entry.path, held_out_of)
    with tqdm(
        total=sum(len(p.records) for p in parts), desc="tokenise", unit=" examples", disable=not show_progress
    ) as bar:
        train = build([p for p in parts if p.split == "train"], args, tokenizer, "training", bar.update)
        held_out = [p for p in parts if p.split == "val"]
        val = build(held_out, args, tokenizer, "validation", bar.update) if held_out else None
    return train, val


def templates_of(
    entry: Entry, dialogs: list[Dialog], args: DataArgs, tokenizer: Tokenizer
) -> Callable[[str], Template]:
    """The templates of the formats that are in a file. ValueError names the first record of one that has none."""
    first = {dialog.kind: dialog.where for dialog in reversed(dialogs)}
    found: dict[str, Template] = {}
    for kind, where in first.items():
        specials = read_tokens(entry.path) if kind == "text" else ()
        name = entry.template or args.template
        try:
            found[kind] = open_template(name, tokenizer, kind, specials, args.template_date or "")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return found.__getitem__


def split_part(part: Part, val_ratio: float, path: Path, held_out_of: dict[Path, set[int]]) -> list[Part]:
    """One file's records -> its parts. What is held out is drawn from its key, before weights: never in both parts. A file
    that was there before, with another template for instance, has the same held out: `held_out_of`, which is added to."""
    records = part.records
    if part.split == "val" or not val_ratio:
        return [part]
    count = max(1, math.floor(len(records) * val_ratio + 0.5))
    if count >= len(records):
        raise ValueError(f"--val_ratio {val_ratio} leaves nothing to train on of {path} ({len(records)} examples)")
    drawn = set(rng(*part.key, 0).permutation(len(records))[:count].tolist())
    held_out = held_out_of.setdefault(path.resolve(), drawn)
    train = [record for i, record in enumerate(records) if i not in held_out]
    val = [record for i, record in enumerate(records) if i in held_out]
    return [part._replace(records=train), part._replace(records=val, split="val", weight=1.0)]


def build(
    parts: list[Part], args: DataArgs, tokenizer: Tokenizer, kind: str, update: Callable[[int], Any]
) -> SFTDataset:
    """Tokenises the parts of one side, applies their weights and, in training, packs."""
    examples: list[Example] = []
    templates: list[Template] = []  # of each example
    orders: list[np.ndarray] = []
    outcomes: Counter[str] = Counter()
    encoder, rules = Encoder(tokenizer), args.rules
    for part in parts:
        first = len(examples)

        def work(chunk: list[Dialog], part: Part = part) -> list[tuple[Example | None, str, Template]]:
            worded = [(d, part.template_of(d.kind)) for d in chunk]
            return [(*outcome(encode_dialog(d, template, encoder, rules)), template) for d, template in worded]

        chunks = [part.records[i : i + CHUNK] for i in range(0, len(part.records), CHUNK)]
        for done in ordered_map(work, chunks, args.num_workers):
            examples += [example for example, _, _ in done if example is not None]
            templates += [template for example, _, template in done if example is not None]
            outcomes.update(what for _, what, _ in done)
            update(len(done))
        orders.append(first + weighted(len(examples) - first, part.weight, part.key))
    read = sum(len(p.records) for p in parts)
    order = np.concatenate(orders) if orders else np.zeros(0, np.int64)
    if not len(order):
        reason = f"{read} read, {outcomes['long']} dropped as longer than --max_seq_len {args.max_seq_len}"
        reason += f", {outcomes['unlabelled']} with nothing to learn" if outcomes["unlabelled"] else ""
        raise ValueError(f"--data_config {args.data_config}: no {kind} example left ({reason}): give more or longer")
    packs = None
    if args.packing == "best_fit" and kind == "training":
        packs = packs_of([len(examples[i].ids) for i in order], args.max_seq_len)
    counts = (read, outcomes["cut"], outcomes["long"], outcomes["unlabelled"])
    template = carried.most_used(templates[i] for i in order)
    return SFTDataset(examples, order, tokenizer.fingerprint, counts, packs, template)


def outcome(encoded: Encoded | None) -> tuple[Example | None, str]:
    """-> (the example, or None where it is left out; whole, cut, long or unlabelled)."""
    if encoded is None:
        return None, "long"
    learnt = np.array(encoded.learnt, bool)
    if not learnt[1:].any():
        return None, "unlabelled"
    edges = np.flatnonzero(np.diff(np.concatenate([[False], learnt, [False]]).astype(np.int8)))
    spans = edges.astype(np.int32).reshape(-1, 2)
    return Example(np.array(encoded.ids, np.int32), int(edges[0]), spans), "cut" if encoded.cut else "whole"


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
