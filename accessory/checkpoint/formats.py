"""Any checkpoint that is read, recognised by what lies in its directory, as one lazy Source with Meta's names.

    consolidated.00.pth ...                    meta_ori       Meta's: Llama 1, 2, 3, Code Llama
    consolidated.00-of-02.model.pth ...        consolidated   Accessory's and ours; maybe base and LoRA in one
    model*.safetensors + config.json           hf             Hugging Face: llama and mistral
    *.gguf                                     gguf           llama.cpp's, dequantised
    adapter.safetensors + adapter.json         (the base's)   ours: LoRA and what else was trained, laid over its base

`open_checkpoint(path)` answers with names, shapes and sizes; no weights are read until `source.read`. Readers are in
formats_read.py, writers in formats_write.py and adapter.py. Tests: tests/unit/test_formats.py
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accessory.checkpoint.formats_read import GGUFFile, SafetensorsFiles, TorchFile, read_json
from accessory.model.args import RUNTIME_KEYS, TUNING_KEYS
from accessory.weights import IGNORED_SUFFIXES, Overlay, Renamed, Source, gguf, hf, is_lora
from accessory.weights.reshard import Merged

KINDS = ("meta_ori", "consolidated", "hf", "gguf")
META_FILE = re.compile(r"consolidated\.(\d\d)\.pth")
OUR_FILE = re.compile(r"consolidated\.(\d\d)-of-(\d\d)\.model\.pth")
HF_FILE = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
HF_INDEX = "model.safetensors.index.json"
ADAPTER_FILE, ADAPTER_CONFIG = "adapter.safetensors", "adapter.json"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


@dataclass
class Checkpoint:
    """An opened checkpoint. `source`: whole tensors under Meta's names; of an adapter, base and adapter together."""

    path: Path
    kind: str  # one of KINDS; of an adapter, its base's
    source: Source
    params: dict[str, Any]  # params.json's keys; empty when the directory has none
    tokenizer: Path | None  # tokenizer.model or tokenizer.json beside the weights (Meta's lies one level up)
    embedding_dim: int | None  # 0 or 1: how the files split tok_embeddings; None for one file
    adapter: dict[str, Any] | None  # lora_rank, lora_alpha, ...: source also has lora_a/lora_b under these terms
    files: list[Path] = field(default_factory=list)  # the weight files
    metadata: dict[str, Any] = field(default_factory=dict)  # of a GGUF file: all its keys, the tokenizer's among them


def open_checkpoint(path: str | Path, pretrained_type: str | None = None, base: str | Path | None = None) -> Checkpoint:
    """Opens a directory, or a .gguf or .safetensors file, of any kind; `pretrained_type` insists on one of KINDS.

    `base`: where the base of an adapter directory is, when it is no longer where adapter.json says. Raises ValueError
    naming the path or file and the remedy."""
    path = Path(path)
    if pretrained_type is not None and pretrained_type not in KINDS:
        raise ValueError(f"--pretrained_type {pretrained_type}: choose one of {', '.join(KINDS)}")
    if (path / ADAPTER_CONFIG).is_file():
        return _open_over_base(path, base)
    kind, files = recognise(path, pretrained_type)
    checkpoint = {"meta_ori": _open_pth, "consolidated": _open_pth, "hf": _open_hf, "gguf": _open_gguf}[kind](
        path, kind, files
    )
    return _finish(checkpoint)


def recognise(path: Path, pretrained_type: str | None = None) -> tuple[str, list[Path]]:
    """(kind, its weight files in order). Raises ValueError when there is none, more than one, or a file is missing."""
    if path.is_file():
        kind = {".gguf": "gguf", ".safetensors": "hf"}.get(path.suffix)
        if kind is None:
            raise ValueError(
                f"{path} is a file: give the directory that holds it (a single .gguf or .safetensors may be given)"
            )
        if pretrained_type not in (None, kind):
            raise ValueError(f"--pretrained_type {pretrained_type}, but {path} is of type {kind}: leave the flag out")
        return kind, [path]
    if not path.is_dir():
        raise ValueError(f"--pretrained_path {path}: no such directory: give the one with the weight files")
    found = {kind: files for kind, files in _candidates(path).items() if files}
    if pretrained_type is not None:
        if pretrained_type not in found:
            raise ValueError(
                f"--pretrained_type {pretrained_type}, but {path} holds {' and '.join(found) or _nothing(path)}"
            )
        found = {pretrained_type: found[pretrained_type]}
    if not found:
        raise ValueError(f"{path} holds {_nothing(path)}")
    if len(found) > 1:
        raise ValueError(
            f"{path} holds checkpoints of several kinds, {' and '.join(found)}: choose with --pretrained_type"
        )
    [(kind, files)] = found.items()
    return kind, {"meta_ori": _meta_shards, "consolidated": _our_shards, "hf": _hf_files, "gguf": _gguf_file}[kind](
        path, files
    )


