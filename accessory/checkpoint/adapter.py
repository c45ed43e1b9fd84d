"""What a LoRA run saves: adapter.safetensors (what was trained, whole, Meta's names), adapter.json (terms and base).

    adapter.json   lora_rank lora_alpha lora_dropout lora_targets modules_to_save bias_tuning norm_tuning format_version
                   use_rslora rank_pattern alpha_pattern    where they say something
                   quant: "nf4"    the base was held in 4 bits; what is merged is added to the exact one all the same
                   base: {"path": ..., "size": {file: bytes}, "sha256": {file: hex}}; of a list of checkpoints path is a
                   list, and a file is named "0/model.safetensors" after the number of its part

The base itself is never copied: its path, sizes and hashes are, so that an adapter cannot be laid over another model by
accident. `open_adapter` opens PEFT's directories too. Test: tests/unit/test_merge.py, tests/unit/test_peft.py
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.formats import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    Checkpoint,
    finished,
    lay_adapter,
    open_checkpoint,
)
from accessory.checkpoint.formats_read import SafetensorsFiles, file_sha256, read_json
from accessory.checkpoint.formats_write import save_safetensors
from accessory.checkpoint.peft import PEFT_CONFIG, open_peft
from accessory.model.args import ModelArgs
from accessory.model.llama import global_shape
from accessory.model.lora import LINEARS, TuningArgs, linear_of, matches
from accessory.weights import Source, expected_shapes, is_lora, owned_slice
from accessory.weights.lora import lora_names
from accessory.weights.peft import FromPEFT, without_lora_on_ends

FORMAT_VERSION = 1
KEYS = "lora_rank lora_alpha lora_dropout lora_targets modules_to_save bias_tuning norm_tuning base".split()
OPTIONAL = ("use_rslora", "rank_pattern", "alpha_pattern")  # of terms that older adapters do not have


def base_record(checkpoint: Checkpoint, hashes: bool = True, show_progress: bool = False) -> dict[str, Any]:
    """What adapter.json keeps of its base. Hashing reads every weight file (about 1 GB/s): do it once a run, on one
    rank."""
    from tqdm import tqdm

    parts = [str(part.resolve()) for part in checkpoint.parts if checkpoint.files]  # none of random weights
    files = {_key(checkpoint.parts, f): f for f in checkpoint.files}
    record: dict[str, Any] = {
        "path": parts[0] if len(parts) == 1 else parts,
        "size": {key: f.stat().st_size for key, f in files.items()},
    }
    if hashes:
        bar = tqdm(files.items(), "hashing the base", unit="file", disable=not show_progress)
        record["sha256"] = {key: file_sha256(f) for key, f in bar}
    return record


def _key(parts: list[Path], file: Path) -> str:
    """A file's name in a base record: of several parts each has its number before it, 0/consolidated.00.pth."""
    if len(parts) == 1:
        return file.name
    return f"{next(i for i, part in enumerate(parts) if part in (file, file.parent))}/{file.name}"


def base_files(record: dict[str, Any]) -> dict[Path, int]:
    """File -> size of a base record, where it says that they are."""
    parts, files = [record["path"]] if isinstance(record["path"], str) else record["path"], {}
    for key, size in record.get("size", {}).items():
        number, _, name = key.rpartition("/")
        if number and not (number.isdigit() and int(number) < len(parts)):
            raise ValueError(f"{ADAPTER_CONFIG}: its base names a file {key} of {len(parts)} parts: copy it again")
        part = Path(parts[int(number or 0)])
        files[part if part.is_file() else part / name] = size
    return files


def place(record: dict[str, Any]) -> str:
    """Where a base record's base is, as --pretrained_path takes it."""
    return record["path"] if isinstance(record["path"], str) else ",".join(record["path"])


