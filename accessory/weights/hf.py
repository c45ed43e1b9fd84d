"""Hugging Face's layout of LLaMA, Mistral, Qwen2 and Qwen3 <-> Meta's: names, q/k rows, config.json.

    one head's rows   Meta  a0 b0 a1 b1 a2 b2     (rotary turns neighbours)
                      HF    a0 a1 a2 b0 b1 b2     (rotary turns halves)

The rows of q_proj and k_proj (weight and bias) are reordered within each head, and the weights of Qwen3's q_norm and
k_norm likewise, nothing else: so a slice of whole heads is read from the same rows. config.json has two dialects: up to transformers 4.x `rope_theta`, `rope_scaling`,
`torch_dtype`; from 5.x `rope_parameters` and `dtype`. Both are read, and both are written: an older reader of a 5.x
file silently takes theta 10000. Test: tests/unit/test_hf.py (against transformers, round trips bit-equal).

Shapes: H heads, Dh head dim, D dim.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor

from accessory.model.args import ModelArgs
from accessory.weights import IGNORED_SUFFIXES, Source, is_lora, view

MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
DEFAULTS = {  # of keys that a config.json may leave out, where they are not LLaMA's
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768},
    "qwen3": {"max_position_embeddings": 32768, "head_dim": 128},
}
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
TO_HF = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TO_META = {hf: meta for meta, hf in TO_HF.items()}
REORDERED = re.compile(r"\.((wq|wk|q_proj|k_proj)\.(weight|bias)|[qk]_norm\.weight)$")  # rows that rotary turns


def hf_name(name: str) -> str | None:
    """layers.3.attention.wq.weight -> model.layers.3.self_attn.q_proj.weight; None for a name without a counterpart."""
    layer, module, kind = _parts(name.removeprefix("layers.") if name.startswith("layers.") else name)
    return f"{'model.layers.' if layer else ''}{layer}{TO_HF[module]}.{kind}" if module in TO_HF else None


def meta_name(name: str) -> str | None:
    """model.layers.3.self_attn.q_proj.weight -> layers.3.attention.wq.weight; None for a name without a counterpart."""
    layer, module, kind = _parts(name.removeprefix("model.layers.") if name.startswith("model.layers.") else name)
    return f"{'layers.' if layer else ''}{layer}{TO_META[module]}.{kind}" if module in TO_META else None


def _parts(name: str) -> tuple[str, str, str]:
    """'3.attention.wq.weight' -> ('3.', 'attention.wq', 'weight')"""
    match = re.fullmatch(r"(\d+\.)?(.+)\.(weight|bias)", name)
    return (match[1] or "", match[2], match[3]) if match else ("", "", "")


def halves_to_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """HF's row order -> Meta's, for whole heads: (H*Dh, ...) -> (H*Dh, ...)."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(rows.shape)


def pairs_to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Meta's row order -> HF's, for whole heads: the inverse of `halves_to_pairs`."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(rows.shape)


