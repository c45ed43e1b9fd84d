"""Pure maps between layouts of weights: a lazy source in, a lazy source out. No files, no process groups, CPU only.

    shards of m ranks ---- reshard.Merged ---+
    Hugging Face names --- hf.FromHF --------+--> Source: whole tensors, Meta's names --> reshard.split, hf.ToHF,
    GGUF names ----------- gguf.from_gguf ---+                                            lora.merged

A `Source` knows names, shapes and dtypes without touching data and reads one slice at a time, so the largest thing
ever held is one slice. The objects that open files are in `accessory/checkpoint/`. Test: tests/unit/test_reshard.py
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from accessory.model.args import ModelArgs
from accessory.model.llama import global_shape

LORA_SUFFIXES = (".lora_a.weight", ".lora_b.weight")
REMEDIES = {  # the first that applies
    "mis-shaped": "the sizes in params.json or --llama_config belong to another model",
    "missing": "a file of this checkpoint is missing, or n_layers or tie_word_embeddings belong to another model",
    "unexpected": "the checkpoint holds more than the model: check n_layers, attention_bias, qkv_bias, mlp_bias, qk_norm, "
    "tie_word_embeddings",
}
IGNORED_SUFFIXES = ("rope.freqs", ".rotary_emb.inv_freq")  # tables that old files carry; the model computes its own


class Source(Protocol):
    """A lazy, whole (unsharded) view of named tensors."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """The slice [start:stop) of `name` on `dim` (the whole tensor when dim is None): a fresh CPU tensor that owns
        its memory and no more. KeyError for a name that is not in names()."""
        ...


class TensorSource:
    """Tensors in memory as a Source."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        return owned_slice(self.tensors[name].detach(), dim, start, stop)


class Renamed:
    """A source under other names: `names` maps each new name to the old one; what is not in it disappears."""

    def __init__(self, source: Source, names: Mapping[str, str]) -> None:
        self.source, self.map = source, dict(names)

    def names(self) -> list[str]:
        return list(self.map)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(self.map[name])

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(self.map[name])

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        return self.source.read(self.map[name], dim, start, stop)

    def view(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        return view(self.source, self.map[name], dim, start, stop)

    def read_into(self, out: Tensor, name: str, dim: int | None, start: int, stop: int | None) -> None:
        read_into(out, self.source, self.map[name], dim, start, stop)


class Overlay:
    """Two sources as one: what `top` has wins over `base`."""

    def __init__(self, base: Source, top: Source) -> None:
        self.base, self.top = base, top
        self._top = set(top.names())

    def names(self) -> list[str]:
        return [n for n in self.base.names() if n not in self._top] + self.top.names()

    def _of(self, name: str) -> Source:
        return self.top if name in self._top else self.base

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._of(name).dtype(name)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        return self._of(name).read(name, dim, start, stop)

    def view(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        return view(self._of(name), name, dim, start, stop)


def view(source: Source, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
    """What `source.read` gives, but without a copy where the source has a `view` of its own: pages of the mapped file, which
    stays mapped as long as the tensor lives. The pages are private: what is written to the tensor is not in the file."""
    return getattr(source, "view", source.read)(name, dim, start, stop)


def read_into(
    out: Tensor, source: Source, name: str, dim: int | None = None, start: int = 0, stop: int | None = None
) -> None:
    """What `source.read` gives, copied once into `out` where the source has a `read_into` of its own."""
    if hasattr(source, "read_into"):
        source.read_into(out, name, dim, start, stop)
    else:
        out.copy_(source.read(name, dim, start, stop))


def owned_slice(tensor: Tensor, dim: int | None, start: int, stop: int | None) -> Tensor:
    """A contiguous copy of tensor[start:stop) on `dim`, so that no view keeps a file mapped or a big storage alive."""
    return sliced(tensor, dim, start, stop).clone(memory_format=torch.contiguous_format)


def sliced(tensor: Tensor, dim: int | None, start: int, stop: int | None) -> Tensor:
    """A view of tensor[start:stop) on `dim`."""
    if dim is None:
        return tensor
    stop = tensor.shape[dim] if stop is None else stop
    assert 0 <= start <= stop <= tensor.shape[dim], f"slice [{start}:{stop}) of {tuple(tensor.shape)} on dim {dim}"
    return tensor.narrow(dim, start, stop - start)


def is_lora(name: str) -> bool:
    return name.endswith(LORA_SUFFIXES)


def base_weight(name: str) -> str:
    """layers.0.attention.wq.lora_a.weight -> layers.0.attention.wq.weight"""
    return name.rsplit(".", 2)[0] + ".weight"


def expected_shapes(args: ModelArgs, tied: bool) -> dict[str, tuple[int, ...]]:
    """Name -> whole shape of every parameter of the model, in its order, from its args alone; needs a true vocab_size."""
    assert args.vocab_size > 0, "vocab_size is still -1"
    names = ["tok_embeddings.weight"]
    for layer in range(args.n_layers):
        for kind, linears, bias in (
            ("attention", ("wq", "wk", "wv"), args.attention_bias or args.qkv_bias),
            ("attention", ("wo",), args.attention_bias),
            ("attention", ("q_norm", "k_norm") if args.qk_norm else (), False),
            ("feed_forward", ("w1", "w2", "w3"), args.mlp_bias),
        ):
            for linear in linears:
                names += [f"layers.{layer}.{kind}.{linear}.{key}" for key in ("weight", "bias")[: 1 + bias]]
        names += [f"layers.{layer}.{norm}.weight" for norm in ("attention_norm", "ffn_norm")]
    names += ["norm.weight"] if tied else ["norm.weight", "output.weight"]
    return {name: global_shape(args, name) for name in names}


def check_keys(source: Source, args: ModelArgs, adapter: dict[str, Any] | None = None) -> dict[str, list[str]]:
    """What stands between the source and the model: {"missing": [...], "unexpected": [...], "mis-shaped": [...]}.

    LoRA keys are expected only where the checkpoint's `adapter` says that it has some."""
    names = {n for n in source.names() if not n.endswith(IGNORED_SUFFIXES) and not (adapter and is_lora(n))}
    if args.vocab_size < 0:
        rows = source.shape("tok_embeddings.weight")[0] if "tok_embeddings.weight" in names else 1
        args = ModelArgs.from_dict(args.to_dict() | {"vocab_size": rows})
    tied = "output.weight" not in names if args.tie_word_embeddings is None else args.tie_word_embeddings
    expected = expected_shapes(args, tied)
    wrong = [n for n in expected if n in names and source.shape(n) != expected[n]]
    return {
        "missing": [n for n in expected if n not in names],
        "unexpected": sorted(names - set(expected)),
        "mis-shaped": [f"{n} is {_x(source.shape(n))}, not {_x(expected[n])}" for n in wrong],
    }


def require_keys(source: Source, args: ModelArgs, where: object, adapter: dict[str, Any] | None = None) -> None:
    """Raises ValueError with `check_keys`' report in one line, naming `where`; says nothing when every key fits."""
    report = {kind: found for kind, found in check_keys(source, args, adapter).items() if found}
    if not report:
        return
    parts = [f"{len(v)} {k} ({', '.join(v[:4])}{', ...' if len(v) > 4 else ''})" for k, v in report.items()]
    remedy = next(text for kind, text in REMEDIES.items() if kind in report)
    raise ValueError(f"{where}: does not fit the model: {'; '.join(parts)}: {remedy}")


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
