"""Blocks: the stream cut, documents apart, an exact and lazy order, a split that holds, any layout, exact resume."""

import itertools
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.data.blocks import Blocks, Permutation, PretrainDataArgs, load_corpus, path_and_weight
from accessory.data.loader import eval_batches, num_targets, train_windows, windows_per_epoch
from accessory.data.store import ENDS, TOKENS, Store
from tests.helpers import least_cpu_seconds
from tests.unit.test_store import TOKENIZER, write_meta, write_store

# The order of n = 20 under two keys: a run that goes on under another numpy must see the same, so they may never change.
FROZEN = {(0, 2, 0): [16, 0, 4, 11, 13, 5, 8, 1, 15, 3, 18, 6, 12, 14, 2, 7, 17, 19, 10, 9]}


def make_store(path: Path, lengths: list[int], first: int = 0, **keys) -> Store:
    """Documents of these lengths; the ids count up from `first` through the whole store."""
    ids, most = iter(range(first, first + sum(lengths))), max(320, first + sum(lengths))
    return Store.open(write_store(path, [[next(ids) for _ in range(n)] for n in lengths], most, **keys))


def flat(item: list) -> list[int]:
    return [int(i) for e in item for i in e.ids]


# --- permutations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 40), 99, 100, 101, 1000, 4099])
def test_a_permutation_is_a_bijection_and_its_inverse_is_one(n: int) -> None:
    for key in ((0, 1), (7, 1, 2)):
        permutation = Permutation(n, key)
        values = [permutation[i] for i in range(n)]
        assert sorted(values) == list(range(n)) and [permutation.index(v) for v in values] == list(range(n))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**15), st.integers(0, 10**9), st.integers(0, 2**64))
def test_large_permutations_go_there_and_back(n: int, place: int, seed: int) -> None:
    permutation = Permutation(n, (seed, 0))
    assert 0 <= permutation[place % n] < n and permutation.index(permutation[place % n]) == place % n


def test_permutations_are_uniform_enough_and_frozen() -> None:
    """Each value at each place about equally often over the keys: chi-square of a 7 x 7 table, 36 degrees of freedom."""
    counts = np.zeros((7, 7))
    for seed in range(3000):
        permutation = Permutation(7, (seed, 2, 0))
        for place in range(7):
            counts[place, permutation[place]] += 1
    assert ((counts - 3000 / 7) ** 2 / (3000 / 7)).sum() < 75  # beyond that once in 10,000
    assert len({tuple(Permutation(20, (s, 2, e))[i] for i in range(20)) for s in range(20) for e in range(20)}) == 400
    for key, expected in FROZEN.items():
        assert [Permutation(20, key)[i] for i in range(20)] == expected


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_blocks_by_hand(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [3, 1, 4, 6, 2])  # ends 3 4 8 14 16
    by_first = {flat(item)[0]: item for item in (lambda b: (b[i] for i in range(len(b))))(Blocks([store], [1.0], 5))}
    segments = {first: [e.ids.tolist() for e in item] for first, item in by_first.items()}
    assert segments == {0: [[0, 1, 2], [3], [4]], 5: [[5, 6, 7], [8, 9]], 10: [[10, 11, 12, 13], [14]], 15: [[15]]}
    assert all(e.prompt_len == 0 and e.ids.dtype == np.int32 for item in by_first.values() for e in item)


@pytest.mark.parametrize("block_size", [2, 3, 7, 16, 100])
@pytest.mark.parametrize("keep_last", [True, False])
@pytest.mark.parametrize("separate", [True, False])
def test_any_block_size_covers_the_stream(tmp_path: Path, block_size: int, keep_last: bool, separate: bool) -> None:
    rng = np.random.default_rng(block_size)
    store = make_store(tmp_path / "s", rng.integers(1, 12, 40).tolist())
    total = len(store.tokens)
    blocks = Blocks([store], [1.0], block_size, separate_documents=separate, keep_last=keep_last)
    items = sorted((blocks[i] for i in range(len(blocks))), key=flat)
    kept = total if keep_last else total // block_size * block_size
    assert [i for item in items for i in flat(item)] == list(range(kept))
    assert all(len(flat(item)) == block_size for item in items[:-1])
    ends = set(store.ends.tolist())
    for item in items:
        if separate:  # cut at the documents' ends, and nowhere else
            edges = [int(e.ids[-1]) + 1 for e in item]
            assert all(e in ends for e in edges[:-1]) and not ends & set(flat(item)[1:]) - set(edges)
        else:
            assert len(item) == 1
    assert blocks.report.tokens == kept and blocks.report.examples == len(items)


