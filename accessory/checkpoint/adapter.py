"""What a LoRA run saves: adapter.safetensors (what was trained, whole, Meta's names), adapter.json (terms and base).

    adapter.json   lora_rank lora_alpha lora_dropout lora_targets modules_to_save bias_tuning norm_tuning format_version
                   base: {"path": ..., "size": {file: bytes}, "sha256": {file: hex}}

The base itself is never copied: its path, sizes and hashes are, so that an adapter cannot be laid over another model by
accident. Test: tests/unit/test_merge.py
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.formats import ADAPTER_CONFIG, ADAPTER_FILE, Checkpoint, open_checkpoint
from accessory.checkpoint.formats_read import SafetensorsFiles, file_sha256, read_json
from accessory.checkpoint.formats_write import save_safetensors
from accessory.model.args import TUNING_KEYS
from accessory.weights import Source, is_lora, owned_slice

FORMAT_VERSION = 1
KEYS = (*TUNING_KEYS, "base")


def base_record(checkpoint: Checkpoint, hashes: bool = True, show_progress: bool = False) -> dict[str, Any]:
    """What adapter.json keeps of its base. Hashing reads every weight file (about 1 GB/s): do it once a run, on one
    rank."""
    from tqdm import tqdm

    record: dict[str, Any] = {
        "path": str(checkpoint.path.resolve()),
        "size": {f.name: f.stat().st_size for f in checkpoint.files},
    }
    if hashes:
        files = tqdm(checkpoint.files, "hashing the base", unit="file", disable=not show_progress)
        record["sha256"] = {f.name: file_sha256(f) for f in files}
    return record


def write_adapter(
    directory: str | Path, tensors: Mapping[str, Tensor], config: dict[str, Any], expect_trained: bool = True
) -> list[Path]:
    """Writes both files and reads them back: names, shapes, dtypes, and (unless this is step 0:
    `expect_trained=False`) that some lora_b is not zero. `tensors`: whole, under Meta's names. Raises ValueError when
    the file is not what was given.

    Called by one rank; the directory exists and is not published yet."""
    if missing := [k for k in KEYS if k not in config]:
        raise ValueError(f"{ADAPTER_CONFIG}: {', '.join(missing)} is missing")
    assert tensors, "an adapter without tensors"
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
    lora_b = [n for n in written.names() if n.endswith(".lora_b.weight")]
    if expect_trained and lora_b and not any(torch.count_nonzero(written.read(n)) for n in lora_b):
        raise ValueError(f"{weights}: every lora_b is zero, training has changed nothing: check --lr and --trainable")
    return [weights, terms]


def open_adapter(directory: str | Path) -> tuple[dict[str, Any], Source]:
    """(adapter.json, the tensors). Raises ValueError naming the file and the key when they do not belong together."""
    directory = Path(directory)
    terms, weights = directory / ADAPTER_CONFIG, directory / ADAPTER_FILE
    for file in (terms, weights):
        if not file.is_file():
            raise ValueError(f"{file}: is missing: an adapter is {ADAPTER_CONFIG} and {ADAPTER_FILE}")
    config = read_json(terms)
    if missing := [k for k in KEYS if k not in config]:
        raise ValueError(f"{terms}: {', '.join(missing)} is missing")
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{terms}: format_version {config.get('format_version')}, this version reads {FORMAT_VERSION}")
    source = SafetensorsFiles([weights])
    for name in source.names():
        rank = source.shape(name)[0 if name.endswith("lora_a.weight") else -1]
        if is_lora(name) and rank != config["lora_rank"]:
            raise ValueError(
                f"{weights}: {name} has rank {rank}, but lora_rank in {terms.name} is {config['lora_rank']}"
            )
    return config, source


def open_base(config: dict[str, Any], adapter: Path, base: str | Path | None = None) -> Checkpoint:
    """The checkpoint that an adapter was trained on: where adapter.json says, or at `base`. Raises ValueError naming
    the path and --pretrained_path when it is gone or its files have another size."""
    if base is not None:
        return open_checkpoint(base)
    record = config["base"]
    path = Path(record["path"])
    if not path.exists():
        raise ValueError(f"{adapter / ADAPTER_CONFIG}: its base {path} is not there: say where it is with --base")
    for name, size in record.get("size", {}).items():
        file = path if path.is_file() else path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is gone" if found is None else f"has {found} bytes, not {size}"
            raise ValueError(f"{file}: {state}, so it is not the base of {adapter}: give the right one with --base")
    return open_checkpoint(path)
