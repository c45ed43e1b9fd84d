"""Packs: every example once, never too full, nearly as few as there can be; the data set and its batches made of them."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from accessory.data.loader import collate, micro_batches, num_targets, train_windows, windows_per_epoch
from accessory.data.packing import best_fit, packs_of, tightened
from accessory.data.sft import DataArgs, load_sft
from accessory.tokenizer import Tokenizer
from accessory.train.state import TrainState
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


def test_tightened_by_hand() -> None:
    packs, lengths = [[0, 1], [2, 3], [4]], [6, 3, 5, 4, 2]
    assert tightened(packs, lengths, 10) == [[0, 3], [1, 2, 4]]  # 6+4, 3+5+2
    assert tightened([[0], [1]], [3, 3], 6) == [[0, 1]] and tightened([], [], 6) == []
    assert tightened([[0, 1], [2, 3]], [6, 4, 6, 3], 10) == [[0, 1], [2, 3]]  # as full as they can be: nothing moves


def test_packs_are_few_and_hold_every_example_once() -> None:
    """Whole packs cut into pieces: how few there can be is known."""
    rng, spare, spare_before = random.Random(1), 0, 0
    for _ in range(100):
        capacity, least = rng.randrange(30, 200), rng.randrange(1, 40)
        cuts = [sorted(rng.sample(range(1, capacity), rng.randrange(1, 4))) for _ in range(least)]
        lengths = [b - a for cut in cuts for a, b in zip([0, *cut], [*cut, capacity])]
        rng.shuffle(lengths)
        packs, before = packs_of(lengths, capacity), best_fit(lengths, capacity)
        assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
        assert all(0 < sum(lengths[i] for i in pack) <= capacity for pack in packs)
        assert packs == sorted(map(sorted, packs)) == packs_of(np.array(lengths, np.int32), capacity)
        assert least <= len(packs) <= len(before)
        spare, spare_before = spare + len(packs) - least, spare_before + len(before) - least
    assert spare < spare_before


def test_many_are_packed_at_once() -> None:
    rng = np.random.default_rng(0)
    for lengths, wanted in ((rng.integers(1, 513, 40_000), 0.995), (rng.integers(100, 300, 40_000), 0.998)):
        packs = packs_of(lengths, 512)
        assert lengths.sum() / (512 * len(packs)) > wanted
    assert lengths.sum() / (512 * len(best_fit(lengths, 512))) < 0.98  # best fit alone


@pytest.mark.parametrize("template, bound", [("alpaca", 1140), ("vicuna", 1163)])
def test_gsm8k_at_512(tmp_path: Path, template: str, bound: int) -> None:
    """More than 97 % full, with LLaMA's tokens. No packing takes fewer than `bound` packs: the linear programme over all
    packs that there can be says so (its dual prices are checked by a knapsack), docs/data.md."""
    rows = assets("gsm8k", "gsm8k_train.jsonl").read_text().splitlines()[:2500]
    records = [{"instruction": r["question"], "output": r["answer"]} for r in map(json.loads, rows)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    args = DataArgs(data_config=str(tmp_path / "d.jsonl"), packing="best_fit", template=template)
    train, _ = load_sft(args, Tokenizer.open(assets("tok_llama", "tokenizer.model")), 0)
    assert train.report.tokens / (512 * len(train)) > 0.97 and train.report.examples == 2500
    assert bound <= len(train) <= 1.011 * bound
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


# --- a run that is stopped and goes on --------------------------------------------------------------------------------


def mixture(tmp_path: Path, packing: str):
    """Read from the files anew, as a run does that goes on: weights 2, 0.5 and 1.4, dialogs of one turn and of three."""
    if not (tmp_path / "data").exists():
        base = write_tiny_data(tmp_path / "data", 24).parent
        rows = [json.loads(line) for line in (base / "train.jsonl").read_text().splitlines()]
        turns = [[("human", r["instruction"]), ("gpt", r["output"])] for r in rows]
        talks = [[{"from": who, "value": said} for who, said in sum(turns[i : i + 3], [])] for i in range(12)]
        (base / "talks.jsonl").write_text("".join(json.dumps({"conversations": t}) + "\n" for t in talks))
        (base / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:9]))
        entries = (
            "- {path: a.jsonl, weight: 2}\n- {path: train.jsonl, weight: 0.5}\n- {path: talks.jsonl, weight: 1.4}\n"
        )
        (base / "mixture.yaml").write_text("META:\n" + entries)
        write_tiny_checkpoint(tmp_path / "model")
    args = {"data_config": str(tmp_path / "data" / "mixture.yaml"), "template": "vicuna", "max_seq_len": 420}
    return load_sft(DataArgs(**args, packing=packing), Tokenizer.open(tmp_path / "model"), 7)[0]


def batches(dataset, state: TrainState, max_steps: int, dp: int, batch_size: int, num_workers: int = 0) -> list:
    """The steps from `state` on as loop.fit takes them, over the ends of epochs: of each its epoch, window, counts, and
    every rank's micro batches as plain lists."""
    per_step, steps = 6, []
    total = windows_per_epoch(len(dataset), per_step)
    while state.step < max_steps:
        options = {"batch_size": batch_size, "sequences_per_step": per_step, "dp_size": dp, "seed": 7}
        options |= {"epoch": state.epoch, "start_window": state.window, "num_workers": num_workers}
        for ranks in zip(*(train_windows(dataset, dp_rank=r, **options) for r in range(dp)), strict=True):
            plain = [[[t.tolist() for t in batch] for batch in window.micro_batches] for window in ranks]
            assert all(len(of_rank) == micro_batches(per_step, batch_size, dp) for of_rank in plain)
            steps.append((state.epoch, state.window, ranks[0].num_tokens, plain))
            state.advance(ranks[0].num_all_tokens, ranks[0].num_tokens, total)
            if state.step == max_steps:
                break
    return steps


