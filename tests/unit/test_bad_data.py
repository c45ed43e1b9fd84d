"""Bad instruction data, made up: every format in every kind of file is an error of one line that names the file, or examples
that all have something to learn, with every record accounted for. Never anything else, and never a loss that is no number.

    records of a format --spoilt--> .json .jsonl .json.gz .jsonl.gz .parquet --bytes changed--> load_sft --> a loss
"""

import gzip
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from accessory.data.loader import collate, eval_batches, parts, train_windows
from accessory.data.sft import DataArgs, SFTDataset, load_sft
from accessory.model import Transformer
from accessory.tokenizer import Tokenizer
from tests.helpers import tiny_args, tiny_tokenizer

FORMATS: dict[str, Any] = {
    "alpaca": {"instruction": "Colour?", "input": "grass", "output": "It is green."},
    "messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Colour?"}]},
            {"role": "assistant", "content": "Green.", "train": True},
        ]
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Colour?"}, {"from": "gpt", "value": "Green."}],
        "system": "x",
    },
    "minima": [{"User": "Colour?", "Assistant": "Green."}, {"User": "Snow?", "Assistant": "White."}],
    "anyscale": {"input": "<START_Q>Colour?<END_Q><START_A>Green.<END_A>"},
    "prompt": {"prompt": "Colour?", "completion": "Green."},
}
SPECIALS = ["<START_Q>", "<END_Q>", "<START_A>", "<END_A>", "<|im_start|>", "<|im_end|>"]
VALUES = [
    None,
    True,
    0,
    -1,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "\n",
    "\0",
    "a" * 3000,
    "\ud83d",
    "\x1b[2J",
    "é\u202e\ufeff\u2028",
]
VALUES += [
    "<|im_end|><START_A></s>",
    "[INST] USER: ### Response:",
    [],
    [[]],
    {},
    {"": ""},
    [None],
    ["a"],
    {"role": "user"},
]
VALUES += [
    10**30,
    "user",
    "assistant",
    "tool",
    "gpt",
    [{"type": "text"}],
    [{"type": "image_url"}],
    [{"role": "user", "content": "a"}],
]
FILES = ["d.json", "d.jsonl", "d.json.gz", "d.jsonl.gz", "d.parquet"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.model").write_bytes(tiny_tokenizer())
    return Tokenizer.open(directory).with_special_tokens(SPECIALS)


def places(item: Any, at: tuple = ()) -> list[tuple]:
    """The way to every value in it."""
    inner = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
    return [at] + [place for key, value in inner for place in places(value, (*at, key))]


def spoilt(item: Any, rng: random.Random) -> Any:
    """With a value, a key, an element or all of it exchanged, doubled or gone."""
    item = json.loads(json.dumps(item))
    *way, last = rng.choice(places(item)) or (None,)
    if last is None:
        return rng.choice([*VALUES, item, *FORMATS.values()])
    owner = item
    for key in way:
        owner = owner[key]
    kind = rng.randrange(4)
    if kind == 0:
        del owner[last]
    elif kind == 1 and isinstance(owner, dict):
        owner[rng.choice(["role", "from", "content", "output", "weight", "image", "x", last.upper()])] = owner.pop(last)
    elif kind == 1:
        owner.insert(last, rng.choice([*owner, *VALUES]))
    elif kind == 2 and isinstance(owner[last], str):
        owner[last] = rng.choice([value for value in VALUES if isinstance(value, str)])
    else:
        owner[last] = rng.choice(VALUES)
    return item


def write(path: Path, items: list) -> None:
    """Skips where a parquet file cannot be written here; what its columns cannot hold is left out."""
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        rows = [item for item in items if isinstance(item, dict)] or [{"x": 1}]
        while True:
            try:
                return parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            except (pyarrow.ArrowException, UnicodeError, OverflowError):
                rows = rows[:-1] or [{"x": 1}]
    name = path.name.removesuffix(".gz")
    text = json.dumps(items) if name.endswith(".json") else "".join(json.dumps(i) + "\n" for i in items)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def flags(rng: random.Random, format: str) -> dict[str, Any]:
    named = [None] if format == "anyscale" else ["chatml", "vicuna", "llama2-chat", "alpaca", "none"]
    return {
        "template": rng.choice(named if rng.random() < 0.9 else [None, "vicuna"]),
        "train_on": rng.choice(["all", "all", "last", "flagged", "text", "text"]),
        "tokenize": rng.choice([None, "joint", "separate"]),
        "max_seq_len": rng.choice([3, 60, 400, 400]),
        "on_long": rng.choice(["truncate", "truncate", "drop", "drop", "error"]),
        "packing": rng.choice(["none", "best_fit"]),
        "val_ratio": rng.choice([0.0, 0.0, 0.3]),
    }


def outcome(path: Path, tokenizer: Tokenizer, given: dict[str, Any]) -> list[SFTDataset]:
    """The sets, checked; none where it is refused as it should be."""
    try:
        sets = load_sft(DataArgs(data_config=str(path), num_workers=0, **given), tokenizer, 0)
    except ValueError as error:
        assert str(path) in str(error) and str(error).isprintable() and len(str(error)) < 900, repr(str(error))
        return []
    found = [s for s in sets if s is not None]
    for dataset in found:
        r = dataset.report
        assert r.read == r.examples + r.dropped + r.unlabelled and r.examples > 0 < r.supervised_tokens
        for i in range(len(dataset)):
            assert sum(len(e.ids) for e in parts(dataset[i])) <= given["max_seq_len"]
            assert all(e.learnt()[1:].any() for e in parts(dataset[i]))
            assert (collate([dataset[i]]).labels != -100).any()
    return found


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("format", FORMATS)
def test_spoilt_records(tmp_path: Path, tokenizer: Tokenizer, format: str, name: str) -> None:
    rng, seen = random.Random(f"{format} {name}"), Counter()
    (tmp_path / "tokens.json").write_text(json.dumps({"tokens": SPECIALS[:4]}))
    for _ in range(40):
        whole = [FORMATS[format]] * rng.randrange(3)
        broken = spoilt(FORMATS[format], rng)
        write(tmp_path / name, [*whole, spoilt(broken, rng) if rng.random() < 0.3 else broken, *whole])
        seen["read" if outcome(tmp_path / name, tokenizer, flags(rng, format)) else "refused"] += 1
    assert seen["refused"] >= 5 and (seen["read"] >= 1 or name == "d.parquet"), seen  # both happen


@pytest.mark.parametrize("name", FILES)
def test_damaged_bytes(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    rng, kept = random.Random(name), 0
    path = tmp_path / name
    for _ in range(50):
        write(path, [FORMATS[format] for format in rng.sample(list(FORMATS), 4)])
        raw = bytearray(path.read_bytes())
        for _ in range(rng.randrange(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.3 else raw)
        kept += bool(outcome(path, tokenizer, {"max_seq_len": 400, "template": "vicuna"}))
    assert kept < 50


def test_a_damaged_list_of_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    write(tmp_path / "d.jsonl", [FORMATS["alpaca"]] * 3)
    whole = (
        b"META:\n- {path: d.jsonl, weight: 2, limit: 2, template: vicuna}\n- {path: d.jsonl, split: val, system: x}\n"
    )
    for _ in range(120):
        raw = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            raw[rng.randrange(len(raw))] = rng.choice(b"\x1b{}[]:,-&*!|>'\"%@`#\n \t\0\xff019aZ")
        (tmp_path / "d.yaml").write_bytes(raw)
        try:
            load_sft(DataArgs(data_config=str(tmp_path / "d.yaml"), num_workers=0), tokenizer, 0)
        except ValueError as error:
            assert str(tmp_path) in str(error) and str(error).isprintable(), (bytes(raw), error)


def test_no_loss_is_nan(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Of what is left over from spoilt data, and of batches that hold no label: fillers, a prompt alone."""
    rng, losses = random.Random(3), []
    torch.manual_seed(0)
    model = Transformer(tiny_args(vocab_size=tokenizer.vocab_size)).init_weights()
    for format in FORMATS:
        for _ in range(12):
            write(tmp_path / "d.jsonl", [spoilt(FORMATS[format], rng), FORMATS[format]])
            for dataset in outcome(tmp_path / "d.jsonl", tokenizer, flags(rng, format) | {"max_seq_len": 60}):
                steps = {"batch_size": 1, "sequences_per_step": 3, "dp_rank": 1, "dp_size": 2, "seed": 0, "epoch": 0}
                batches = [b for w in train_windows(dataset, **steps) for b in w.micro_batches]
                batches += eval_batches(dataset, eval_batch_size=2, dp_rank=1, dp_size=2)
                for batch in batches:
                    loss, count, _ = model(
                        batch.tokens, labels=batch.labels, positions=batch.positions, cu_seqlens=batch.cu_seqlens
                    )
                    losses.append((loss.item(), int(count), int((batch.labels != -100).sum())))
                    loss.backward()
    assert all(loss == loss and loss < float("inf") for loss, _, _ in losses)
    assert all((loss == 0) == (count == 0) and count == labels for loss, count, labels in losses)
    assert {count == 0 for _, count, _ in losses} == {True, False}  # fillers came, and examples
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