class _Converted:
    """A source under other names with the rows of q and k reordered by `reorder`."""

    def __init__(self, source: Source, names: dict[str, str], head_dim: int, reorder: Any) -> None:
        self.source, self.map, self.head_dim, self.reorder = source, names, head_dim, reorder

    def names(self) -> list[str]:
        return list(self.map)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(self.map[name])

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(self.map[name])

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        inner = self.map[name]
        if not REORDERED.search(name):
            return self.source.read(inner, dim, start, stop)
        return self._reordered(inner, dim, start, stop)

    def view(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        inner = self.map[name]
        if not REORDERED.search(name):
            return view(self.source, inner, dim, start, stop)
        return self._reordered(inner, dim, start, stop)

    def _reordered(self, inner: str, dim: int | None, start: int, stop: int | None) -> Tensor:
        rows = self.source.shape(inner)[0]
        if rows % self.head_dim:
            raise ValueError(f"{inner} has {rows} rows, which is no whole number of heads of {self.head_dim}")
        if dim != 0:
            return self.reorder(view(self.source, inner, dim, start, stop), self.head_dim)
        stop = rows if stop is None else stop
        first, last = start // self.head_dim * self.head_dim, -(-stop // self.head_dim) * self.head_dim  # whole heads
        heads = self.reorder(view(self.source, inner, 0, first, last), self.head_dim)
        return heads if (first, last) == (start, stop) else heads[start - first : stop - first].clone()


class FromHF(_Converted):
    """A source with Hugging Face's names, seen with Meta's names and rows. Names without a counterpart are kept as
    they are, for the strict check to report."""

    def __init__(self, source: Source, head_dim: int) -> None:
        names = {meta_name(n) or n: n for n in source.names() if not n.endswith(IGNORED_SUFFIXES)}
        super().__init__(source, names, head_dim, halves_to_pairs)


class ToHF(_Converted):
    """A source with Meta's names, seen with Hugging Face's names and rows. Raises ValueError for what HF has no place
    for."""

    def __init__(self, source: Source, args: ModelArgs) -> None:
        names = {}
        for name in source.names():
            if is_lora(name):
                raise ValueError(
                    f"{name} is a LoRA weight, which Hugging Face has no place for: run tools/merge_lora.py first"
                )
            if name == "output.weight" and args.tie_word_embeddings:
                continue
            if (hf := hf_name(name)) is None:
                raise ValueError(f"{name} has no name in Hugging Face's layout")
            names[hf] = name
        super().__init__(source, names, args.head_size, pairs_to_halves)


def params_from_config(config: dict[str, Any], where: object = "config.json") -> dict[str, Any]:
    """config.json of either dialect -> params.json's keys. Raises ValueError naming `where`, the key and the value
    for a model of another family, or one with parts that would be computed differently."""
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        *others, last = MODEL_TYPES
        raise ValueError(
            f"{where}: model_type {kind!r} is another architecture: only {', '.join(others)} and {last} are read"
        )
    if missing := [k for k in NEEDED if k not in config]:
        raise ValueError(f"{where}: {', '.join(missing)} is missing")
    check_config(config, where)
    config = config | {k: v for k, v in DEFAULTS.get(kind, {}).items() if k not in config}
    bias = config.get("attention_bias") or None
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "vocab_size": config["vocab_size"],
        "hidden_dim": config["intermediate_size"],
        "head_dim": config.get("head_dim"),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": config.get("tie_word_embeddings"),
        "attention_bias": bias if kind in ("llama", "qwen3") else None,
        "qkv_bias": True if kind == "qwen2" else None,
        "mlp_bias": (config.get("mlp_bias") or None) if kind == "llama" else None,
        "qk_norm": True if kind == "qwen3" else None,
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        "sliding_window": config.get("sliding_window") if kind == "mistral" else None,
    }
    return {k: v for k, v in (params | rope_params(config, where)).items() if v is not None}


def check_config(config: dict[str, Any], where: object) -> None:
    """Raises ValueError naming `where`, the key and the value for what this model would compute differently."""
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{where}: hidden_act {config['hidden_act']!r}: only silu is supported")
    if config.get("quantization_config"):
        raise ValueError(
            f"{where}: quantization_config: the weights are quantised; take the model in bf16, fp16 or fp32"
        )
    if config["model_type"] in ("qwen2", "qwen3"):
        if config.get("use_sliding_window"):
            raise ValueError(
                f"{where}: use_sliding_window true (from layer {config.get('max_window_layers')} on, {config.get('sliding_window')} "
                "tokens) is not implemented: set it to false if your texts are no longer than the window"
            )
        if others := sorted(set(config.get("layer_types") or ()) - {"full_attention"}):
            raise ValueError(f"{where}: layer_types {', '.join(others)}: only full_attention is implemented")


