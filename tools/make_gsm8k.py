"""GSM8K as published -> the data of the Anyscale template: questions and answers between four tokens of their own.

    python tools/make_gsm8k.py --src grade-school-math/data --dst gsm8k
    python tools/merge_tokenizer.py --base llama/tokenizer.model --special_tokens gsm8k/tokens.json --dst tokenizer

DST gets train.jsonl, test.jsonl ({"input": "<START_Q>question<END_Q><START_A>answer<END_A>"}) and tokens.json, as that
template's create_dataset.py writes them. Test: pytest tests/unit/test_mixtures.py
"""

import json
from collections.abc import Iterator
from pathlib import Path

from accessory import config, log
from accessory.checkpoint.formats_write import new_directory
from accessory.data.formats import text_of
from accessory.data.records import read_jsonl

TOKENS = ["<START_Q>", "<END_Q>", "<START_A>", "<END_A>"]
SPLITS = ("train", "test")


def main(*, src: str, dst: str) -> None:
    """Formats GSM8K for fine-tuning with special tokens.

    --src  a directory with the published train.jsonl and test.jsonl (or gsm8k_train.jsonl, gsm8k_test.jsonl)
    --dst  a new directory: train.jsonl, test.jsonl, tokens.json"""
    files = {split: find(Path(src), split) for split in SPLITS}
    with new_directory(dst) as directory:
        counts = {}
        for split, file in files.items():
            lines = list(rows(file))
            (directory / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
            counts[split] = len(lines)
        (directory / "tokens.json").write_text(json.dumps({"tokens": TOKENS}), encoding="utf-8")
    log.say(
        f"{dst}: {counts['train']} rows to train on, {counts['test']} to test, tokens.json with {len(TOKENS)} tokens"
    )


def find(directory: Path, split: str) -> Path:
    for name in (f"{split}.jsonl", f"gsm8k_{split}.jsonl"):
        if (directory / name).is_file():
            return directory / name
    raise ValueError(f"--src {directory}: no {split}.jsonl there: name the directory of GSM8K's published files")


def rows(file: Path) -> Iterator[str]:
    """The lines for a published file's lines. ValueError names the first that has no question or answer."""
    for item, where in read_jsonl(file):
        if not isinstance(item, dict):
            raise ValueError(f'{where}: not a record: expected {{"question": ..., "answer": ...}}')
        question, answer = text_of(item, "question", where), text_of(item, "answer", where)
        yield json.dumps({"input": "{1}{0[0]}{2}{3}{0[1]}{4}".format((question, answer), *TOKENS)}) + "\n"


if __name__ == "__main__":
    config.run_tool(main)
