"""Adapter directories of Hugging Face's PEFT: adapter_config.json beside adapter_model.safetensors or adapter_model.bin.

What the names and fields mean is in weights/peft.py and peft_config.py; here are the files. Written as PEFT writes them.
Test: tests/unit/test_peft.py
"""

import json
from pathlib import Path
from typing import Any

from accessory.checkpoint.formats_read import SafetensorsFiles, TorchFile, read_json
from accessory.checkpoint.formats_write import save_safetensors
from accessory.model.args import ModelArgs
from accessory.weights import Source
from accessory.weights.peft import FromPEFT, ToPEFT
from accessory.weights.peft_config import config_from_terms

PEFT_CONFIG = "adapter_config.json"
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # the first that is there, as PEFT does


def open_peft(directory: Path) -> tuple[dict[str, Any], FromPEFT]:
    """(terms, tensors) of a PEFT adapter whose base is not known yet; `FromPEFT.over` fits it to one."""
    config = read_json(directory / PEFT_CONFIG)
    file = next((directory / name for name in PEFT_FILES if (directory / name).is_file()), None)
    if file is None:
        raise ValueError(f"{directory}: holds {PEFT_CONFIG}, but neither {' nor '.join(PEFT_FILES)}: copy it too")
    source = SafetensorsFiles([file]) if file.suffix == ".safetensors" else TorchFile(file)
    adapter = FromPEFT(source, config, None, directory)
    return adapter.terms | {"base": {"path": config.get("base_model_name_or_path") or ""}}, adapter


def write_peft(directory: Path, adapter: Source, terms: dict[str, Any], args: ModelArgs, base: str | None) -> ToPEFT:
    """Writes an adapter of ours as PEFT's and reads it back; returns what was written. `args`: its base's; `base`: what
    base_model_name_or_path shall say."""
    config = config_from_terms(terms, args, adapter.names(), base)
    target = ToPEFT(adapter, args)
    save_safetensors({n: target.read(n) for n in sorted(target.names())}, directory / PEFT_FILES[0])
    (directory / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
    _, written = open_peft(directory)
    if set(written.raw.names()) != set(target.names()):
        raise ValueError(f"{directory / PEFT_FILES[0]}: the tensors read back are not the ones written: check the disk")
    return target
