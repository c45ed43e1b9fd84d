"""Several adapters over one base, in order: what tools/merge_lora.py writes down as one model.

    base --- adapter 1 (ours, or PEFT's) --- adapter 2 ...      the vocabulary may grow from one to the next
             its tokenizer                   its tokenizer      the last one that there is belongs to the result

Nothing is read but headers (and the base once, to compare its hash). Test: tests/unit/test_merge.py
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accessory.checkpoint.adapter import base_record, by_part, model_args, open_adapter, open_base
from accessory.checkpoint.formats import (
    TOKENIZER_FILES,
    Checkpoint,
    is_adapter,
    open_checkpoint,
    tokenizer_in,
    told_by_tensors,
)
from accessory.weights import Source
from accessory.weights.lora import VOCABULARY, Adapted, MergedLoRA, separated
from accessory.weights.peft import FromPEFT


@dataclass
class Stack:
    """Adapters over their base. `model` is the result, `params` and `tokenizer` are its own."""

    model: MergedLoRA
    params: dict[str, Any]
    tokenizer: Path | None
    warnings: list[str]


def stack(
    adapters: Sequence[str | Path],
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    show_progress: bool = False,
) -> Stack:
    """The adapters over `base`, or over the base that the first one names. Raises ValueError for one that does not fit, for a
    base that is not the adapter's (a warning, where it was named), and for vocabularies in the wrong order."""
    paths = [Path(p) for p in adapters]
    if twice := [p for i, p in enumerate(paths) if p in paths[:i]]:
        raise ValueError(f"--adapters names {twice[0]} twice: leave one out")
    opened = [_opened(path) for path in paths]
    root = _root(paths[0], opened[0][0], base)
    problem = another_base(opened[0][0], root, show_progress)
    if problem and base is None:
        raise ValueError(f"{paths[0]}: {problem}: say with --base which one is meant")
    source = separated(root.source)[0] if root.adapter else root.source
    check_order(source, paths, [tensors for _, tensors in opened])
    running, tokenizer, args = source, root.tokenizer, model_args(root)
    for path, (terms, tensors) in zip(paths, opened):
        if isinstance(tensors, FromPEFT):
            tensors = tensors.over(running, args)
            terms = tensors.terms
        running = Adapted(running, tensors, terms, path)
        tokenizer = tokenizer_in(path, TOKENIZER_FILES) or tokenizer
    assert isinstance(running, Adapted)
    names = running.names()
    params = root.params | {"vocab_size": running.shape(VOCABULARY[0])[0]} | told_by_tensors(names)
    params |= {"tie_word_embeddings": VOCABULARY[1] not in names}
    warnings = [f"warning: --base {root.path} is not the base of {paths[0]}: {problem}"] if problem else []
    first = by_part(_files_of(opened[0][0]))
    for path, (terms, _) in zip(paths[1:], opened[1:]):
        if first and by_part(_files_of(terms)) == first:
            warnings.append(
                f"warning: {path} was trained on the same base as {paths[0]}, not on the sum of both: if it went on from that "
                "one (--lora_path), it has its changes already: merge it alone"
            )
    return Stack(MergedLoRA(running, dtype), params, tokenizer, warnings)


def _files_of(terms: dict[str, Any]) -> dict[str, Any]:
    """What adapter.json keeps of its base's files: their hashes, else nothing."""
    return (terms.get("base") or {}).get("sha256") or {}


def _opened(path: Path) -> tuple[dict[str, Any], Source]:
    """(terms, tensors) of an adapter's directory, or of a checkpoint that holds base and LoRA together."""
    if is_adapter(path):
        return open_adapter(path)
    checkpoint = open_checkpoint(path)
    if checkpoint.adapter is None:
        raise ValueError(
            f"--adapters {path} holds no adapter.json, no adapter_config.json and no LoRA weights: "
            "give the directory that the run saved"
        )
    return checkpoint.adapter, separated(checkpoint.source)[1]


def _root(first: Path, terms: dict[str, Any], base: str | Path | None) -> Checkpoint:
    if base is not None:
        return open_checkpoint(base)
    return open_base(terms, first) if is_adapter(first) else open_checkpoint(first)


def another_base(terms: dict[str, Any], root: Checkpoint, show_progress: bool = False) -> str | None:
    """What tells that `root` is not what the adapter was trained on, by the sizes and sha256 that adapter.json keeps; None
    when it is, or when nothing was kept."""
    then = terms.get("base") or {}
    if not then.get("size"):
        return None
    if by_part(then["size"]) != by_part(base_record(root, hashes=False)["size"]):
        return f"it was trained on {then['path']}, whose files have other sizes"
    if then.get("sha256") and by_part(then["sha256"]) != by_part(base_record(root, True, show_progress)["sha256"]):
        return f"it was trained on {then['path']}, whose files have another sha256"
    return None


def check_order(base: Source, paths: Sequence[Path], adapters: Sequence[Source]) -> None:
    """Raises ValueError, with every row count and the order that fits, when a vocabulary would shrink."""
    own = base.shape(VOCABULARY[0])[0]
    rows = {path: found for path, tensors in zip(paths, adapters) if (found := _rows(tensors)) is not None}
    counts = [own, *rows.values()]
    if all(a <= b for a, b in zip(counts, counts[1:])):
        return
    table = ", ".join(f"{count} in {path}" for path, count in rows.items())
    if min(rows.values()) < own:
        raise ValueError(
            f"the base has {own} vocabulary rows, the adapters {table}: a vocabulary only grows: take the right base"
        )
    order = [path for path in paths if path not in rows] + sorted(rows, key=rows.__getitem__)
    raise ValueError(
        f"--adapters: the base has {own} vocabulary rows, the adapters {table}: a vocabulary only grows: "
        f"give --adapters {','.join(map(str, order))}"
    )


def _rows(adapter: Source) -> int | None:
    """Vocabulary rows of an adapter that has an embedding or a head; None without."""
    names = [
        n for n in adapter.names() if n in VOCABULARY or n in ("tok_embeddings.lora_b.weight", "output.lora_b.weight")
    ]
    return max((adapter.shape(n)[0] for n in names), default=None)
