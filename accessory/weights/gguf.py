"""GGUF's names and metadata <-> Meta's: tensor names, q/k rows, params.json's keys, how each tensor is stored.

    blk.3.attn_q.weight        layers.3.attention.wq.weight
    llama.attention.head_count n_heads

    architecture   rows of q and k                  what it has beside LLaMA's
    llama          Meta's pairs: as they are        biases, Llama 3's scaling of the frequencies (rope_freqs.weight)
    qwen2          Hugging Face's halves: reordered biases on q, k, v
    qwen3          Hugging Face's halves: reordered norms of each head of q and k

Everything here is a function of the metadata, a dict of GGUF's keys; `checkpoint.formats_read.GGUFFile` reads the file,
`checkpoint.gguf_write` writes one. gguf_rope.py has the scaling of the rotary embedding, gguf_tokenizer.py the keys that
begin with tokenizer.
Formats: github.com/ggml-org/ggml docs/gguf.md; llama.cpp's convert_hf_to_gguf.py for what a key or a type has to be.
Tests: tests/unit/test_gguf.py, tests/unit/test_gguf_write.py
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from accessory.model.args import ModelArgs
from accessory.weights import Renamed, Source, hf, is_lora
from accessory.weights.gguf_rope import ROPE_FACTORS, number, scaling_from_metadata, scaling_keys, shortest

NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "attn_q_norm": "attention.q_norm",
    "attn_k_norm": "attention.k_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
MODULES = {meta: gguf for gguf, meta in NAMES.items()}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
IN_HALVES = ("qwen2", "qwen3")  # whose rows of q and k are Hugging Face's


def meta_names(names: Iterable[str]) -> dict[str, str]:
    """Meta's name -> GGUF's. A tensor without a counterpart keeps its name, for the strict check to report."""
    return {meta_name(n): n for n in names if n != ROPE_FACTORS}


def meta_name(name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not match or match[2] not in NAMES:
        return name
    return f"{f'layers.{match[1]}.' if match[1] else ''}{NAMES[match[2]]}.{match[3]}"


def gguf_name(name: str) -> str:
    """layers.3.attention.wq.weight -> blk.3.attn_q.weight. Raises ValueError for what GGUF has no place for."""
    match = re.fullmatch(r"(?:layers\.(\d+)\.)?([\w.]+)\.(weight|bias)", name)
    if is_lora(name) or not match or match[2] not in MODULES:
        remedy = ": run tools/merge_lora.py first" if is_lora(name) else ""
        raise ValueError(f"{name} has no name in GGUF{remedy}")
    return f"{f'blk.{match[1]}.' if match[1] else ''}{MODULES[match[2]]}.{match[3]}"


def from_gguf(source: Source, architecture: str, head_dim: int) -> Source:
    """A source with GGUF's names, seen with Meta's names and rows."""
    names = meta_names(source.names())
    if architecture not in IN_HALVES:
        return Renamed(source, names)
    return hf.FromHF(Renamed(source, {hf.hf_name(meta) or meta: n for meta, n in names.items()}), head_dim)


def to_gguf(source: Source, args: ModelArgs) -> Source:
    """A source with Meta's names, seen with the names and rows of its architecture in GGUF."""
    names = {n: gguf_name(n) for n in source.names()}
    if architecture(args) not in IN_HALVES:
        return Renamed(source, {new: n for n, new in names.items()})
    return Renamed(hf.ToHF(source, args), {new: hf.hf_name(n) for n, new in names.items()})


def architecture(args: ModelArgs) -> str:
    """The architecture that computes what `args` say. Raises ValueError naming parts that llama.cpp has none for."""
    scaled = bool(args.rope_scaling) and args.rope_scaling["rope_type"] == "llama3"
    parts = {
        "qk_norm": args.qk_norm,
        "qkv_bias": args.qkv_bias and not args.attention_bias,
        "attention_bias": args.attention_bias,
        "mlp_bias": args.mlp_bias,
        "rope_scaling llama3": scaled,
        "a head_dim that is not dim / n_heads": args.head_size * args.n_heads != args.dim,
    }
    there = [part for part, on in parts.items() if on]
    can = {
        "llama": {"attention_bias", "mlp_bias", "rope_scaling llama3", "a head_dim that is not dim / n_heads"},
        "qwen2": {"qkv_bias"},
        "qwen3": {"qk_norm", "a head_dim that is not dim / n_heads"},
    }
    for kind, has in can.items():
        if has.issuperset(there):
            return kind
    raise ValueError(
        f"{' and '.join(there)} together have no architecture in llama.cpp: export to Hugging Face instead"
    )


