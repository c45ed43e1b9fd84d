"""From a checkpoint, in any format that is read, to a model on this rank: `Transformer.from_pretrained(path)` and its steps.

    open_pretrained -> sizes -> build: Transformer on meta, adapters, keys checked -> fill: one parameter's slice at a time
                                                                  (QLoRA: quantise) -^

Strict: a missing, unexpected or mis-shaped key is an error that lists them; only what fine-tuning adds may be absent.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Sequence

import torch
from torch import nn

from accessory.flags import ParallelArgs
from accessory.model.args import ModelArgs, read_params
from accessory.model.calibrate import Calibration
from accessory.model.llama import Transformer, global_shape, local_range, pad_rows, set_parameter
from accessory.model.lora import TuningArgs, add_tuning, initial_value, linears, packed_weights
from accessory.model.quant import STORAGE, Layout, pack, tables
from accessory.parallel import groups
from accessory.parallel.fsdp import DTYPES

FRESH = "fresh"  # the kind of a checkpoint without files, whose weights are drawn


def load(
    path: str | Path | Sequence[str | Path],
    model_parallel_size: int = 1,
    pretrained_type: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    llama_config: str | Path | Sequence[str | Path] = (),
    base: str | Path | None = None,
    mapped: bool = True,
) -> Transformer:
    """A model for inference or research, in eval mode: Meta, Accessory, Hugging Face, GGUF, an adapter saved by a run, or
    several laid over each other: a list, or "a,b,c" (checkpoint/lists.py).

    Under torchrun with model_parallel_size=n every rank calls it and gets its share; `model(tokens)` gives the same full
    logits on all. dtype: None keeps the embedding's. device: None is that of an earlier call, else this rank's GPU or the
    CPU. base: where an adapter's base is, when it is no longer where its adapter.json says. mapped: on the CPU, weights that
    a file holds as they are wanted stay pages of that file, read when they are used and given back when memory is short. To change them changes no
    file; a file that is written over or cut while the model lives changes the model, or ends the process with SIGBUS (one
    that is deleted, or replaced by another of its name, does not). False copies all.
    Raises ValueError naming file and key for anything that does not fit."""
    if not path:
        raise ValueError(f"path {path!r}: name the checkpoint's file or directory")
    dtype = dtype_named(dtype)
    groups.init(model_parallel_size, on=device)
    configs = [llama_config] if isinstance(llama_config, (str, Path)) else llama_config
    checkpoint, args = open_pretrained(path, pretrained_type, configs, base)
    model = build(checkpoint, args, carried_tuning(checkpoint))
    dtype = dtype or checkpoint.source.dtype("tok_embeddings.weight")
    fill(model, checkpoint, dtype_of=lambda name: dtype, device=groups.device(), mapped=mapped)
    return model.eval()


def dtype_named(given: torch.dtype | str | None) -> torch.dtype | None:
    """A torch dtype, or one by its name, torch's or that of --precision."""
    found = DTYPES.get(given) or getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if found is None and given is None:
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype {given!r}: expected torch.float32, torch.bfloat16 or torch.float16, or a name: bf16")
    return found


def open_pretrained(
    path: str | Path | Sequence[str | Path],
    pretrained_type: str | None = None,
    llama_config: Sequence[str | Path] = (),
    base: str | Path | None = None,
) -> tuple[Any, ModelArgs]:
    """(Checkpoint, ModelArgs) without reading weights. `llama_config` files replace the checkpoint's own params; `base`
    says where an adapter's base is now. Vocabulary and tying come from the tensors where the files leave them open."""
    from accessory.checkpoint.formats import open_checkpoint

    checkpoint = open_checkpoint(path, pretrained_type, base)
    path = checkpoint.path
    params = read_params(llama_config) if llama_config else dict(checkpoint.params)
    if not params:
        raise ValueError(f"{path} has no params.json or config.json: name one with --llama_config (see model_configs/)")
    for key in ("attention_bias", "qkv_bias", "mlp_bias", "qk_norm"):  # told by the tensors
        params.setdefault(key, checkpoint.params.get(key))
    args = ModelArgs.from_dict(params, " + ".join(map(str, llama_config)) if llama_config else str(path))
    names = set(checkpoint.source.names())
    if "tok_embeddings.weight" not in names:
        raise ValueError(f"{path}: there is no tok_embeddings.weight in it: not a whole LLaMA checkpoint")
    if args.tie_word_embeddings is False and "output.weight" not in names:
        raise ValueError(f"{path}: output.weight is missing, while its params say tie_word_embeddings is false")
    rows = checkpoint.source.shape("tok_embeddings.weight")[0]
    tied = args.tie_word_embeddings if args.tie_word_embeddings is not None else "output.weight" not in names
    return checkpoint, replace(
        args, vocab_size=rows if args.vocab_size < 1 else args.vocab_size, tie_word_embeddings=tied
    )


