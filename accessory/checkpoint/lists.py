"""Several checkpoints as one, laid over each other strictly from left to right: --pretrained_path a,b,c.

    a   whole: any format, or an adapter with its base
    b   consolidated with some keys    wins key by key; LoRA keys lie over, with the terms of its config.json
        adapter                        ours or PEFT's: lies over what there is so far, whatever base it names
        consolidated_diff              is added, in fp32; the dtype so far is kept
        anything whole                 wins everywhere

params.json: a later one wins key by key where it speaks, but sizes that contradict are an error. The vocabulary may grow,
tok_embeddings and output together. The tokenizer is the last one that lies in one of the directories.
Test: tests/unit/test_lists.py
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accessory.checkpoint.difference import added_to
from accessory.checkpoint.formats import (
    LORA_SCALES,
    Checkpoint,
    finished,
    is_adapter,
    lay_adapter,
    open_checkpoint,
    open_kind,
    recognise,
)
from accessory.model.args import ModelArgs
from accessory.weights import Overlay, Renamed, Source, base_weight, check_keys, is_lora
from accessory.weights.diff import VOCABULARY, check_growth

SIZES = ("dim", "n_layers", "n_heads", "kv_heads", "head_size", "ffn_dim")
TERMS = ("lora_rank", "lora_alpha", *LORA_SCALES)  # what says how a LoRA is computed


def open_list(paths: Sequence[Path], pretrained_type: str | None = None, base: str | Path | None = None) -> Checkpoint:
    """`paths` as one checkpoint; `pretrained_type` and `base` speak of the first. Raises ValueError naming the directory."""
    checkpoint = open_checkpoint(paths[0], pretrained_type, base)
    _require_whole(checkpoint)
    for path in paths[1:]:
        later = _laid_over(checkpoint, path)
        later.params = _joined_params(checkpoint, later, path)
        beside = later.tokenizer and later.tokenizer.parent == (path.parent if path.is_file() else path)
        later.tokenizer = later.tokenizer if beside else checkpoint.tokenizer or later.tokenizer
        checkpoint = later
    _check_vocabulary(checkpoint)
    return finished(replace(checkpoint, path=Path(",".join(map(str, paths)))))


def _require_whole(first: Checkpoint) -> None:
    names = set(first.source.names())
    missing = [] if "tok_embeddings.weight" in names else ["tok_embeddings.weight"]
    if first.params:
        missing = check_keys(first.source, ModelArgs.from_dict(first.params, str(first.path)), first.adapter)["missing"]
    if missing:
        raise ValueError(
            f"{first.path}: is not whole ({len(missing)} keys missing, {missing[0]} among them): name a whole checkpoint "
            "first, then what lies over it"
        )


def _laid_over(so_far: Checkpoint, path: Path) -> Checkpoint:
    """The checkpoint that `path` makes of the one so far; its params and tokenizer are those of `path` alone."""
    if is_adapter(path):
        from accessory.checkpoint.adapter import fitted, open_adapter

        config, tensors = fitted(*open_adapter(path), so_far, path)
        _check_shapes(so_far, tensors, path)
        _check_lora(so_far, tensors, config, path)
        return lay_adapter(so_far, path, config, tensors)
    kind, files = recognise(path)
    if kind == "consolidated_diff":
        source, part = added_to(so_far, path)
        adapter = so_far.adapter
    else:
        part = open_kind(path, kind, files, so_far.params)
        _check_shapes(so_far, part.source, path)
        if part.adapter:
            _check_lora(so_far, part.source, part.adapter, path)
        source, adapter = Overlay(so_far.source, part.source), _joined_terms(so_far.adapter, part.adapter)
    head = ["output.weight" in checkpoint.source.names() for checkpoint in (so_far, part)]
    if head == [False, True]:
        part.params.setdefault("tie_word_embeddings", False)
    elif head == [True, False] and kind != "consolidated_diff" and _is_whole(so_far, part):
        part.params.setdefault("tie_word_embeddings", True)
        source = Renamed(source, {n: n for n in source.names() if n != "output.weight"})
    return replace(
        so_far,
        source=source,
        params=part.params,
        tokenizer=part.tokenizer,
        adapter=adapter,
        files=[*so_far.files, *files],
        parts=[*so_far.parts, path],
    )


def _is_whole(so_far: Checkpoint, part: Checkpoint) -> bool:
    """Whether `part` alone has all that the model needs, tied unless it says otherwise."""
    params = so_far.params | {"tie_word_embeddings": None} | part.params | {"vocab_size": -1}
    return bool(so_far.params) and not check_keys(part.source, ModelArgs.from_dict(params))["missing"]


def _check_shapes(so_far: Checkpoint, later: Source, path: Path) -> None:
    known = set(so_far.source.names())
    for name in later.names():
        if name in known and not is_lora(name):  # a LoRA may be replaced by one of another rank
            try:
                check_growth(name, so_far.source.shape(name), later.shape(name))
            except ValueError as error:
                raise ValueError(f"{path}, laid over {so_far.path}: {error}") from None


def _check_lora(so_far: Checkpoint, later: Source, terms: dict[str, Any], path: Path) -> None:
    """Raises ValueError when a LoRA of other terms would be left standing beside the later one: a model has one scale."""
    old, new = ({base_weight(n) for n in s.names() if is_lora(n)} for s in (so_far.source, later))
    then = so_far.adapter or {}
    odd = next((k for k in TERMS if (then.get(k) or None) != (terms.get(k) or None)), None)
    if odd and old - new:
        raise ValueError(
            f"{path}: its {odd} is {terms.get(odd)}, that of the LoRA in {so_far.path} is {then.get(odd)}, and it does not "
            f"replace all of that ({sorted(old - new)[0]}): merge the first one: tools/merge_lora.py"
        )


def _joined_terms(then: dict[str, Any] | None, now: dict[str, Any] | None) -> dict[str, Any] | None:
    """The later LoRA's terms, for the targets of both."""
    if not then or not now:
        return now or then
    targets = sorted({*then["lora_targets"], *now["lora_targets"]})
    return then | now | {"lora_targets": targets, "bias_tuning": then["bias_tuning"] or now["bias_tuning"]}


def _joined_params(then: Checkpoint, now: Checkpoint, path: Path) -> dict[str, Any]:
    """Later keys win. Raises ValueError naming both places when the sizes of the model would become others."""
    later = {k: v for k, v in now.params.items() if k != "vocab_size" or v > 0}
    joined = then.params | later
    if then.params and later:
        before, after = ModelArgs.from_dict(then.params, str(then.path)), ModelArgs.from_dict(joined, str(path))
        for key in SIZES:
            if getattr(before, key) != getattr(after, key):
                raise ValueError(
                    f"{path} says {key} {getattr(after, key)}, {then.path} {getattr(before, key)}: they are of different models"
                )
    return joined


def _check_vocabulary(checkpoint: Checkpoint) -> None:
    """Embedding and output have equally many rows, and params.json's vocab_size is their number."""
    source, params = checkpoint.source, checkpoint.params
    rows = {n: source.shape(n)[0] for n in VOCABULARY if n in source.names()}
    if params.get("tie_word_embeddings"):
        rows.pop("output.weight", None)
    parts = ",".join(map(str, checkpoint.parts))
    if len(set(rows.values())) > 1:
        raise ValueError(
            f"{parts}: {' and '.join(f'{n} has {count} rows' for n, count in rows.items())}: a vocabulary grows in both"
        )
    if params.get("vocab_size", -1) > 0:
        params["vocab_size"] = next(iter(rows.values()))