def params_from_metadata(metadata: dict[str, Any], where: object, rope_factors: Tensor | None = None) -> dict[str, Any]:
    """params.json's keys. Raises ValueError naming `where` and the key for another architecture or a size that is
    missing or is none."""
    kind = metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        *others, last = ARCHITECTURES
        raise ValueError(
            f"{where}: general.architecture {kind!r} is another architecture: only {', '.join(others)} and {last} are read"
        )
    if metadata.get(f"{kind}.expert_count"):
        raise ValueError(
            f"{where}: {kind}.expert_count {metadata[f'{kind}.expert_count']}: mixtures of experts are not supported"
        )
    if metadata.get("split.count", 1) != 1:
        raise ValueError(f"{where}: is a part of a split GGUF: join it with llama.cpp's gguf-split --merge")

    def get(key: str, default: Any = None) -> Any:
        return number(metadata.get(f"{kind}.{key}", default), f"{where}: {kind}.{key}")

    heads, dim = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", get("rope.dimension_count", dim // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise ValueError(f"{where}: {kind}.{key} is {get(key)}, but the head dim is {head_dim}: not supported")
    tokens = metadata.get("tokenizer.ggml.tokens")
    params = {
        "dim": dim,
        "n_layers": get("block_count"),
        "n_heads": heads,
        "n_kv_heads": get("attention.head_count_kv", heads),
        "vocab_size": get("vocab_size", len(tokens) if isinstance(tokens, list) else None),
        "hidden_dim": get("feed_forward_length"),
        "norm_eps": shortest(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": shortest(get("rope.freq_base", 10000.0)),
        "max_position_embeddings": get("context_length"),
    }
    if head_dim * heads != dim:
        params["head_dim"] = head_dim
    params |= {"qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}.get(kind, {})
    if scaling := scaling_from_metadata(metadata, where, head_dim, params["rope_theta"], rope_factors):
        params["rope_scaling"] = scaling
    return params


def metadata_from_args(args: ModelArgs) -> dict[str, Any]:
    """GGUF's keys of a model with a true vocab_size. Raises ValueError for what llama.cpp would compute differently.

    `sliding_window` has no key in architecture llama: as in llama.cpp's converter it is left out."""
    kind, theta, scaling = architecture(args), args.rope_theta, args.rope_scaling
    if scaling and scaling["rope_type"] == "ntk":  # a larger base and nothing else
        theta = theta * scaling["factor"] ** (args.head_size / (args.head_size - 2))
    keys = {
        "vocab_size": args.vocab_size,
        "context_length": args.max_position_embeddings or hf.context_length(args),
        "embedding_length": args.dim,
        "block_count": args.n_layers,
        "feed_forward_length": args.ffn_dim,
        "attention.head_count": args.n_heads,
        "attention.head_count_kv": args.kv_heads,
        "attention.key_length": args.head_size,
        "attention.value_length": args.head_size,
        "attention.layer_norm_rms_epsilon": float(args.norm_eps),
        "rope.dimension_count": args.head_size,
        "rope.freq_base": float(theta),
    }
    keys |= {f"rope.scaling.{k}": v for k, v in scaling_keys(args).items()}
    return {"general.architecture": kind} | {f"{kind}.{k}": v for k, v in keys.items()}


def stored_as(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """ggml's type of a tensor in a file of --dtype f32, f16, bf16 or q8_0, as llama.cpp's converter chooses it: vectors
    and norms fp32, everything else `dtype`; rows that are no whole number of 32-blocks cannot be Q8_0: F16."""
    if len(shape) == 1 or name.endswith("_norm.weight"):
        return "F32"
    return "F16" if dtype == "q8_0" and shape[-1] % 32 else dtype.upper()
