"""Any checkpoint that is read, recognised by what lies in its directory, as one lazy Source with Meta's names.

    consolidated.00.pth ...                    meta_ori       Meta's: Llama 1, 2, 3, Code Llama
    consolidated.00-of-02.model.pth ...        consolidated   Accessory's and ours; maybe base and LoRA in one
    consolidated.00-of-02.model-diff.pth ...   (the base's)   differences; only after a base, in a list
    model*.safetensors + config.json           hf             Hugging Face: llama, mistral, qwen2, qwen3
    pytorch_model*.bin + config.json           hf             the same in its older files
    *.gguf                                     gguf           llama.cpp's, dequantised
    adapter.safetensors + adapter.json         (the base's)   ours: LoRA and what else was trained, laid over its base

`open_checkpoint(path)` answers with names, shapes and sizes; no weights are read until `source.read`. "a,b,c" is a list,
laid over each other from left to right (lists.py). Readers are in formats_read.py, writers in formats_write.py and
adapter.py. Tests: tests/unit/test_formats.py
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from accessory.checkpoint.formats_read import GGUFFile, SafetensorsFiles, TorchFile, TorchFiles, read_json
from accessory.checkpoint.peft import PEFT_CONFIG
from accessory.model.args import RUNTIME_KEYS, TUNING_KEYS
from accessory.weights import IGNORED_SUFFIXES, Overlay, Renamed, Source, TensorSource, gguf, hf, is_lora
from accessory.weights.reshard import Merged

KINDS = ("meta_ori", "consolidated", "hf", "gguf")
META_FILE = re.compile(r"consolidated\.(\d\d)\.pth")
OUR_FILE = re.compile(r"consolidated\.(\d\d)-of-(\d\d)\.model(?:-diff)?\.pth")
DIFF_SUFFIX = ".model-diff.pth"
HF_FILE = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
HF_BIN = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin")
HF_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
ADAPTER_FILE, ADAPTER_CONFIG = "adapter.safetensors", "adapter.json"
ADAPTER_FILES = (ADAPTER_FILE, "adapter_model.safetensors", "adapter_model.bin")
LORA_SCALES = ("use_rslora", "rank_pattern", "alpha_pattern")  # terms of a LoRA that say more than rank and alpha
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


@dataclass
class Checkpoint:
    """An opened checkpoint. `source`: whole tensors under Meta's names; of an adapter, base and adapter together."""

    path: Path  # of a list all of them with commas between, for messages
    kind: str  # one of KINDS; of an adapter its base's, of a list the first's
    source: Source
    params: dict[str, Any]  # params.json's keys; empty when the directory has none
    tokenizer: Path | None  # tokenizer.model or tokenizer.json beside the weights (Meta's lies one level up)
    embedding_dim: int | None  # 0 or 1: how the files split tok_embeddings; None for one file
    adapter: dict[str, Any] | None  # lora_rank, lora_alpha, ...: source also has lora_a/lora_b under these terms
    files: list[Path] = field(default_factory=list)  # the weight files, of all parts
    metadata: dict[str, Any] = field(default_factory=dict)  # of a GGUF file: all its keys, the tokenizer's among them
    parts: list[Path] = field(default_factory=list)  # what it is made of, in order; an adapter: its base and itself

    def __post_init__(self) -> None:
        self.parts = self.parts or [self.path]


def without_files(name: str, kind: str, params: dict[str, Any]) -> Checkpoint:
    """A checkpoint without weights, for a model that draws its own."""
    return Checkpoint(Path(name), kind, TensorSource({}), params, None, None, None)


