"""The quick start's instruction set (exps/data): counts, schema, text, house style, lengths, and a clean split.

    output:  <direct answer>  /  <one to three lines of support>  /  In short: <five to ten words>.

A word is a run of non-spaces with a letter or digit in it.
Run: PYTHONPATH=. python -m pytest -q tests/unit/test_instructions.py
"""

import json
import re
import unicodedata
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "exps" / "data"
COUNTS = {"train": 260, "val": 40}
FIELDS = ("instruction", "input", "output")
NGRAM = 8


def load(split: str) -> list[dict]:
    text = (DATA / f"instructions_{split}.jsonl").read_bytes().decode("utf-8", errors="strict")
    assert text.endswith("\n")
    return [json.loads(line) for line in text[:-1].split("\n")]


def words(text: str) -> list[str]:
    return [w for w in text.split() if any(c.isalnum() for c in w)]


def normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def ngrams(text: str, n: int = NGRAM) -> set[str]:
    tokens = normal(text).split()
    return {" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    return {split: load(split) for split in COUNTS}


@pytest.fixture(scope="module")
def examples(splits) -> list[dict]:
    return splits["train"] + splits["val"]


def test_counts_and_schema(splits):
    for split, count in COUNTS.items():
        assert len(splits[split]) == count
        for x in splits[split]:
            assert tuple(x) == FIELDS, x
            assert all(isinstance(v, str) and v == v.strip() for v in x.values()), x
            assert x["instruction"] and x["output"], x


def test_about_a_third_have_an_input(splits):
    for split, rows in splits.items():
        assert 0.30 <= sum(bool(x["input"]) for x in rows) / len(rows) <= 0.40, split


def test_text_is_clean(examples):
    """NFC, newlines only in outputs, no byte-order mark, control or replacement characters, no addresses or links."""
    for x in examples:
        text = "".join(x.values())
        assert unicodedata.is_normalized("NFC", text), x
        assert not {"\ufffd", "\ufeff"} & set(text), x
        assert all(c == "\n" or unicodedata.category(c) not in ("Cc", "Cf") for c in text), x
        assert "\n" not in x["instruction"] + x["input"], x
        assert not re.search(r"https?://|\w@\w", text), x


def test_house_style(examples):
    for x in examples:
        first, *support, last = x["output"].split("\n")
        assert first.endswith((".", '."', '".', '?"')) and not first.startswith("- "), x
        assert 1 <= len(support) <= 3 and all(line.strip() for line in support), x
        assert last.startswith("In short: ") and last.endswith("."), x
        assert 5 <= len(words(last.removeprefix("In short: "))) <= 10, x
        assert x["output"].count("In short:") == 1, x


def test_lengths(examples):
    for x in examples:
        assert 6 <= len(words(x["instruction"])) <= 20, x
        assert len(words(x["input"])) <= 40, x
        assert 25 <= len(words(x["output"])) <= 60, x
    assert 35 <= sum(len(words(x["output"])) for x in examples) / len(examples) <= 45


@pytest.mark.parametrize("field", FIELDS)
def test_no_duplicates(examples, field):
    seen = [normal(x[field]) for x in examples if x[field]]
    assert len(seen) == len(set(seen))


def test_last_lines_are_all_different(examples):
    assert len({normal(x["output"].split("\n")[-1]) for x in examples}) == len(examples)


@pytest.mark.parametrize("field", FIELDS)
def test_no_ngram_crosses_the_split(splits, field):
    train = set().union(*(ngrams(x[field]) for x in splits["train"]))
    for x in splits["val"]:
        assert not ngrams(x[field]) & train, x


def test_the_overlap_rule_can_fail():
    assert ngrams("One two three, four five six seven EIGHT.") & ngrams("so one two three four five six seven eight")
    assert not ngrams("one two three four five six seven") & ngrams("one two three four five six seven")