def _candidates(path: Path) -> dict[str, list[Path]]:
    files = sorted(p for p in path.iterdir() if p.is_file())
    safetensors = [
        p for p in files if p.suffix == ".safetensors" and not p.name.startswith(("adapter", "consolidated"))
    ]
    return {
        "meta_ori": [p for p in files if META_FILE.fullmatch(p.name)],
        "consolidated": [p for p in files if OUR_FILE.fullmatch(p.name)],
        "hf": [p for p in files if p.name == HF_INDEX] or safetensors,
        "gguf": [p for p in files if p.suffix == ".gguf"],
    }


def _nothing(path: Path) -> str:
    """What is there instead of a checkpoint, and what to do."""
    looked = "no consolidated.NN.pth, consolidated.NN-of-MM.model.pth, *.safetensors or *.gguf"
    if list(path.glob("pytorch_model*.bin")):
        return f"pytorch_model*.bin and {looked}: transformers' save_pretrained writes safetensors"
    if list(path.glob("*.model-diff.pth")):
        return f"only differences (*.model-diff.pth) and {looked}: give a whole checkpoint"
    if (path / "latest").exists():
        return f"{looked}: it is a run, its newest checkpoint is {path / 'latest'}"
    return f"{looked}: give the directory with the weight files"


def _meta_shards(path: Path, files: list[Path]) -> list[Path]:
    numbers = [int(META_FILE.fullmatch(p.name)[1]) for p in files]
    if gaps := sorted(set(range(max(numbers) + 1)) - set(numbers)):
        raise ValueError(
            f"{path}: consolidated.{gaps[0]:02d}.pth is missing, but consolidated.{max(numbers):02d}.pth is there: "
            "copy it too"
        )
    return files


def _our_shards(path: Path, files: list[Path]) -> list[Path]:
    parts = [OUR_FILE.fullmatch(p.name).groups() for p in files]
    if len({count for _, count in parts}) > 1:
        raise ValueError(
            f"{path}: {files[0].name} and {files[-1].name} are shards of different splits: keep one of them"
        )
    count = int(parts[0][1])
    numbers = [int(index) for index, _ in parts]
    if gaps := sorted(set(range(count)) - set(numbers)):
        raise ValueError(f"{path}: consolidated.{gaps[0]:02d}-of-{count:02d}.model.pth is missing: copy it too")
    if max(numbers) >= count:
        raise ValueError(f"{path}: {files[-1].name} cannot be one of {count} shards: remove it")
    return files


def _hf_files(path: Path, files: list[Path]) -> list[Path]:
    if files[0].name == HF_INDEX:
        return sorted(set(_weight_map(files[0]).values()))
    numbered = [m.groups() for p in files if (m := HF_FILE.fullmatch(p.name))]
    if not numbered and len(files) > 1 and path / "model.safetensors" in files:
        return [path / "model.safetensors"]
    for stem, _, count in numbered:
        for i in range(1, int(count) + 1):
            if not (file := path / f"{stem}-{i:05d}-of-{count}.safetensors").is_file():
                raise ValueError(f"{file}: this file of the checkpoint is missing: download it")
    return files


def _weight_map(index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map: download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index}: {name} is said to be in {file!r}, which is no file of this directory")
    return {name: index.parent / file for name, file in weight_map.items()}


def _gguf_file(path: Path, files: list[Path]) -> list[Path]:
    if len(files) > 1:
        raise ValueError(
            f"{path} holds {len(files)} .gguf files ({files[0].name}, {files[1].name}, ...): give the path of one"
        )
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", files[0].name):
        raise ValueError(f"{files[0]}: is a part of a split GGUF: join it with llama.cpp's gguf-split --merge")
    return files


def _open_pth(path: Path, kind: str, files: list[Path]) -> Checkpoint:
    params = _read_params(path)
    shards = []
    for file in files:
        shard = TorchFile(file)
        shards.append(Renamed(shard, {n: n for n in shard.names() if not n.endswith(IGNORED_SUFFIXES)}))
    source = Merged(shards, params, files)
    tokenizer = _tokenizer(path, TOKENIZER_FILES) or _tokenizer(path.parent, TOKENIZER_FILES[:1])
    return Checkpoint(path, kind, source, params, tokenizer, source.embedding_dim, _lora_inside(source, params), files)