def open_checkpoint(
    path: str | Path | Sequence[str | Path], pretrained_type: str | None = None, base: str | Path | None = None
) -> Checkpoint:
    """Opens a directory, or a .gguf or .safetensors file, of any kind; `pretrained_type` insists on one of KINDS. A list,
    or "a,b,c", is a whole checkpoint and what is laid over it, in order (see lists.py); both flags speak of the first.

    `base`: where the base of an adapter directory is, when it is no longer where adapter.json says. Raises ValueError
    naming the path or file and the remedy."""
    if pretrained_type is not None and pretrained_type not in KINDS:
        raise ValueError(f"--pretrained_type {pretrained_type}: choose one of {', '.join(KINDS)}")
    path, *later = paths_of(path)
    if later:
        from accessory.checkpoint.lists import open_list

        return open_list([path, *later], pretrained_type, base)
    if is_adapter(path):
        return _open_over_base(path, base)
    kind, files = recognise(path, pretrained_type)
    if kind == "consolidated_diff":
        raise ValueError(
            f"{path} holds only differences (*{DIFF_SUFFIX}): name what they are added to before it: BASE,{path}"
        )
    return finished(open_kind(path, kind, files))


def paths_of(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """One path, a list, or "a,b,c" (a path with a comma in its name that exists is one path)."""
    if not isinstance(path, (str, Path)):
        paths = [Path(p).expanduser() for p in path]
    elif Path(path).exists() or "," not in str(path):
        return [Path(path).expanduser()]
    else:
        paths = [Path(part.strip()).expanduser() for part in str(path).split(",") if part.strip()]
    if not paths:
        raise ValueError(f"--pretrained_path {path}: names no directory")
    return paths


def is_adapter(path: Path) -> bool:
    return (path / ADAPTER_CONFIG).is_file() or (path / PEFT_CONFIG).is_file()


def open_kind(path: Path, kind: str, files: list[Path], known: dict[str, Any] | None = None) -> Checkpoint:
    """The files of one kind as they are. `known`: the params of the checkpoint that this is a part of."""
    if kind in ("hf", "gguf"):
        return {"hf": _open_hf, "gguf": _open_gguf}[kind](path, kind, files)
    return _open_pth(path, kind, files, known or {})


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
    check = {"meta_ori": _meta_shards, "hf": _hf_files, "gguf": _gguf_file}.get(kind, _our_shards)
    return kind, check(path, files)


def _candidates(path: Path) -> dict[str, list[Path]]:
    files = sorted(p for p in path.iterdir() if p.is_file())
    safetensors = [
        p for p in files if p.suffix == ".safetensors" and not p.name.startswith(("adapter", "consolidated"))
    ]
    return {
        "meta_ori": [p for p in files if META_FILE.fullmatch(p.name)],
        "consolidated": [p for p in files if OUR_FILE.fullmatch(p.name) and not p.name.endswith(DIFF_SUFFIX)],
        "consolidated_diff": [p for p in files if OUR_FILE.fullmatch(p.name) and p.name.endswith(DIFF_SUFFIX)],
        "hf": [p for p in files if p.name == HF_INDEXES[0]]
        or safetensors  # where both are there, the same weights are in both
        or [p for p in files if p.name == HF_INDEXES[1]]
        or [p for p in files if HF_BIN.fullmatch(p.name)],
        "gguf": [p for p in files if p.suffix == ".gguf"],
    }


def _nothing(path: Path) -> str:
    """What is there instead of a checkpoint, and what to do."""
    looked = "no consolidated.NN.pth, consolidated.NN-of-MM.model.pth, *.safetensors, pytorch_model*.bin or *.gguf"
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
        name = re.sub(r"\d\d", f"{gaps[0]:02d}", files[0].name, count=1)
        raise ValueError(f"{path}: {name} is missing: copy it too")
    if max(numbers) >= count:
        raise ValueError(f"{path}: {files[-1].name} cannot be one of {count} shards: remove it")
    return files


def _hf_files(path: Path, files: list[Path]) -> list[Path]:
    if files[0].name in HF_INDEXES:
        return sorted(set(_weight_map(files[0]).values()))
    numbered = [m.groups() for p in files if (m := HF_FILE.fullmatch(p.name))]
    if not numbered and len(files) > 1 and path / "model.safetensors" in files:
        return [path / "model.safetensors"]
    for stem, _, count, suffix in numbered:
        for i in range(1, int(count) + 1):
            if not (file := path / f"{stem}-{i:05d}-of-{count}.{suffix}").is_file():
                raise ValueError(f"{file}: this file of the checkpoint is missing: download it")
    return files


def _weight_map(index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map: download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or re.search(r"[/\\\0]", file):
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


def _open_pth(path: Path, kind: str, files: list[Path], known: dict[str, Any]) -> Checkpoint:
    params = _read_params(path)
    shards = []
    for file in files:
        shard = TorchFile(file)
        shards.append(Renamed(shard, {n: n for n in shard.names() if not n.endswith(IGNORED_SUFFIXES)}))
    source = Merged(shards, known | params, files)
    tokenizer = tokenizer_in(path, TOKENIZER_FILES) or tokenizer_in(path.parent, TOKENIZER_FILES[:1])
    lora = _lora_inside(source, _params_file(path))
    return Checkpoint(path, kind, source, params, tokenizer, source.embedding_dim, lora, files)


def _read_params(path: Path) -> dict[str, Any]:
    """params.json, or Accessory's config.json, without nulls and without the keys of programs (LoRA is told by its
    tensors)."""
    return {k: v for k, v in _params_file(path).items() if k not in TUNING_KEYS + RUNTIME_KEYS}


def _params_file(path: Path) -> dict[str, Any]:
    for file in (path / "params.json", path / "config.json"):
        if file.is_file() and "hidden_size" not in (content := read_json(file)):
            return {k: v for k, v in content.items() if v is not None}
    return {}


def _lora_inside(source: Source, params: dict[str, Any]) -> dict[str, Any] | None:
    """The terms of a LoRA beside its base: ours has them in params.json, Accessory's no scale (alpha = rank). None
    without LoRA tensors."""
    lora = [n for n in source.names() if n.endswith(".lora_a.weight")]
    if not lora:
        return None
    ranks = sorted({source.shape(n)[0] for n in lora})
    if len(ranks) > 1 and not params.get("rank_pattern"):
        raise ValueError(
            f"{lora[0]}: LoRA of several ranks ({', '.join(map(str, ranks))}) in one checkpoint is not supported"
        )
    targets = sorted({n.split(".")[-3] for n in lora})
    told = told_by_tensors(source.names())
    bias = "attention_bias" in told and "mlp_bias" in told  # bias tuning gives all seven: Qwen2's q, k, v are its own
    rank = params["lora_rank"] if len(ranks) > 1 else ranks[0]
    alpha = float(params.get("lora_alpha", rank))
    terms = {"lora_rank": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "lora_targets": targets}
    terms |= {k: params[k] for k in LORA_SCALES if params.get(k)}
    return terms | {"modules_to_save": [], "bias_tuning": bias, "norm_tuning": False}


def _open_hf(path: Path, kind: str, files: list[Path]) -> Checkpoint:
    directory = path.parent if path.is_file() else path
    config = directory / "config.json"
    if not config.is_file():
        raise ValueError(f"{config}: is missing: a Hugging Face checkpoint needs it beside its weights")
    params = hf.params_from_config(read_json(config), config)
    bin_files = files[0].suffix == ".bin"
    index = directory / HF_INDEXES[bin_files]
    weight_map = _weight_map(index) if path.is_dir() and index.is_file() else None
    weights = (TorchFiles if bin_files else SafetensorsFiles)(files, weight_map)
    source = hf.FromHF(weights, params.get("head_dim") or params["dim"] // params["n_heads"])
    if params.get("tie_word_embeddings") and not _head_is_embedding(source):
        raise ValueError(
            f"{config}: tie_word_embeddings is true, but lm_head.weight is not the embedding, and programs differ in which "
            "of the two they believe (transformers 4 the one, 5 the other): say false where the head was trained"
        )
    return Checkpoint(path, kind, source, params, tokenizer_in(directory, TOKENIZER_FILES[::-1]), None, None, files)


def _head_is_embedding(source: Source, at_once: int = 4096) -> bool:
    """Whether the head is not there, or holds the same numbers as the embedding."""
    embedding, head = "tok_embeddings.weight", "output.weight"
    if not {embedding, head} <= set(source.names()):
        return True
    rows = source.shape(head)[0]
    cuts = [(a, min(a + at_once, rows)) for a in range(0, rows, at_once)]
    return source.shape(head) == source.shape(embedding) and all(
        torch.equal(source.read(head, 0, *cut), source.read(embedding, 0, *cut)) for cut in cuts
    )


def _open_gguf(path: Path, kind: str, files: list[Path]) -> Checkpoint:
    file = GGUFFile(files[0])
    factors = file.read(gguf.ROPE_FACTORS) if gguf.ROPE_FACTORS in file.names() else None
    params = gguf.params_from_metadata(file.metadata, files[0], factors)
    head_dim = params.get("head_dim") or params["dim"] // params["n_heads"]
    source = gguf.from_gguf(file, file.metadata["general.architecture"], head_dim)
    return Checkpoint(
        path, kind, source, params, tokenizer_in(files[0].parent, TOKENIZER_FILES), None, None, files, file.metadata
    )


def tokenizer_in(directory: Path, names: tuple[str, ...]) -> Path | None:
    return next((directory / n for n in names if (directory / n).is_file()), None)


def finished(checkpoint: Checkpoint) -> Checkpoint:
    """What the tensors tell and params.json does not: biases, norms of q and k, and an output.weight that a tie makes superfluous."""
    names = checkpoint.source.names()
    checkpoint.params |= told_by_tensors(names)  # also over a params.json written before bias tuning added them
    if checkpoint.params.get("tie_word_embeddings") and "output.weight" in names:
        checkpoint.source = Renamed(checkpoint.source, {n: n for n in names if n != "output.weight"})
    return checkpoint


def told_by_tensors(names: list[str]) -> dict[str, bool]:
    """The params.json keys that are true because such tensors are there: biases (wo's means all four), norms of q and k."""
    parts = {".".join(n.split(".")[-3:]) for n in names}
    qkv = any(f"attention.{linear}.bias" in parts for linear in ("wq", "wk", "wv"))
    told = {
        "attention_bias": "attention.wo.bias" in parts,
        "qkv_bias": qkv and "attention.wo.bias" not in parts,
        "mlp_bias": any(p.startswith("feed_forward.") and p.endswith(".bias") for p in parts),
        "qk_norm": "attention.q_norm.weight" in parts,
    }
    return {key: True for key, there in told.items() if there}


def _open_over_base(path: Path, base: str | Path | None) -> Checkpoint:
    """An adapter directory: its tensors laid over its base."""
    from accessory.checkpoint.adapter import open_adapter, open_base

    config, tensors = open_adapter(path)
    return finished(lay_adapter(open_base(config, path, base), path, config, tensors))


def lay_adapter(checkpoint: Checkpoint, path: Path, config: dict[str, Any], tensors: Source) -> Checkpoint:
    """`checkpoint` with the adapter at `path` over it. Raises ValueError for a tensor that has no counterpart in it."""
    from accessory.checkpoint.adapter import fitted

    config, tensors = fitted(config, tensors, checkpoint, path)
    known = set(checkpoint.source.names())
    files = [f for name in ADAPTER_FILES if (f := path / name).is_file()]
    for name in tensors.names():
        weight = name if not is_lora(name) else name.rsplit(".", 2)[0] + ".weight"
        if weight not in known and not weight.endswith(".bias") and weight != "output.weight":
            raise ValueError(
                f"{files[0]}: {name} has no counterpart in its base {checkpoint.path}: give the right one with --base"
            )
    params = checkpoint.params | _read_params(path)
    if "output.weight" in tensors.names():
        params["tie_word_embeddings"] = False
    if "tok_embeddings.weight" in tensors.names():
        params["vocab_size"] = tensors.shape("tok_embeddings.weight")[0]  # it may have grown
    return replace(
        checkpoint,
        path=path,
        source=Overlay(checkpoint.source, tensors),
        params=params,
        tokenizer=tokenizer_in(path, TOKENIZER_FILES) or checkpoint.tokenizer,
        adapter=config,
        files=[*checkpoint.files, *files],
        parts=[*checkpoint.parts, path],
    )