def by_part(entries: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    """A record's sizes or hashes without the files' names, part by part: what two records of one base have in common."""
    parts: dict[str, list[Any]] = {}
    for key, value in entries.items():
        parts.setdefault(key.rpartition("/")[0], []).append(value)
    return [(part, sorted(values)) for part, values in sorted(parts.items())]


def write_adapter(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    config: dict[str, Any],
    expect_trained: bool = True,
    args: ModelArgs | None = None,
) -> list[Path]:
    """Writes both files and reads them back: names, shapes, dtypes, and (unless this is step 0:
    `expect_trained=False`) that some lora_b is not zero. `tensors`: whole, under Meta's names. `args`: the model's, and then
    what is there must be all that the terms speak of. Raises ValueError when the file is not what was given or not whole.

    Called by one rank; the directory exists and is not published yet."""
    if missing := [k for k in KEYS if k not in config]:
        raise ValueError(f"{ADAPTER_CONFIG}: {', '.join(missing)} is missing")
    if not tensors:
        raise ValueError(f"{Path(directory) / ADAPTER_FILE}: there is nothing to save: no parameter was trained")
    directory = Path(directory)
    weights, terms = directory / ADAPTER_FILE, directory / ADAPTER_CONFIG
    save_safetensors({name: owned_slice(t.detach().cpu(), None, 0, None) for name, t in tensors.items()}, weights)
    terms.write_text(json.dumps({**config, "format_version": FORMAT_VERSION}, indent=2, sort_keys=True) + "\n")
    _, written = open_adapter(directory)
    if set(written.names()) != set(tensors):
        raise ValueError(f"{weights}: the tensors read back are not the ones written: check the disk")
    for name, tensor in tensors.items():
        if written.shape(name) != tuple(tensor.shape) or written.dtype(name) != tensor.dtype:
            raise ValueError(
                f"{weights}: {name} read back is {written.shape(name)} {written.dtype(name)}: check the disk"
            )
    if args is not None:
        check_whole(written, config, args, weights)
    lora_b = [n for n in written.names() if n.endswith(".lora_b.weight")]
    if expect_trained and lora_b and not any(torch.count_nonzero(written.read(n)) for n in lora_b):
        raise ValueError(f"{weights}: every lora_b is zero, training has changed nothing: check --lr and --trainable")
    return [weights, terms]


def check_whole(adapter: Source, terms: dict[str, Any], args: ModelArgs, where: object) -> None:
    """Raises ValueError naming `where` and the first tensor that is missing or has another shape than its model's: every
    linear that the terms give an adapter has both halves, and every other trained weight that they name is there."""
    names, tuning = set(adapter.names()), TuningArgs.from_terms(terms)
    everything = list(expected_shapes(args, bool(args.tie_word_embeddings)))
    linears = [linear_of(n) for n in everything if n.endswith(".weight") and n.split(".")[-2] in LINEARS]
    wanted = [half for n in linears if tuning.rank_of(n) for half in lora_names(f"{n}.weight")]
    wanted += [n for n in everything if tuning.norm_tuning and "norm." in n]
    wanted += [f"{n}.bias" for n in linears if tuning.bias_tuning]
    if missing := [n for n in wanted if n not in names]:
        raise ValueError(
            f"{where}: {missing[0]} is missing ({len(missing)} such): the adapter is not whole, save it again"
        )
    for saved in tuning.modules_to_save:
        saved = "tok_embeddings" if saved == "output" and args.tie_word_embeddings else saved
        if not any(matches(n, saved) for n in names):
            raise ValueError(
                f"{where}: nothing of {saved} (modules_to_save) is in it: the adapter is not whole, save it again"
            )
    for name in names:
        if adapter.shape(name) != (shape := global_shape(args, name, tuning.rank_of(name))):
            raise ValueError(
                f"{where}: {name} is {adapter.shape(name)}, not {shape}: the adapter is not whole, save it again"
            )


def open_adapter(directory: str | Path) -> tuple[dict[str, Any], Source]:
    """(terms, tensors) of an adapter, ours or PEFT's, under Meta's names. Raises ValueError naming the file and the key when
    they do not belong together. `fitted` makes of them what lies over a certain base."""
    directory = Path(directory)
    if not (directory / ADAPTER_CONFIG).is_file() and (directory / PEFT_CONFIG).is_file():
        return open_peft(directory)
    terms, weights = directory / ADAPTER_CONFIG, directory / ADAPTER_FILE
    for file in (terms, weights):
        if not file.is_file():
            raise ValueError(f"{file}: is missing: an adapter is {ADAPTER_CONFIG} and {ADAPTER_FILE}")
    config = read_json(terms)
    if missing := [k for k in KEYS if k not in config]:
        raise ValueError(f"{terms}: {', '.join(missing)} is missing")
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{terms}: format_version {config.get('format_version')}, this version reads {FORMAT_VERSION}")
    source, tuning = SafetensorsFiles([weights]), TuningArgs.from_terms(config)
    for name in source.names():
        rank = source.shape(name)[0 if name.endswith("lora_a.weight") else -1]
        if is_lora(name) and rank != (said := tuning.rank_of(name)):
            raise ValueError(f"{weights}: {name} has rank {rank}, but lora_rank in {terms.name} is {said}")
    return config, source


def fitted(terms: dict[str, Any], tensors: Source, base: Checkpoint, where: object) -> tuple[dict[str, Any], Source]:
    """(terms, tensors) of an adapter as they lie over `base`: PEFT's in Meta's row order, with a LoRA on the embedding or the
    head made a whole weight. Ours are that already."""
    if not isinstance(tensors, FromPEFT):
        return terms, tensors
    adapter = tensors.over(base.source, model_args(base))
    whole, changed = without_lora_on_ends(adapter, adapter.terms, base.source, where)
    return changed | {"base": terms["base"]}, whole


def model_args(checkpoint: Checkpoint) -> ModelArgs:
    """The sizes of an opened checkpoint, vocabulary and tie as its tensors have them. Raises ValueError without params."""
    if not checkpoint.params:
        raise ValueError(f"{checkpoint.path} has no params.json or config.json: copy it beside the weights")
    rows = checkpoint.source.shape("tok_embeddings.weight")[0]
    tied = "output.weight" not in checkpoint.source.names()
    return ModelArgs.from_dict(
        checkpoint.params | {"vocab_size": rows, "tie_word_embeddings": tied}, str(checkpoint.path)
    )


def with_adapter(checkpoint: Checkpoint, lora_path: str | Path, tuning: TuningArgs) -> tuple[Checkpoint, TuningArgs]:
    """(base with the adapter at `lora_path` over it, the flags with its terms): training goes on where that adapter stopped.

    `tuning`: the flags; where they say nothing the adapter's terms hold, and where they say otherwise, it is an error that
    names both. Files and path of the result are the base's, so that the next adapter stands on the same one."""
    directory = Path(lora_path)
    if checkpoint.adapter is not None:
        raise ValueError(
            f"--lora_path {lora_path}: {checkpoint.path} has LoRA inside: merge it with tools/merge_lora.py first"
        )
    if not (directory / ADAPTER_CONFIG).is_file() and not (directory / PEFT_CONFIG).is_file():
        raise ValueError(
            f"--lora_path {lora_path}: holds no {ADAPTER_CONFIG} and no {PEFT_CONFIG}: give an adapter's directory"
        )
    terms, tensors = fitted(*open_adapter(directory), checkpoint, directory)
    laid = finished(lay_adapter(checkpoint, directory, terms, tensors))
    check_whole(tensors, terms, model_args(laid), directory)
    on_its_base = replace(laid, path=checkpoint.path, files=checkpoint.files, parts=checkpoint.parts)
    return on_its_base, _agreed(tuning, TuningArgs.from_terms(terms), lora_path)


def _agreed(flags: TuningArgs, terms: TuningArgs, where: object) -> TuningArgs:
    """The adapter's terms with what the flags may add: dropout, further modules in full, norms and biases."""
    given, default = getattr(flags, "given", frozenset()), TuningArgs()
    if flags.trainable:
        raise ValueError(
            f"--trainable with --lora_path {where}: what it freezes would be missing in the next adapter: leave it out"
        )
    chosen = {}
    for key in KEYS[:-1] + list(OPTIONAL):
        ours, theirs = getattr(flags, key), getattr(terms, key)
        if key not in given and ours == getattr(default, key):
            continue
        if key in ("lora_targets", "modules_to_save"):
            ours, theirs = sorted(ours), sorted(theirs)
        more = key == "modules_to_save" and set(ours) >= set(theirs) or key in ("norm_tuning", "bias_tuning") and ours
        if key == "lora_dropout" or more:
            chosen[key] = ours
        elif ours != theirs:
            shown = [",".join(map(str, v)) if isinstance(v, list) else v for v in (ours, theirs)]
            raise ValueError(f"--{key} {shown[0]}, but {where} was trained with {key} {shown[1]}: leave the flag out")
    agreed = replace(terms, **chosen)
    agreed.given = given  # type: ignore[attr-defined]
    return agreed


def open_base(config: dict[str, Any], adapter: Path, base: str | Path | None = None) -> Checkpoint:
    """The checkpoint that an adapter was trained on: where adapter.json says, or at `base`. Raises ValueError naming
    the path and --pretrained_path when it is gone or its files have another size."""
    if base is not None:
        return open_checkpoint(base)
    record = config["base"]
    paths = [record["path"]] if isinstance(record["path"], str) else record["path"]
    if paths == [""]:
        raise ValueError(f"{adapter / PEFT_CONFIG}: does not name its base: say where it is with --base")
    if gone := [p for p in paths if not Path(p).exists()]:
        named_in = ADAPTER_CONFIG if (adapter / ADAPTER_CONFIG).is_file() else PEFT_CONFIG
        raise ValueError(f"{adapter / named_in}: its base {gone[0]} is not there: say where it is with --base")
    for file, size in base_files(record).items():
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is gone" if found is None else f"has {found} bytes, not {size}"
            raise ValueError(f"{file}: {state}, so it is not the base of {adapter}: give the right one with --base")
    return open_checkpoint([Path(p) for p in paths])
