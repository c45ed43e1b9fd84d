"""The shape of a model: params.json's keys, from Meta's files, Mistral's and Accessory's, several files together.

`ModelArgs.from_files(["params.json", "lora.json"])`: later files win key by key; null means the default. Keys of fine-tuning
(lora_rank, bias_tuning, ...) may stand in the same files and are handed out by `tuning_keys`. Unknown keys are errors.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Sequence

from accessory.config import unknown_name
from accessory.model import rope

TUNING_KEYS = (
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_targets",
    "modules_to_save",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "bias_tuning",
    "norm_tuning",
)
RUNTIME_KEYS = (
    "max_batch_size",
    "max_seq_len",
    "model_parallel_size",
    "model_type",
)  # in published files, no property of the weights
SCALED_ROPE_KEYS = ("use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor")


@dataclass(frozen=True)
class ModelArgs:
    """Sizes and constants of one LLaMA. `vocab_size` -1 (Meta's files) means: the tokenizer's, or the embedding's rows."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: n_heads (no grouping)
    vocab_size: int = -1
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    hidden_dim: int | None = None  # the FFN's width outright (Mistral's key); wins over the two above
    head_dim: int | None = None  # None: dim / n_heads
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool | None = None  # None: tied when the checkpoint has no output.weight
    attention_bias: bool = False  # on wq wk wv wo
    qkv_bias: bool = False  # on wq wk wv alone (Qwen2); attention_bias wins
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before the rotary embedding (Qwen3)
    sliding_window: int | None = None
    max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "kv_heads", "head_size", "multiple_of", "ffn_dim"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"params: {name} is {getattr(self, name)!r}, expected a whole number above 0")
        if self.n_layers > 10_000:
            raise ValueError(f"params: n_layers is {self.n_layers}: no model has that many")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"params: n_kv_heads {self.kv_heads} does not divide n_heads {self.n_heads}")
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(
                f"params: n_heads {self.n_heads} does not divide dim {self.dim}; set head_dim if that is meant"
            )
        if self.head_size % 2:
            raise ValueError(f"params: head dim {self.head_size} is odd; rotary embedding turns pairs")
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", rope.check_scaling(self.rope_scaling))

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward: Meta's rule, 2/3 of 4 dim, times the multiplier, rounded up to multiple_of."""
        if self.hidden_dim:
            return self.hidden_dim
        width = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return self.multiple_of * -(-width // self.multiple_of)

    @classmethod
    def from_dict(cls, params: dict[str, Any], source: str = "params.json") -> "ModelArgs":
        """From params.json's content. Raises ValueError naming an unknown key, `source` and the nearest known key."""
        params = {k: v for k, v in params.items() if v is not None and k not in TUNING_KEYS + RUNTIME_KEYS}
        scaled = {k: params.pop(k) for k in SCALED_ROPE_KEYS if k in params}
        known = [f.name for f in fields(cls)]
        for key in params:
            if key not in known:
                raise ValueError(f"{source}: {unknown_name('key', key, known + list(TUNING_KEYS))}")
        if scaled.get("use_scaled_rope") and "rope_scaling" not in params:
            params["rope_scaling"] = meta_scaled_rope(params, scaled)
        scaling = params.get("rope_scaling")
        if isinstance(scaling, (int, float)) and scaling > 0:  # Accessory's: a factor on the positions
            params["rope_scaling"] = {"rope_type": "linear", "factor": 1.0 / scaling} if scaling != 1 else None
        elif isinstance(scaling, dict) and (scaling.get("rope_type") or scaling.get("type")) == "default":
            params["rope_scaling"] = None
        for name in ("norm_eps", "rope_theta"):
            if name in params:
                params[name] = float(params[name])
        return cls(**params)

    @classmethod
    def from_files(cls, paths: Sequence[str | Path]) -> "ModelArgs":
        return cls.from_dict(read_params(paths), source=" + ".join(map(str, paths)))

    def to_dict(self) -> dict[str, Any]:
        """params.json's content: everything that is not null, so that a later default cannot change the model."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


def meta_scaled_rope(params: dict[str, Any], scaled: dict[str, Any]) -> dict[str, Any]:
    """Meta's `use_scaled_rope` spelt out. Their files do not always tell the factor: 32 for Llama 3.2 1B and 3B, else 8."""
    small = (params.get("dim"), params.get("n_layers")) in ((2048, 16), (3072, 28))
    return {
        "rope_type": "llama3",
        "factor": float(scaled.get("rope_scaling_factor") or (32 if small else 8)),
        "low_freq_factor": 1.0,
        "high_freq_factor": float(scaled.get("rope_high_freq_factor") or 4.0),
        "original_max_position_embeddings": 8192,
    }


def read_params(paths: Sequence[str | Path]) -> dict[str, Any]:
    """The files' keys together, later ones win, null skipped. Raises ValueError naming a file that is no JSON object."""
    together: dict[str, Any] = {}
    for path in paths:
        try:
            content = json.loads(Path(path).read_text())
        except FileNotFoundError:
            raise ValueError(
                f"--llama_config {path}: no such file (model_configs/ has one per published size)"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"--llama_config {path}: not JSON ({error})") from None
        if not isinstance(content, dict):
            raise ValueError(f"--llama_config {path}: expected one JSON object with keys such as dim and n_layers")
        together |= {k: v for k, v in content.items() if v is not None}
    return together


def tuning_keys(params: dict[str, Any]) -> dict[str, Any]:
    """The fine-tuning keys of a params.json: defaults of the flags with the same names."""
    return {k: params[k] for k in TUNING_KEYS if k in params}


def allowed_model_parallel_sizes(args: ModelArgs) -> list[int]:
    """Sizes this model can be split at: divisors of n_heads and ffn width that divide n_kv_heads or are a multiple of it."""
    return [n for n in range(1, args.n_heads + 1) if not model_parallel_problem(args, n)]


def model_parallel_problem(args: ModelArgs, size: int) -> str | None:
    """Why this model cannot be split over `size` ranks, with the numbers; None when it can."""
    kv = args.kv_heads
    if size < 1:
        return "a model is split over 1 rank or more"
    if args.n_heads % size:
        return f"n_heads is {args.n_heads}"
    if kv % size and size % kv:
        return f"n_kv_heads is {kv}"
    if args.ffn_dim % size:
        return f"the feed-forward is {args.ffn_dim} wide"
    return None


def check_model_parallel(args: ModelArgs, size: int, flag: str = "--model_parallel_size") -> None:
    """Raises ValueError with both numbers and the sizes that work; `flag` is what the user calls it."""
    if problem := model_parallel_problem(args, size):
        sizes = [n for n in allowed_model_parallel_sizes(args) if n <= 64]
        raise ValueError(
            f"{flag} {size} but {problem}: use {' or '.join([', '.join(map(str, sizes[:-1])), str(sizes[-1])]) if sizes[:-1] else sizes[-1]}"
        )