def open_fresh(llama_config: Sequence[str | Path], vocab_size: int) -> tuple[Any, ModelArgs]:
    """(an empty Checkpoint, ModelArgs) for training from random weights: `fill` draws them. `vocab_size`: where the files
    leave it open."""
    from accessory.checkpoint.formats import without_files

    args = ModelArgs.from_files(llama_config)
    args = replace(
        args,
        vocab_size=args.vocab_size if args.vocab_size > 0 else vocab_size,
        tie_word_embeddings=bool(args.tie_word_embeddings),
    )
    return without_files("random weights", FRESH, args.to_dict()), args


def carried_tuning(checkpoint: Any) -> TuningArgs:
    """The adapters that the checkpoint itself brings; no tuning when it brings none."""
    return TuningArgs.from_terms(checkpoint.adapter or {})


def build(checkpoint: Any, args: ModelArgs, tuning: TuningArgs) -> Transformer:
    """The empty model with what the tuning adds; every key and shape checked against the files."""
    model = Transformer(args)
    add_tuning(model, tuning)
    if checkpoint.kind != FRESH:
        check_keys(model, checkpoint, tuning)
    return model


def check_keys(model: Transformer, checkpoint: Any, tuning: TuningArgs) -> None:
    """Raises ValueError with the first missing, unexpected and mis-shaped keys and how many of each there are."""
    found = set(checkpoint.source.names())
    expected = {name: global_shape(model.args, name, tuning.rank_of(name)) for name, _ in model.named_parameters()}
    carried = carried_tuning(checkpoint)
    spare = (
        {"output.weight"} if model.args.tie_word_embeddings else set()
    )  # a tied model's file may repeat the embedding
    shapes = {n: tuple(checkpoint.source.shape(n)) for n in expected if n in found}
    report = {
        "missing": [
            n
            for n in expected
            if n not in found and not (_added(n, tuning) and not (".lora_" in n and carried.rank_of(n)))
        ],
        "unexpected": sorted(found - set(expected) - spare),
        "of another shape": [
            f"{n} {list(shapes[n])}, not {list(expected[n])}" for n in shapes if shapes[n] != expected[n]
        ],
    }
    parts = [f"{len(v)} {k}: {', '.join(v[:3])}{', ...' if len(v) > 3 else ''}" for k, v in report.items() if v]
    if parts:
        remedy = (
            "check --llama_config against the checkpoint's own params.json, and that every shard is there and no other"
        )
        raise ValueError(f"{checkpoint.path} does not fit the model's sizes: {'; '.join(parts)}: {remedy}")


def _added(name: str, tuning: TuningArgs) -> bool:
    return ".lora_" in name or (tuning.bias_tuning and name.endswith(".bias"))


