"""Writers, the readers' mirror: Meta's shards and Hugging Face's directory, from a lazy Source, under Meta's names.

    with new_directory(dst) as directory:          # DST.tmp-PID, renamed to DST when everything is on the disk
        write_meta(directory, source, params, shards=2)    consolidated.00-of-02.model.pth ... params.json
        write_hf(directory, source, args, tokenizer)       model-00001-of-00003.safetensors ... config.json

One tensor is held at a time: files are laid out first and filled in place (formats_stream.py). Tests:
tests/unit/test_writers.py, tests/unit/test_formats.py, tests/unit/test_hf.py
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.formats_stream import Specs, specs_of, write_safetensors, write_torch
from accessory.model.args import ModelArgs, check_model_parallel
from accessory.weights import Renamed, Source, expected_shapes, hf, require_keys
from accessory.weights.reshard import split, split_shapes

TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "template.json"),  # data/carried.py
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_of(flag: str | None) -> torch.dtype | None:
    """--dtype bf16, fp16 or fp32; None: as in the file."""
    if flag is not None and flag not in DTYPES:
        raise ValueError(f"--dtype {flag}: choose one of {', '.join(DTYPES)}")
    return DTYPES[flag] if flag else None


def embedding_dim_of(flag: int) -> int:
    """--embedding_dim 0 or 1."""
    if flag not in (0, 1):
        raise ValueError(f"--embedding_dim {flag}: choose 0 (Llama 3) or 1 (Llama 1, 2, Code Llama)")
    return flag


@contextlib.contextmanager
def new_directory(dst: str | Path) -> Iterator[Path]:
    """A directory that becomes `dst` only when the block ends well: until then it is `dst`.tmp-PID, which a failure
    removes.

    Raises ValueError when `dst` is already there. Called by one rank."""
    dst = Path(dst).expanduser()
    if dst.exists() or dst.is_symlink():
        raise ValueError(f"--dst {dst} is already there: choose another, or remove it first")
    dst.parent.mkdir(parents=True, exist_ok=True)
    directory = dst.with_name(f"{dst.name}.tmp-{os.getpid()}")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        yield directory
        for path in [*directory.iterdir(), directory]:
            sync(path)
        os.replace(directory, dst)
        sync(dst.parent)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def sync(path: Path) -> None:
    """Forces a file, or a directory's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_consolidated(
    directory: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    params: dict[str, Any] | None = None,
    index: int = 0,
    count: int = 1,
    style: str = "consolidated",
    specs: Specs | None = None,
) -> Path:
    """Writes shard `index` of `count` as a flat dict, and params.json when `params` is given; returns the shard's file.

    With `specs` the tensors may be lazy: one is held at a time. `style`: "meta_ori" names the file consolidated.00.pth,
    "consolidated" consolidated.00-of-02.model.pth, "consolidated_diff" consolidated.00-of-02.model-diff.pth."""
    suffix = {"meta_ori": "", "consolidated": ".model", "consolidated_diff": ".model-diff"}[style]
    assert 0 <= index < count <= 99
    name = f"consolidated.{index:02d}{f'-of-{count:02d}' if suffix else ''}{suffix}.pth"
    file = Path(directory) / name
    if specs is None:
        tensors = list(tensors)
        specs = specs_of(dict(tensors))
    write_torch(file, specs, tensors)
    if params is not None:
        write_json(Path(directory) / "params.json", params)
    return file


def save_safetensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Tensors in memory as a .safetensors file, with a full disk as a user's error."""
    write_safetensors(file, specs_of(tensors), tensors.items())


def write_meta(
    directory: str | Path,
    source: Source,
    params: dict[str, Any],
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    shards: int = 1,
    embedding_dim: int = 0,
    style: str = "meta_ori",
    show_progress: bool = False,
) -> list[Path]:
    """A whole Meta-style directory: shards, params.json, tokenizer files. Checked against `params` first
    (ValueError)."""
    params = completed(source, params)
    args = ModelArgs.from_dict(params)
    check_model_parallel(args, shards, flag="--mp")
    require_keys(source, args, "the weights")
    source = Renamed(source, {n: n for n in expected_shapes(args, args.tie_word_embeddings)})  # the model's order
    files = []
    with progress(source, shards, show_progress) as step:
        for rank in range(shards):
            shapes = split_shapes(source, args, shards, rank, embedding_dim)
            specs = {name: (shape, dtype or source.dtype(name)) for name, shape in shapes.items()}
            tensors = (step(name, tensor, dtype) for name, tensor in split(source, args, shards, rank, embedding_dim))
            files.append(write_consolidated(directory, tensors, params, rank, shards, style, specs))
    copy_tokenizer(tokenizer, Path(directory))
    return files


