"""What a checkpoint, an adapter or a run is, and whether it is whole; or how two checkpoints differ.

python tools/inspect_checkpoint.py PATH [--against PATH] [--json] [--base DIR] [--pretrained_type KIND]
"""

import sys
from json import dumps
from typing import Any

from tqdm import tqdm

from accessory.checkpoint.describe import describe, lines
from accessory.checkpoint.formats import Checkpoint, open_checkpoint
from accessory.config import run_tool
from accessory.tokenizer import Tokenizer
from accessory.weights.compare import difference_lines, differences


def main(
    *,
    path: str,
    against: str | None = None,
    json: bool = False,
    base: str | None = None,
    pretrained_type: str | None = None,
) -> None:
    """PATH is any directory or file that can be read, a list a,b,c, or a run directory (its checkpoints, then the latest).

    Tells format, files, dtypes, sizes, tokenizer, adapter and base; the files of a run's checkpoint are hashed. What is
    damaged is named, and the exit code is then 1. --against compares with another checkpoint of any format, tensor by
    tensor (equal: bit for bit; exit code 0 whatever is found). --base says where an adapter's base is now. --json prints
    the same for programs."""
    if against is not None:
        a, b = open_checkpoint(path, pretrained_type, base), open_checkpoint(against)
        report = differences(a.source, b.source, lambda names: tqdm(names, "comparing", unit="tensor"))
        report |= {"a": str(a.path), "b": str(b.path)}
        return show(report, difference_lines(report), json)
    report, checkpoint = describe(path, pretrained_type, base, show_progress=True)
    if checkpoint and checkpoint.tokenizer:
        report["tokenizer"] |= tokenizer_facts(checkpoint, report)
    show(report, lines(report), json)
    if report["problems"]:
        raise ValueError(f"{report['problems'][0]}" + ("; and more above" if report["problems"][1:] else ""))


def tokenizer_facts(checkpoint: Checkpoint, report: dict[str, Any]) -> dict[str, Any]:
    try:
        tokenizer = Tokenizer.open(checkpoint.tokenizer)
    except ValueError as error:
        report["problems"].append(str(error))
        return {}
    spare = report.get("model", {}).get("vocab_size", tokenizer.vocab_size) - tokenizer.vocab_size
    fits = "fits" if spare == 0 else f"{abs(spare)} {'fewer' if spare > 0 else 'MORE'} than the embedding has rows"
    return {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "fits": fits}


def show(report: dict[str, Any], text: list[str], as_json: bool) -> None:
    print(dumps(report, indent=1) if as_json else "\n".join(text))


if __name__ == "__main__":
    words = sys.argv[1:]
    run_tool(main, [f"--path={words[0]}", *words[1:]] if words and not words[0].startswith("-") else words)