def _read_params(path: Path) -> dict[str, Any]:
    """params.json, or Accessory's config.json, without nulls and without the keys of programs (LoRA is told by its
    tensors)."""
    for file in (path / "params.json", path / "config.json"):
        if file.is_file() and "hidden_size" not in (content := read_json(file)):
            return {k: v for k, v in content.items() if v is not None and k not in TUNING_KEYS + RUNTIME_KEYS}
    return {}


def _lora_inside(source: Source, params: dict[str, Any]) -> dict[str, Any] | None:
    """The terms of a LoRA beside its base: ours has its alpha in params.json, Accessory's no scale (alpha = rank). None
    without LoRA tensors."""
    lora = [n for n in source.names() if n.endswith(".lora_a.weight")]
    if not lora:
        return None
    ranks = sorted({source.shape(n)[0] for n in lora})
    if len(ranks) > 1:
        raise ValueError(
            f"{lora[0]}: LoRA of several ranks ({', '.join(map(str, ranks))}) in one checkpoint is not supported"
        )
    targets = sorted({n.split(".")[-3] for n in lora})
    bias = any(n.endswith(".bias") for n in source.names())
    alpha = float(params.get("lora_alpha", ranks[0]))
    terms = {"lora_rank": ranks[0], "lora_alpha": alpha, "lora_dropout": 0.0, "lora_targets": targets}
    return terms | {"modules_to_save": [], "bias_tuning": bias, "norm_tuning": False}


def _open_hf(path: Path, kind: str, files: list[Path]) -> Checkpoint:
    directory = path.parent if path.is_file() else path
    config = directory / "config.json"
    if not config.is_file():
        raise ValueError(f"{config}: is missing: a Hugging Face checkpoint needs it beside its safetensors")
    params = hf.params_from_config(read_json(config), config)
    index = directory / HF_INDEX
    weight_map = _weight_map(index) if path.is_dir() and index.is_file() else None
    source = hf.FromHF(
        SafetensorsFiles(files, weight_map), params.get("head_dim") or params["dim"] // params["n_heads"]
    )
    return Checkpoint(path, kind, source, params, _tokenizer(directory, TOKENIZER_FILES[::-1]), None, None, files)


def _open_gguf(path: Path, kind: str, files: list[Path]) -> Checkpoint:
    file = GGUFFile(files[0])
    factors = file.read(gguf.ROPE_FACTORS) if gguf.ROPE_FACTORS in file.names() else None
    params = gguf.params_from_metadata(file.metadata, files[0], factors)
    source = Renamed(file, gguf.meta_names(file.names()))
    return Checkpoint(
        path, kind, source, params, _tokenizer(files[0].parent, TOKENIZER_FILES), None, None, files, file.metadata
    )


def _tokenizer(directory: Path, names: tuple[str, ...]) -> Path | None:
    return next((directory / n for n in names if (directory / n).is_file()), None)


def _finish(checkpoint: Checkpoint) -> Checkpoint:
    """What the tensors tell and params.json does not: biases, and an output.weight that a tie makes superfluous."""
    names = checkpoint.source.names()
    for key, part in (("attention_bias", ".attention."), ("mlp_bias", ".feed_forward.")):
        if any(part in n and n.endswith(".bias") for n in names):
            checkpoint.params[key] = True  # also over a params.json written before bias tuning added them
    if checkpoint.params.get("tie_word_embeddings") and "output.weight" in names:
        checkpoint.source = Renamed(checkpoint.source, {n: n for n in names if n != "output.weight"})
    return checkpoint


def _open_over_base(path: Path, base: str | Path | None) -> Checkpoint:
    """An adapter directory: its tensors laid over its base."""
    from accessory.checkpoint.adapter import open_adapter, open_base

    config, tensors = open_adapter(path)
    checkpoint = open_base(config, path, base)
    known = set(checkpoint.source.names())
    for name in tensors.names():
        weight = name if not is_lora(name) else name.rsplit(".", 2)[0] + ".weight"
        if weight not in known and not weight.endswith(".bias") and weight != "output.weight":
            raise ValueError(
                f"{path / ADAPTER_FILE}: {name} has no counterpart in its base {checkpoint.path}: "
                "give the right one with --base"
            )
    checkpoint.params |= _read_params(path)
    if "output.weight" in tensors.names():
        checkpoint.params["tie_word_embeddings"] = False
    checkpoint.source = Overlay(checkpoint.source, tensors)
    tokenizer = _tokenizer(path, TOKENIZER_FILES) or checkpoint.tokenizer
    return _finish(
        Checkpoint(
            path,
            checkpoint.kind,
            checkpoint.source,
            checkpoint.params,
            tokenizer,
            checkpoint.embedding_dim,
            config,
            checkpoint.files,
        )
    )
