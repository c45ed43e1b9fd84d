"""Token stores as a training and a validation set of blocks, in an order that is computed, never stored.

    store   d0 d0 d0 | d1 | d2 d2 d2 d2 d2 | ...       documents, each with its EOS
    blocks  [ d0 d0 d0 | d1 ] [ d2 d2 d2 d2 ] ...      the stream cut every block_size tokens; the last may be short
    item    [Example, Example]                         a block, cut at its documents: positions and attention restart there

    which blocks are held out     a permutation of all blocks keyed by (seed, store): its first val_ratio of them
    epoch e of one store          the next weight * n blocks of pass 0, pass 1, ...: each pass a permutation of its own
    epoch e of all                the stores' blocks together, permuted by (seed, e)

A permutation is a keyed bijection of [0, n), evaluated where it is asked: no list of indices at any size, and the item at a
position is a function of (stores, settings, seed, epoch, position). Blocks of a store built with --blocks are its
documents. No torch. Test: pytest tests/unit/test_blocks.py
"""

import hashlib
import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import flag
from ..tokenizer import Tokenizer
from .sft import Example
from .store import AGAIN, ENDS, TOKENS, Store

ROUNDS = 8
SPLIT, PASS, EPOCH = 0, 1, 2  # what a permutation is for: part of its key


@dataclass
class PretrainDataArgs:
    """Data: the text that is trained on, as token stores"""

    corpus: list[str] = flag(
        [],
        "stores of tools/build_corpus.py, each DIR or DIR=weight: how often its text is seen an epoch (0.5 = half of it)",
    )
    block_size: int = flag(1024, "tokens of a training sequence; any, without building the store again")
    val_ratio: float = flag(0.0, "fraction of the blocks of each store held out for validation (at least one if not 0)")
    separate_documents: bool = flag(True, "positions and attention begin anew at each document inside a block")
    drop_last: bool = flag(False, "leave out the short block at the end of each store")
    num_workers: int = flag(1, "threads that prepare batches ahead; 0 = none")

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ValueError(f"--block_size {self.block_size}: at least 2, a token and the next one to learn")
        if not 0 <= self.val_ratio < 1:
            raise ValueError(f"--val_ratio {self.val_ratio}: a fraction of the blocks, from 0 up to but without 1")
        if self.num_workers < 0:
            raise ValueError(f"--num_workers {self.num_workers}: 0 or more threads")


class Report(NamedTuple):
    """What an epoch is, weights applied: the first epoch's, where a weight is no whole number and a block is short."""

    examples: int  # blocks
    tokens: int
    supervised_tokens: int  # about: documents that end just where a block does are counted too
    documents: int  # of the stores, both sides


def load_corpus(args: PretrainDataArgs, tokenizer: Tokenizer, seed: int) -> tuple["Blocks", "Blocks | None"]:
    """-> (training set, validation set or None where none is asked for). Same on every rank; nothing but sizes is read.

    ValueError names the store: missing, unfinished, cut off, of another version, built with another tokenizer."""
    if not args.corpus:
        raise ValueError("--corpus is missing: name a token store, tools/build_corpus.py builds one from text")
    paths, weights = zip(*(path_and_weight(word) for word in args.corpus))
    stores = [Store.open(path) for path in paths]
    for i, store in enumerate(stores):
        store.require(tokenizer)
        if twice := [other for other in stores[:i] if other.fingerprint == store.fingerprint]:
            raise ValueError(
                f"--corpus {store.directory}: the same text as {twice[0].directory}, so what one holds out the other trains on: name it once (DIR=2 is each block twice)"
            )
    keys: dict[str, Any] = {"block_size": args.block_size, "val_fraction": args.val_ratio, "seed": seed}
    keys |= {"separate_documents": args.separate_documents, "keep_last": not args.drop_last}
    train = Blocks(stores, list(weights), split="train", **keys)
    return train, Blocks(stores, [1.0] * len(stores), split="val", **keys) if args.val_ratio else None


def path_and_weight(word: str) -> tuple[Path, float]:
    """DIR or DIR=weight. A directory whose name has the = in it is taken as it is."""
    path, equals, number = word.rpartition("=")
    if not equals or Path(word).expanduser().is_dir():
        return Path(word).expanduser(), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = 0.0
    if not 0 < weight < math.inf:
        raise ValueError(f"--corpus {word}: the weight is a number above 0 (0.5 = half of the blocks, 2 = each twice)")
    return Path(path).expanduser(), weight


