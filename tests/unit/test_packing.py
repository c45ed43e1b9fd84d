"""Packs: every example once, never too full, as full as an optimum's; the data set and its batches made of them."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from accessory.data.loader import collate, num_targets, train_windows
from accessory.data.packing import best_fit
from accessory.data.sft import DataArgs, load_sft
from accessory.tokenizer import Tokenizer
from tests.helpers import assets, write_tiny_checkpoint, write_tiny_data


def by_definition(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best fit decreasing as the books have it: look at every pack."""
    packs: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rooms = [(capacity - sum(lengths[k] for k in pack) - lengths[i], n) for n, pack in enumerate(packs)]
        fitting = [(room, n) for room, n in rooms if room >= 0]
        if fitting:
            packs[min(fitting)[1]].append(i)
        else:
            packs.append([i])
    return packs


def test_by_hand() -> None:
    assert best_fit([5, 2, 4, 3, 1], 6) == [[0, 4], [1, 2], [3]]
    assert best_fit([], 6) == [] and best_fit([6], 6) == [[0]] and best_fit([6, 6], 6) == [[0], [1]]


def test_packs_are_best_fit_decreasings() -> None:
    rng = random.Random(0)
    for _ in range(200):
        capacity = rng.randrange(1, 60)
        lengths = [rng.randrange(1, capacity + 1) for _ in range(rng.randrange(40))]
        packs = best_fit(lengths, capacity)
        assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))  # every example once
        fill = [sum(lengths[i] for i in pack) for pack in packs]
        assert all(f <= capacity for f in fill) and packs == sorted(map(sorted, packs))
        assert sorted(fill) == sorted(sum(lengths[i] for i in pack) for pack in by_definition(lengths, capacity))
        assert packs == best_fit(np.array(lengths, np.int64), capacity)


def test_many_are_packed_at_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 513, 100_000)
    packs = best_fit(lengths, 512)
    assert lengths.sum() / (512 * len(packs)) > 0.97


def test_gsm8k_at_512(tmp_path: Path) -> None:
    """More than 97 % full, with LLaMA's tokens."""
    rows = assets("gsm8k", "gsm8k_train.jsonl").read_text().splitlines()[:2500]
    records = [{"prompt": r["question"], "completion": r["answer"]} for r in map(json.loads, rows)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    args = DataArgs(data_config=str(tmp_path / "d.jsonl"), packing="best_fit")
    train, _ = load_sft(args, Tokenizer.open(assets("tok_llama", "tokenizer.model")), 0)
    assert train.report.tokens / (512 * len(train)) > 0.97 and train.report.examples == 2500
    assert train.longest(3) == sorted((sum(len(e.ids) for e in item) for item in train), reverse=True)[:3]


def load(tmp_path: Path, seed: int = 0, **flags):
    tokenizer = Tokenizer.open(write_tiny_checkpoint(tmp_path / "model"))
    config = write_tiny_data(tmp_path / "data", 24)
    return load_sft(DataArgs(data_config=str(config), **{"max_seq_len": 600, **flags}), tokenizer, seed)


def test_a_packed_epoch_is_the_unpacked_ones_examples(tmp_path: Path) -> None:
    (plain, val), (packed, packed_val) = load(tmp_path), load(tmp_path, packing="best_fit")
    assert isinstance(packed[0], list) and len(packed) < len(plain) == packed.report.examples == 24
    assert packed_val[0].ids.tolist() == val[0].ids.tolist()  # validation is not packed
    counts = plain.report._asdict() | {"packs": len(packed)}
    assert packed.report._asdict() == counts and packed.fingerprint != plain.fingerprint
    assert packed.fingerprint == load(tmp_path, packing="best_fit")[0].fingerprint

    def seen(dataset, per_step: int) -> list[tuple]:
        found = []
        for dp_rank in range(2):
            options = {"batch_size": 1, "sequences_per_step": per_step, "dp_size": 2, "seed": 3, "epoch": 1}
            for window in train_windows(dataset, dp_rank=dp_rank, **options):
                for batch in window.micro_batches:
                    edges = batch.cu_seqlens.tolist()
                    rows = [(batch.tokens[0, a:b], batch.labels[0, a:b]) for a, b in zip(edges, edges[1:])]
                    found += [tuple((*t.tolist(), *l.tolist())) for t, l in rows if len(t) > 2]
        return sorted(found)

    assert seen(plain, 4) == seen(packed, 4) and len(seen(plain, 4)) == 24


def test_counts_of_packs_are_those_of_their_labels(tmp_path: Path) -> None:
    packed, _ = load(tmp_path, packing="best_fit")
    assert sum(num_targets(item) for item in packed) == packed.report.supervised_tokens
    assert sum(int((collate([item]).labels != -100).sum()) for item in packed) == packed.report.supervised_tokens


@pytest.mark.parametrize("flags", [{"packing": "best"}, {"template": "alpacca"}, {"train_on": "some"}])
def test_flags_are_checked(tmp_path: Path, flags: dict) -> None:
    from accessory.config import parse

    ((name, value),) = flags.items()
    with pytest.raises(ValueError, match=f"--{name} {value}"):
        (args,) = parse([f"--{name}", value, "--data_config", str(write_tiny_data(tmp_path / "data"))], DataArgs)
        load_sft(args, Tokenizer.open(write_tiny_checkpoint(tmp_path / "model")), 0)