def completed(source: Source, params: dict[str, Any]) -> dict[str, Any]:
    """params.json's keys with vocab_size and the tie as the tensors have them."""
    params = {k: v for k, v in params.items() if v is not None}
    if params.get("vocab_size", -1) < 0 and "tok_embeddings.weight" in source.names():
        params["vocab_size"] = source.shape("tok_embeddings.weight")[0]
    params.setdefault("tie_word_embeddings", "output.weight" not in source.names())
    return params


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`. ValueError where fp16 cannot hold a number: it would be inf from here on."""
    result = tensor.to(dtype)
    if dtype == torch.float16 != tensor.dtype and (lost := result.isinf() & tensor.isfinite()).any():
        largest = tensor[lost].abs().max().item()
        raise ValueError(f"{name}: {largest:.4g} is more than fp16 holds (65504): take --dtype bf16")
    return result


@contextlib.contextmanager
def progress(source: Source, times: int, show: bool) -> Iterator[Any]:
    """A bar over the source's tensors; yields step(name, tensor, dtype) -> (name, tensor in dtype)."""
    from tqdm import tqdm

    with tqdm(total=len(source.names()) * times, desc="writing", unit="tensor", disable=not show) as bar:

        def step(name: str, tensor: Tensor, dtype: torch.dtype | None) -> tuple[str, Tensor]:
            bar.update()
            return name, cast(name, tensor, dtype) if dtype else tensor

        yield step


def write_hf(
    directory: str | Path,
    source: Source,
    args: ModelArgs,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    special_ids: dict[str, Any] | None = None,
    show_progress: bool = False,
) -> list[Path]:
    """A directory that transformers loads: safetensors (with an index when several), config.json in both dialects,
    generation_config.json, tokenizer files. `special_ids`: bos_token_id and eos_token_id (a number or a list)."""
    directory = Path(directory)
    args = ModelArgs.from_dict(completed(source, args.to_dict()))
    require_keys(source, args, "the weights")
    target = hf.ToHF(source, args)
    dtype = dtype or source.dtype("tok_embeddings.weight")
    config = hf.config_from_args(args, dtype, special_ids)
    groups = _grouped(target, dtype, parse_size(max_shard_size))
    weight_map: dict[str, str] = {}
    with progress(target, 1, show_progress) as step:
        for i, names in enumerate(groups, 1):
            file = "model.safetensors" if len(groups) == 1 else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
            specs = {n: (target.shape(n), dtype) for n in names}
            write_safetensors(directory / file, specs, (step(n, target.read(n), dtype) for n in names))
            weight_map |= {name: file for name in names}
    if len(groups) > 1:
        total = sum(_bytes(target, n, dtype) for n in target.names())
        write_json(
            directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", {"_from_model_config": True, **(special_ids or {})})
    copy_tokenizer(tokenizer, directory)
    if tokenizer and not (directory / "tokenizer_config.json").exists():
        if config := _tokenizer_config(tokenizer, special_ids or {}):
            write_json(directory / "tokenizer_config.json", config)
    return [directory / file for file in sorted(set(weight_map.values()))]


def _tokenizer_config(tokenizer: Path, special_ids: dict[str, Any]) -> dict[str, Any]:
    """What transformers needs to open a bare tokenizer file; nothing for Llama 3's tiktoken file, which it cannot open."""
    if _is_json(tokenizer):
        added = {t["id"]: t["content"] for t in json.loads(tokenizer.read_text("utf-8-sig")).get("added_tokens") or ()}
        named = {key: special_ids.get(f"{key}_id") for key in ("bos_token", "eos_token")}
        named = {key: added.get(i[0] if isinstance(i, list) else i) for key, i in named.items()}
        kept = {"clean_up_tokenization_spaces": False}  # or transformers 4 takes spaces out of what it decodes
        return {"tokenizer_class": "PreTrainedTokenizerFast"} | kept | {k: v for k, v in named.items() if v is not None}
    if tokenizer.read_bytes()[:1] != b"\n":  # sentencepiece's files start with their first piece
        return {}
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(tokenizer))
    ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    names = {name: model.id_to_piece(i) for name, i in ids.items() if i >= 0}
    return {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True, **names}


def special_ids(tokenizer: Any) -> dict[str, Any]:
    """bos_token_id and eos_token_id (a list when an answer may end in several ways) of an opened tokenizer, or of
    None."""
    stops = list(getattr(tokenizer, "eos_ids", ()))
    ids = {
        "bos_token_id": getattr(tokenizer, "bos_id", None),
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
    }
    return {k: v for k, v in ids.items() if v is not None}


def _bytes(source: Source, name: str, dtype: torch.dtype) -> int:
    return torch.Size(source.shape(name)).numel() * dtype.itemsize


def _grouped(source: Source, dtype: torch.dtype, limit: int) -> list[list[str]]:
    """Names in order, in groups of at most `limit` bytes (a larger tensor is alone)."""
    groups, size = [[]], 0  # type: ignore[var-annotated]
    for name in source.names():
        count = _bytes(source, name, dtype)
        if groups[-1] and size + count > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += count
    return groups


def parse_size(text: int | str) -> int:
    """'5GB', '500MB', '100KB' or a number of bytes -> bytes (powers of ten, as Hugging Face counts)."""
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3}
    word = str(text).strip().upper()
    try:
        size = int(float(word.removesuffix(word[-2:])) * units[word[-2:]]) if word[-2:] in units else int(word)
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"--max_shard_size {text}: expected a size such as 5GB or 500MB")
    return size


def copy_tokenizer(tokenizer: Path | None, directory: Path) -> None:
    """The tokenizer's file under its standard name, with the files beside it that belong to it."""
    if tokenizer is None:
        return
    if not tokenizer.is_file():
        raise ValueError(f"--tokenizer_path {tokenizer}: no such file")
    shutil.copyfile(tokenizer, directory / f"tokenizer.{'json' if _is_json(tokenizer) else 'model'}")
    for name in TOKENIZER_FILES:
        if (beside := tokenizer.with_name(name)).is_file() and not (directory / name).exists():
            shutil.copyfile(beside, directory / name)


def _is_json(tokenizer: Path) -> bool:
    """Told by the content: Mistral's file is called tokenizer.model.v1."""
    with open(tokenizer, "rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