def restored(state: TrainState) -> TrainState:
    """What resume/state.json keeps of it."""
    return TrainState.from_json(json.loads(json.dumps(state.to_json())))


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_stopped_after_any_step_it_goes_on_with_the_same_batches(tmp_path: Path, packing: str, dp: int) -> None:
    dataset = mixture(tmp_path, packing)
    total = windows_per_epoch(len(dataset), 6)
    assert total > 1 and len(dataset) % 6, "epochs of several steps, the last one short"
    if packing == "best_fit":
        assert max(len(item) for item in dataset) > 1 and len(dataset) < len(dataset.order)
    steps, end = 2 * total + 2, TrainState()  # beyond the second epoch
    unbroken = batches(dataset, end, steps, dp, batch_size=2)
    assert len(unbroken) == steps and end.epoch == 2 and end.window == 2
    assert [step[3] for step in unbroken[:total]] != [step[3] for step in unbroken[total : 2 * total]]
    for k in range(steps + 1):
        before, again = TrainState(), mixture(tmp_path, packing) if k % 3 == 0 else dataset
        assert again.fingerprint == dataset.fingerprint  # what a run asks before it goes on
        head = batches(dataset, before, k, dp, batch_size=2)
        after = restored(before)
        tail = batches(again, after, steps, dp, batch_size=2, num_workers=2 * (k % 2))
        alike = head + tail == unbroken  # token ids, labels, positions, edges, counts
        assert alike and after == end, k


def test_it_goes_on_with_the_same_sequences_on_another_number_of_ranks(tmp_path: Path) -> None:
    def sequences(step: tuple) -> list:
        cells = [batch for of_rank in step[3] for batch in of_rank]
        return sorted(
            (tokens[0][a:b], labels[0][a:b], positions[0][a:b])
            for tokens, labels, positions, edges, _ in cells
            for a, b in zip(edges, edges[1:])
            if any(label != -100 for label in labels[0][a:b])  # but for fillers
        )

    dataset = mixture(tmp_path, "best_fit")
    steps = 2 * windows_per_epoch(len(dataset), 6) + 1
    unbroken = batches(dataset, TrainState(), steps, 1, batch_size=2)
    for k in (1, 3, steps - 2):
        state = TrainState()
        head = batches(dataset, state, k, 2, batch_size=1)
        tail = batches(dataset, restored(state), steps, 1, batch_size=4)
        alike = [(*s[:3], sequences(s)) for s in head + tail] == [(*s[:3], sequences(s)) for s in unbroken]
        assert alike, k


def test_other_data_or_packs_are_noticed(tmp_path: Path) -> None:
    plain = mixture(tmp_path, "best_fit")
    assert plain.fingerprint != mixture(tmp_path, "none").fingerprint
    config = tmp_path / "data" / "mixture.yaml"
    config.write_text(config.read_text().replace("1.4", "1.5"))
    assert mixture(tmp_path, "best_fit").fingerprint != plain.fingerprint


@pytest.mark.parametrize("flags", [{"packing": "best"}, {"template": "alpacca"}, {"train_on": "some"}])
def test_flags_are_checked(tmp_path: Path, flags: dict) -> None:
    from accessory.config import parse

    ((name, value),) = flags.items()
    with pytest.raises(ValueError, match=f"--{name} {value}"):
        (args,) = parse([f"--{name}", value, "--data_config", str(write_tiny_data(tmp_path / "data"))], DataArgs)
        load_sft(args, Tokenizer.open(write_tiny_checkpoint(tmp_path / "model")), 0)