def test_a_store_of_blocks_gives_its_documents(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [8, 8, 3, 8], blocks="cla", block_size=8)
    blocks = Blocks([store], [1.0], 8)
    assert sorted(flat(blocks[i]) for i in range(4)) == [store.document(i).tolist() for i in range(4)]
    assert all(len(blocks[i]) == 1 for i in range(4)) and blocks.report.tokens == 27
    with pytest.raises(ValueError, match="built in blocks of 8: give --block_size 8, or build without --blocks"):
        Blocks([store], [1.0], 16)


# --- order ------------------------------------------------------------------------------------------------------------


def epoch(blocks: Blocks, number: int, seed: int = 3) -> list[int]:
    order = blocks.epoch_order(seed, number)
    return [order[p] for p in range(len(order))]


def test_an_epoch_is_a_permutation_and_each_is_another(tmp_path: Path) -> None:
    blocks = Blocks([make_store(tmp_path / "s", [50] * 40)], [1.0], 16)
    epochs = [epoch(blocks, e) for e in range(3)]
    assert all(sorted(e) == list(range(len(blocks))) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3 and epoch(blocks, 1) == epochs[1] != epoch(blocks, 1, seed=4)


def test_weights_are_exact_over_an_epoch_and_over_several(tmp_path: Path) -> None:
    stores = [make_store(tmp_path / str(k), [10] * n, 10_000 * k) for k, n in enumerate((40, 25, 31))]
    blocks = Blocks(stores, [1.0, 0.5, 2.4], 10)  # 40, 25 and 31 blocks
    assert blocks.per_epoch == [40, 13, 74] and len(blocks) == 127
    seen: list[Counter] = [Counter(), Counter(), Counter()]
    for number in range(4):
        once = Counter(flat(blocks[i])[0] // 10_000 for i in epoch(blocks, number))
        assert once == {0: 40, 1: 13, 2: 74}
        for i in epoch(blocks, number):
            seen[flat(blocks[i])[0] // 10_000][i] += 1
        for store, count in zip(seen, blocks.counts):  # nothing comes again before all have come
            assert max(store.values()) - (min(store.values()) if len(store) == count else 0) <= 1
    assert set(seen[0].values()) == {4} and len(seen[1]) == 25


def test_the_stores_are_mixed_all_through_an_epoch(tmp_path: Path) -> None:
    stores = [make_store(tmp_path / str(k), [10] * 400, 5000 * k) for k in range(2)]
    order = epoch(Blocks(stores, [1.0, 1.0], 10), 0)
    halves = [sum(i >= 400 for i in order[:400]), sum(i >= 400 for i in order[400:])]
    assert all(150 < h < 250 for h in halves)


# --- split ------------------------------------------------------------------------------------------------------------


def split(store: Store, fraction: float, seed: int = 0) -> tuple[set, set]:
    sides = [Blocks([store], [1.0], 10, side, fraction, seed=seed) for side in ("train", "val")]
    return tuple({tuple(flat(b[i])) for i in range(len(b))} for b in sides)


def test_the_split_is_disjoint_whole_and_of_the_seed(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [10] * 1000)
    train, val = split(store, 0.001)
    assert len(val) == 1 and len(train) == 999 and not train & val
    train, val = split(store, 0.13)
    assert len(val) == 130 and not train & val and len(train | val) == 1000
    assert split(store, 0.13) == (train, val) != split(store, 0.13, seed=1)
    assert len(split(store, 1e-9)[1]) == 1
    firsts = [block[0] / 10_000 for block in val]
    assert 0.4 < np.mean(firsts) < 0.6  # from everywhere


def test_a_split_that_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--val_ratio 0.9 leaves nothing to train on of .*s .1 blocks"):
        Blocks([make_store(tmp_path / "s", [4])], [1.0], 10, "train", 0.9)


@pytest.mark.parametrize(
    "lengths, keys, message",
    [
        (
            [[40], [9]],
            {"keep_last": False},
            r"b: its 9 tokens do not fill one --block_size 10: give a smaller one or --drop_last",
        ),
        ([[9]], {"keep_last": False}, "a: its 9 tokens do not fill one"),
        ([[40], [40]], {"weights": [1.0, 0.1]}, "b=0.1: less than half of one of its 4 blocks an epoch"),
    ],
)
def test_a_store_that_would_not_be_trained_on(tmp_path: Path, lengths: list, keys: dict, message: str) -> None:
    stores = [make_store(tmp_path / name, each) for name, each in zip("ab", lengths)]
    with pytest.raises(ValueError, match=message):
        Blocks(stores, **{"weights": [1.0] * len(stores), "block_size": 10} | keys)


def test_a_store_that_was_spoilt_and_kept_its_size(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [5, 7, 8])
    known, ends = store.meta["tokenizer"]["vocab_size"], store.ends.copy()
    tokens = np.array(store.tokens)
    tokens[3] = known
    blocks = Blocks([Store(store.directory, store.meta, tokens, ends)], [1.0], 20)
    with pytest.raises(
        ValueError, match=f"{TOKENS}: {known} in tokens 0 to 20 is none of {known}: copy the store again"
    ):
        blocks[0]
    ends[[0, 1]] = ends[[1, 0]]
    blocks = Blocks([Store(store.directory, store.meta, np.array(store.tokens), ends)], [1.0], 20)
    with pytest.raises(ValueError, match=f"{ENDS}: does not rise in tokens 0 to 20: copy the store again"):
        blocks[0]


# --- through the loader -----------------------------------------------------------------------------------------------


def windows(blocks: Blocks, rank: int = 0, dp_size: int = 1, batch_size: int = 2, per_step: int = 8, **keys) -> list:
    keys = {"seed": 5, "epoch": 1, "dp_rank": rank, "dp_size": dp_size} | keys
    return list(train_windows(blocks, batch_size=batch_size, sequences_per_step=per_step, **keys))


def test_windows_are_the_same_at_any_dp_size_and_resume_is_exact(tmp_path: Path) -> None:
    blocks = Blocks([make_store(tmp_path / "s", [7, 3, 12] * 40)], [1.0], 9)
    whole = windows(blocks)
    assert len(whole) == windows_per_epoch(len(blocks), 8)
    for dp_size, batch_size in ((2, 2), (4, 2), (4, 1), (3, 2), (1, 8)):
        ranks = [windows(blocks, r, dp_size, batch_size) for r in range(dp_size)]
        for k, same in enumerate(zip(*ranks, strict=True)):
            assert sorted(i for w in same for i in w.sample_ids) == sorted(whole[k].sample_ids)
            assert {w.num_tokens for w in same} == {whole[k].num_tokens}
            assert sum(int((b.labels != -100).sum()) for w in same for b in w.micro_batches) == whole[k].num_tokens
    for start in (1, 5, len(whole)):
        tail = windows(blocks, start_window=start, num_workers=2)
        assert [w.sample_ids for w in tail] == [w.sample_ids for w in whole[start:]]
        for a, b in zip(tail, whole[start:], strict=True):
            pairs = zip(itertools.chain(*a.micro_batches), itertools.chain(*b.micro_batches), strict=True)
            assert all(torch.equal(x, y) for x, y in pairs)


def test_documents_inside_a_block_are_sequences_of_their_own(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [3, 5, 8])
    (together,) = windows(Blocks([store], [1.0], 16), batch_size=1, per_step=1)
    batch = together.micro_batches[0]
    assert batch.cu_seqlens.tolist() == [0, 3, 8, 16]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7]]
    assert (batch.labels == -100).nonzero()[:, 1].tolist() == [0, 3, 8] and together.num_tokens == 13
    (one,) = windows(Blocks([store], [1.0], 16, separate_documents=False), batch_size=1, per_step=1)
    assert one.micro_batches[0].cu_seqlens.tolist() == [0, 16] and one.num_tokens == 15


def test_validation_sees_every_block_once(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [11] * 50)
    val = Blocks([store], [1.0], 8, "val", 0.3)
    batches = [b for r in range(3) for b in eval_batches(val, eval_batch_size=2, dp_rank=r, dp_size=3)]
    targets = sum(int((b.labels != -100).sum()) for b in batches)
    assert targets == sum(num_targets(val[i]) for i in range(len(val)))


def test_the_first_batch_of_100_gb_comes_at_once(tmp_path: Path) -> None:
    directory, count, documents = tmp_path / "s", 5 * 10**10, 10**5
    directory.mkdir()
    with open(directory / TOKENS, "wb") as file:
        file.truncate(count * 2)  # sparse
    (np.arange(1, documents + 1) * (count // documents)).astype("<i8").tofile(directory / ENDS)
    write_meta(directory, np.dtype("<u2"), count, documents, hashed=False)
    args = PretrainDataArgs([str(directory)], block_size=2048, val_ratio=0.001)
    keys = {"batch_size": 4, "sequences_per_step": 16, "dp_rank": 1, "dp_size": 2, "seed": 1, "epoch": 0}

    def begin() -> tuple:
        train, val = load_corpus(args, TOKENIZER, seed=1)
        return train, val, next(train_windows(train, start_window=10**6, num_workers=1, **keys))

    seconds, (train, val, window) = least_cpu_seconds(begin)  # reading 100 GB is CPU time too
    assert seconds < 1
    assert len(train) + len(val) == -(-count // 2048) and window.num_all_tokens == 16 * 2048
    assert train.report.tokens + val.report.tokens == count


# --- load_corpus ------------------------------------------------------------------------------------------------------


def test_load_corpus_counts_and_fingerprints(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 10)):
        make_store(tmp_path / name, [30, 25, 45] * 3, first)
    paths = [str(tmp_path / "a"), f"{tmp_path / 'b'}=0.5"]

    def load(seed: int = 0, corpus: list | None = None, **keys):
        return load_corpus(PretrainDataArgs(corpus or paths, **{"block_size": 16} | keys), TOKENIZER, seed)

    train, val = load()
    assert val is None and len(train) == 19 + 10 and train.report.documents == 18
    epoch_items = [train[i] for i in epoch(train, 0)]
    assert abs(train.report.tokens - sum(len(flat(i)) for i in epoch_items)) < 16
    assert abs(train.report.supervised_tokens - sum(num_targets(i) for i in epoch_items)) <= 6
    others = [load(1), load(block_size=17), load(val_ratio=0.1), load(corpus=paths[:1]), load(corpus=paths[::-1])]
    others += [load(separate_documents=False), load(drop_last=True), load(corpus=[paths[0], f"{tmp_path / 'b'}=0.6"])]
    prints = [t.fingerprint for t, _ in [(train, val), *others]]
    assert len(set(prints)) == len(prints) and load()[0].fingerprint == prints[0]


def test_load_corpus_errors(tmp_path: Path) -> None:
    make_store(tmp_path / "a", [30])
    other = SimpleNamespace(fingerprint="x", path=Path("y"), vocab_size=1)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    for named in ("a", "copy=0.5"):  # or blocks held out of the one would be trained on in the other
        with pytest.raises(ValueError, match="the same text as .*/a, .*name it once"):
            load_corpus(PretrainDataArgs([str(tmp_path / "a"), str(tmp_path / named)], block_size=16), TOKENIZER, 0)
    with pytest.raises(ValueError, match="--corpus is missing: name a token store"):
        load_corpus(PretrainDataArgs(), TOKENIZER, 0)
    with pytest.raises(ValueError, match="built with another tokenizer"):
        load_corpus(PretrainDataArgs([str(tmp_path / "a")]), other, 0)
    for word in ("a=0", "a=x", "a=-1", "a=nan", "a=inf", "a="):
        with pytest.raises(ValueError, match=f"--corpus {word}: the weight is a number above 0"):
            path_and_weight(word)
    with pytest.raises(ValueError, match="a: its 30 tokens do not fill one --block_size 64"):
        load_corpus(PretrainDataArgs([str(tmp_path / "a")], block_size=64, drop_last=True), TOKENIZER, 0)
    (tmp_path / "d=2").mkdir()
    assert path_and_weight(str(tmp_path / "d=2")) == (tmp_path / "d=2", 1.0)
    assert path_and_weight("x=y=2.5") == (Path("x=y"), 2.5)
