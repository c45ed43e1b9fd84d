"""A tuned model as its difference from the model it was tuned from, for publishing it, and the tuned model again.

python tools/weight_diff.py make    --raw DIR --tuned DIR --dst DIR [--mp 1] [--dtype fp32]
python tools/weight_diff.py recover --raw DIR --diff DIR --dst DIR [--format meta|hf] [--mp 1]

The flags are named as in Stanford Alpaca's weight_diff.py: there are two sources, so there is no --src. Any format that can
be read is taken, at any number of shards. `make --help` and `recover --help` tell more.
"""

import sys
from pathlib import Path

from accessory.checkpoint.difference import check_tuned, recover, write_difference
from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.formats_write import dtype_of, new_directory, special_ids, write_hf, write_meta
from accessory.config import run_tool
from accessory.model.args import ModelArgs
from accessory.tokenizer import Tokenizer
from accessory.weights.hf import hf_name
from accessory.weights.report import mapping_lines


def make(*, raw: str, tuned: str, dst: str, mp: int = 1, dtype: str | None = None) -> None:
    """Writes tuned - raw as consolidated.NN-of-MM.model-diff.pth, with what makes it exact and the hashes of both models.

    --raw and --tuned are checkpoints of any format; tuned may have more vocabulary rows, and tensors that raw has not.
    --dtype of the differences is tuned's own by default; whatever it is, `recover` gives tuned back bit for bit.
    --pretrained_path RAW,DST opens the tuned model without recovering it. --dst must not exist."""
    before, after = open_checkpoint(raw), open_checkpoint(tuned)
    with new_directory(dst) as directory:
        report = write_difference(directory, after, before, mp, dtype_of(dtype), show_progress=True)
    model, stored = after.source, dtype_of(dtype)
    print(*mapping_lines((n, n, model.shape(n), stored or model.dtype(n)) for n in model.names()), sep="\n")
    print(f"{dst}: {report['tensors']} differences, {report['corrected']} of {report['numbers']} numbers corrected")


def recovering(
    *, raw: str, diff: str, dst: str, format: str = "meta", mp: int = 1, max_shard_size: str = "5GB"
) -> None:
    """Writes raw + difference, after raw was found to be the very model that the difference was made from (the first tensor
    that is not is named), and reads the result back: it is the tuned model bit for bit, or nothing is written.

    --format meta writes consolidated.NN.pth in --mp shards, hf a Hugging Face directory. --dst must not exist."""
    if format not in ("meta", "hf"):
        raise ValueError(f"--format {format}: choose meta or hf")
    base = open_checkpoint(raw)
    source, difference, record = recover(base, Path(diff), show_progress=True)
    tokenizer = difference.tokenizer or base.tokenizer
    with new_directory(dst) as directory:
        if format == "meta":
            write_meta(directory, source, difference.params, tokenizer, shards=mp, show_progress=True)
        else:
            args, ids = ModelArgs.from_dict(difference.params), special_ids(tokenizer and Tokenizer.open(tokenizer))
            write_hf(directory, source, args, tokenizer, None, max_shard_size, ids, show_progress=True)
        check_tuned(open_checkpoint(directory).source, record, Path(diff), show_progress=True)
    to = (lambda n: hf_name(n) or n) if format == "hf" else str
    print(*mapping_lines((n, to(n), source.shape(n), source.dtype(n)) for n in source.names()), sep="\n")
    print(f"{dst}: the tuned model, {len(record['tuned'])} tensors checked")


if __name__ == "__main__":
    command, *rest = sys.argv[1:] or ["--help"]
    if command not in ("make", "recover"):
        print(__doc__.strip())
        sys.exit(0 if command in ("--help", "-h") else f"error: {command}: write make or recover first")
    run_tool({"make": make, "recover": recovering}[command], rest)