def rope_params(config: dict[str, Any], where: object) -> dict[str, Any]:
    """rope_theta and rope_scaling from either dialect; where both are given and differ, an error."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key) or {}, dict):
            raise ValueError(f"{where}: {key} is {config[key]!r}, expected an object or null")
    new, old = dict(config.get("rope_parameters") or {}), dict(config.get("rope_scaling") or {})
    theta = new.pop("rope_theta", None)
    old_theta = old.pop("rope_theta", None) or config.get("rope_theta")
    if theta is not None and old_theta is not None and float(theta) != float(old_theta):
        raise ValueError(
            f"{where}: rope_theta {old_theta} and rope_parameters.rope_theta {theta} disagree: remove the wrong one"
        )
    scaling = new or old
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if kind == "dynamic":
        raise ValueError(
            f"{where}: rope_scaling 'dynamic' changes with the text's length and is not supported: use linear or yarn"
        )
    if kind == "default":
        scaling = {}
    elif kind == "yarn":
        scaling.setdefault("original_max_position_embeddings", config.get("max_position_embeddings", 2048))
    return {
        "rope_theta": float(theta or old_theta or 10000.0),
        "rope_scaling": {"rope_type": kind, **scaling} if kind != "default" else None,
    }


def config_from_args(args: ModelArgs, dtype: torch.dtype, special_ids: dict[str, Any] | None = None) -> dict[str, Any]:
    """config.json in both dialects at once. `special_ids`: bos_token_id and eos_token_id. Needs a true vocab_size and a
    decided tie_word_embeddings."""
    assert args.vocab_size > 0 and args.tie_word_embeddings is not None, "vocab_size and the tie must be known"
    theta, scaling = args.rope_theta, dict(args.rope_scaling or {"rope_type": "default"})
    if scaling["rope_type"] == "ntk":  # a larger base and nothing else, which HF can say exactly
        theta = theta * scaling["factor"] ** (args.head_size / (args.head_size - 2))
        scaling = {"rope_type": "default"}
    scaling.pop("rope_theta", None)
    kind = model_type(args)
    name = str(dtype).removeprefix("torch.")
    config = {
        "architectures": [MODEL_TYPES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": args.dim,
        "intermediate_size": args.ffn_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_size,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "max_position_embeddings": args.max_position_embeddings or context_length(args),
        "tie_word_embeddings": args.tie_word_embeddings,
        "rope_theta": theta,
        "rope_scaling": None if scaling["rope_type"] == "default" else {"type": scaling["rope_type"], **scaling},
        "rope_parameters": {"rope_theta": theta, **scaling},
        "torch_dtype": name,
        "dtype": name,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    full = {"use_sliding_window": False, "layer_types": ["full_attention"] * args.n_layers}
    config |= {
        "llama": {"attention_bias": args.attention_bias, "mlp_bias": args.mlp_bias},
        "mistral": {"sliding_window": args.sliding_window},
        "qwen2": full,
        "qwen3": full | {"attention_bias": args.attention_bias},
    }[kind]
    return config | (special_ids or {})


def model_type(args: ModelArgs) -> str:
    """The Hugging Face architecture that computes what `args` say. Raises ValueError naming parts that none has together."""
    parts = {
        "sliding_window": bool(args.sliding_window),
        "qk_norm": args.qk_norm,
        "qkv_bias": args.qkv_bias and not args.attention_bias,
        "attention_bias": args.attention_bias,
        "mlp_bias": args.mlp_bias,
    }
    there = {name for name, on in parts.items() if on}
    can = {
        "llama": {"attention_bias", "mlp_bias"},
        "mistral": {"sliding_window"},
        "qwen2": {"qkv_bias"},
        "qwen3": {"qk_norm", "attention_bias"},
    }
    for kind, has in can.items():
        if there <= has:
            return kind
    without = "export without sliding_window" if args.sliding_window else "write Meta's format instead"
    raise ValueError(
        f"{' and '.join(n for n in parts if n in there)} together have no Hugging Face architecture: {without}"
    )


def context_length(args: ModelArgs) -> int:
    """The context length of the published model with these constants, where params.json does not tell it."""
    if args.rope_scaling and "original_max_position_embeddings" in args.rope_scaling:
        scaled = args.rope_scaling["original_max_position_embeddings"] * args.rope_scaling["factor"]
        return 131072 if args.rope_scaling["rope_type"] == "llama3" else math.ceil(scaled)
    published = {500000.0: 8192, 1000000.0: 16384}.get(args.rope_theta, 4096)
    if args.qkv_bias or args.qk_norm:
        published = 32768
    return math.ceil(published * (args.rope_scaling or {}).get("factor", 1))