def quantise(model: Transformer, parallel: ParallelArgs) -> None:
    """Under --quant, makes the weight of every frozen linear of the layers the empty tensor of its NF4 form (quant.py), which
    `fill` then fills. Call after mark_trainable. Raises ValueError when no linear is frozen."""
    if parallel.quant is None:
        return
    frozen = [(n, m) for n, m in linears(model) if not m.weight.requires_grad]
    if not frozen:
        raise ValueError(f"--quant {parallel.quant} is for frozen weights, and all are trained: add --lora_rank 8")
    for name, linear in frozen:
        dim, start, _ = local_range(model.args, f"{name}.weight")
        first = (start, 0) if dim == 0 else (0, start)
        linear.packed = Layout(*linear.weight.shape, *first, *global_shape(model.args, f"{name}.weight"))
        empty = torch.empty(linear.packed.nbytes // STORAGE.itemsize, dtype=STORAGE, device="meta")
        linear.weight = nn.Parameter(empty, requires_grad=False)


def on_host(device: torch.device | str) -> bool:
    return torch.device(device).type == "cpu"


def fill(
    model: Transformer,
    checkpoint: Any,
    dtype_of: Callable[[str], torch.dtype | None],
    device: torch.device | str = "cpu",
    seed: int = 0,
    after_block: Callable[[nn.Module], None] | None = None,
    show_progress: bool = False,
    calibrate_on: Sequence[Any] | None = None,
    mapped: bool = False,
) -> None:
    """Reads this rank's slice of every parameter, one at a time. dtype_of(name): None keeps the file's. Where `quantise` was
    called it is collective over mp, with `calibrate_on`, batches of this dp rank whose tokens decide how weights are rounded
    (calibrate.py), over all ranks.

    `after_block(layer)` is called once a layer is full, so that it can be sharded over dp before the next one is read.
    `mapped`: on the CPU, what the file holds as it is wanted is not copied, see `load`."""
    from tqdm import tqdm

    source, known, pages = checkpoint.source, set(checkpoint.source.names()), set[int]()
    packed, table = packed_weights(model), tables(device)
    calibration: Calibration | None = None

    def fill_packed(name: str) -> None:
        linear, storage = packed[name], model.get_parameter(name).dtype
        dim, start, stop = local_range(model.args, name)
        start, stop = (start, stop) if dim == 0 else linear.packed.needed_columns
        value = read(name, dim, start, stop).to(device)
        if calibration is not None:
            return calibration.hold(linear, value)  # it is packed when all of its layer is there
        set_parameter(model, name, pack(value, linear.packed, storage))
        linear.table = table

    def fill_one(name: str) -> None:
        if name in packed:
            return fill_packed(name)
        if name in known:
            dim, start, stop = local_range(model.args, name)
            value = read(name, *((dim, start, stop) if dim is not None else ()))
            # sent as it lies in the file: half the bytes where it becomes fp32, which a GPU does better
            value = pad_rows(value.to(device), model.get_parameter(name).shape)
        else:
            value = initial_value(model, name, seed).to(device)
        set_parameter(model, name, value.to(dtype_of(name) or value.dtype).contiguous())

    def read(name: str, *part: Any) -> torch.Tensor:
        """A copy, but of what may stay where it is: in no file twice, or two parameters would be one. For a GPU the file's own
        pages: to copy them on the host first takes longer than to send them."""
        if not on_host(device):
            return getattr(source, "view", source.read)(name, *part)
        wanted, before = dtype_of(name) or source.dtype(name), len(pages)
        if mapped and wanted == source.dtype(name):
            value = getattr(source, "view", source.read)(name, *part)
            pages.add(value.data_ptr())
            if len(pages) > before:
                return value
        return source.read(name, *part)

    names = [n for n, _ in model.named_parameters()]
    with tqdm(total=len(names), desc="loading weights", unit="tensor", disable=not show_progress, leave=False) as bar:
        for name in (n for n in names if not n.startswith("layers.")):
            fill_one(name)
            bar.update()
        if packed and calibrate_on is not None:
            bar.set_description("loading and calibrating")
            calibration = Calibration(model, calibrate_on)
        for index, layer in enumerate(model.layers):
            for name in [f"layers.{index}.{n}" for n, _ in layer.named_parameters()]:
                fill_one(name)
                bar.update()
            if calibration is not None:
                calibration.pack_layer(layer, table)
            if after_block:
                after_block(layer)
    left = [n for n, p in model.named_parameters() if p.is_meta]
    assert not left, f"never filled: {left[:3]}"