class Blocks:
    """The blocks of one side of several stores. Reading is thread-safe; an item's ids are copied out of the files.

    Items are numbered through: 0 ... sum(counts) - 1, store after store. len() is an epoch's, which differs where a weight
    is not 1: it is how many positions epoch_order() has."""

    def __init__(
        self,
        stores: list[Store],
        weights: list[float],
        block_size: int,
        split: str = "train",
        val_fraction: float = 0.0,
        separate_documents: bool = True,
        keep_last: bool = True,
        seed: int = 0,
    ):
        assert split in ("train", "val") and len(stores) == len(weights), (split, len(stores), len(weights))
        self.stores, self.block_size, self.separate, self.seed = stores, block_size, separate_documents, seed
        self.totals = [count_blocks(store, block_size, keep_last) for store in stores]
        for store, n in zip(stores, self.totals):
            if not n:
                raise ValueError(
                    f"{store.directory}: its {len(store.tokens):,} tokens do not fill one --block_size {block_size}: give a "
                    "smaller one or --drop_last false, or leave the store out"
                )
        held_out = [held_out_of(n, val_fraction, store) for n, store in zip(self.totals, stores)]
        self.offsets = [0 if split == "val" else n for n in held_out]  # where this side begins in the split permutation
        self.counts = [v if split == "val" else n - v for n, v in zip(self.totals, held_out)]
        self.per_epoch = [math.floor(n * w + 0.5) for n, w in zip(self.counts, weights)]
        self.bounds, self.epoch_bounds = ([0, *accumulate(c)] for c in (self.counts, self.per_epoch))
        self.splits = [Permutation(n, (seed, SPLIT, s)) for s, n in enumerate(self.totals)]
        for store, weight, count, n in zip(stores, weights, self.per_epoch, self.counts):
            if not count:
                raise ValueError(
                    f"--corpus {store.directory}={weight:g}: less than half of one of its {n} blocks an epoch, so none: give a "
                    "larger weight or a smaller --block_size, or leave it out"
                )
        settings = (weights, block_size, split, val_fraction, separate_documents, keep_last, seed)
        text = repr(([store.fingerprint for store in stores], settings))
        self.fingerprint: str = hashlib.sha256(text.encode()).hexdigest()  # equal where the same would be trained on
        self.report = self._report()

    def __len__(self) -> int:
        return self.epoch_bounds[-1]

    def __getitem__(self, i: int) -> list[Example]:
        if not 0 <= i < self.bounds[-1]:
            raise IndexError(i)
        s = bisect_right(self.bounds, i) - 1
        store, (start, stop) = self.stores[s], self.span(s, self.splits[s][self.offsets[s] + i - self.bounds[s]])
        cut = self.separate and not is_cut(store)
        edges = [start, *(store.ends_between(start, stop).tolist() if cut else ()), stop]
        ids = store.tokens[start:stop].astype(np.int32)
        known = store.meta["tokenizer"]["vocab_size"]
        if ids.min() < 0 or ids.max() >= known:
            wrong = ids[(ids < 0) | (ids >= known)][0]
            raise ValueError(
                f"{store.directory / TOKENS}: {wrong} in tokens {start} to {stop} is none of {known}: {AGAIN}"
            )
        if any(a > b for a, b in pairwise(edges)):
            raise ValueError(f"{store.directory / ENDS}: does not rise in tokens {start} to {stop}: {AGAIN}")
        return [Example(ids[a - start : b - start], 0) for a, b in pairwise(edges) if b > a]

    def span(self, s: int, block: int) -> tuple[int, int]:
        """Where a block of store s begins and ends in its tokens."""
        store = self.stores[s]
        if is_cut(store):
            return int(store.ends[block - 1]) if block else 0, int(store.ends[block])
        return block * self.block_size, min((block + 1) * self.block_size, len(store.tokens))

    def epoch_order(self, seed: int, epoch: int) -> "EpochOrder":
        """The items of an epoch by position: lazy, a function of its arguments."""
        return EpochOrder(self, seed, epoch)

    def longest(self, count: int) -> list[int]:
        """Tokens of the `count` longest items, or of all where there are fewer."""
        return [self.block_size] * min(count, len(self))

    def _report(self) -> Report:
        tokens = segments = 0
        for s, store in enumerate(self.stores):
            last = self.totals[s] - 1
            own = self.counts[s] * self.block_size
            if is_cut(store):
                own = len(store.tokens) * self.counts[s] // self.totals[s]
            elif self.splits[s].index(last) - self.offsets[s] in range(self.counts[s]):
                own -= (last + 1) * self.block_size - min((last + 1) * self.block_size, len(store.tokens))
            times = self.per_epoch[s] / max(1, self.counts[s])
            tokens += round(own * times)
            inside = len(store) * self.counts[s] / self.totals[s] if self.separate and not is_cut(store) else 0
            segments += self.per_epoch[s] + inside * times
        documents = sum(len(store) for store in self.stores)
        return Report(len(self), tokens, max(0, tokens - round(segments)), documents)


class EpochOrder:
    """position -> item, for one epoch of Blocks."""

    def __init__(self, blocks: Blocks, seed: int, epoch: int):
        self.blocks, self.seed, self.epoch = blocks, seed, epoch
        self.mixed = Permutation(len(blocks), (seed, EPOCH, epoch))
        self.passes: dict[tuple[int, int], Permutation] = {}

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, position: int) -> int:
        slot = self.mixed[position]
        s = bisect_right(self.blocks.epoch_bounds, slot) - 1
        drawn = self.epoch * self.blocks.per_epoch[s] + slot - self.blocks.epoch_bounds[s]  # since the first epoch
        number, place = divmod(drawn, self.blocks.counts[s])
        key = (s, number)
        if key not in self.passes:
            self.passes[key] = Permutation(self.blocks.counts[s], (self.seed, PASS, s, number))
        return self.blocks.bounds[s] + self.passes[key][place]


class Permutation:
    """A bijection of [0, n), keyed, in constant memory.

    x = left * b + right with a * b >= n, a and b near the root of n; in turns left += f(right) modulo a and right +=
    f(left) modulo b, f a keyed hash (a Feistel network over two moduli: Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains", with their cycle walking: a result beyond n is put in again)."""

    def __init__(self, n: int, key: tuple[int, ...]):
        self.n, self.a = n, max(1, math.isqrt(max(0, n - 1)) + 1)
        self.b = max(1, -(-n // self.a))
        self.keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64).tolist()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, x: int) -> int:
        if not 0 <= x < self.n:
            raise IndexError(x)
        return self._walk(x, forth=True)

    def index(self, y: int) -> int:
        """The inverse: self[self.index(y)] == y."""
        return self._walk(y, forth=False)

    def _walk(self, x: int, forth: bool) -> int:
        while True:
            x = self._round_trip(x, 1 if forth else -1)
            if x < self.n:
                return x

    def _round_trip(self, x: int, sign: int) -> int:
        left, right = divmod(x, self.b)
        for r in range(ROUNDS)[::sign]:
            if r % 2:
                right = (right + sign * mix(left ^ self.keys[r])) % self.b
            else:
                left = (left + sign * mix(right ^ self.keys[r])) % self.a
        return left * self.b + right


def mix(x: int) -> int:
    """splitmix64's finaliser: 64 bits to 64 well mixed ones (Steele, Lea and Flood 2014)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31


def is_cut(store: Store) -> bool:
    """Whether its documents are blocks already (--blocks)."""
    return store.meta["settings"]["blocks"] != "none"


def count_blocks(store: Store, block_size: int, keep_last: bool) -> int:
    """ValueError where a store that is cut already was cut otherwise."""
    if not is_cut(store):
        return len(store.tokens) // block_size if not keep_last else -(-len(store.tokens) // block_size)
    size = store.meta["settings"]["block_size"]
    if size != block_size:
        raise ValueError(
            f"{store.directory}: built in blocks of {size}: give --block_size {size}, or build without --blocks"
        )
    return len(store)


def held_out_of(n: int, fraction: float, store: Store) -> int:
    """Blocks of n for validation: none for 0, else at least one, and at least one is left to train on."""
    count = max(1, math.floor(n * fraction + 0.5)) if fraction else 0
    if count and count >= n:
        raise ValueError(f"--val_ratio {fraction} leaves nothing to train on of {store.directory} ({n} blocks)")
    return count
