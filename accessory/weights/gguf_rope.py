"""The scaling of the rotary embedding as GGUF says it <-> params.json's `rope_scaling`.

    linear, yarn   llama.rope.scaling.type, .factor, ...
    llama3         a tensor, rope_freqs.weight: what each frequency is divided by
    ntk            nothing: a larger llama.rope.freq_base (in gguf.py)

YaRN's factor on cos and sin is 0.1 ln(factor) + 1 in llama.cpp, times rope.scaling.attn_factor where that is given.
Sources: llama.cpp's src/llama-context.cpp and convert_hf_to_gguf.py. Test: tests/unit/test_gguf_write.py
"""

import math
from typing import Any

import torch
from torch import Tensor

from accessory.model import rope
from accessory.model.args import ModelArgs

ROPE_FACTORS = "rope_freqs.weight"
BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # llama.cpp reads these keys in a few other architectures (Grok) only


def number(value: Any, what: str) -> Any:
    """`value`, which has to be one number above 0."""
    if value is None:
        raise ValueError(f"{what} is missing: the file is incomplete, convert the model to GGUF again")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{what} is {str(value)[:60]}, expected one number above 0: the file is not supported")
    return value


def shortest(value: float) -> float:
    """A float32 as the number it was meant to be: 9.999999747378752e-06 -> 1e-05."""
    return float(f"{value:.7g}")


def scaling_from_metadata(
    metadata: dict[str, Any], where: object, head_dim: int, theta: float, factors: Tensor | None
) -> dict[str, Any] | None:
    prefix = f"{metadata['general.architecture']}.rope.scaling."
    kind = metadata.get(f"{prefix}type", "none")
    if factors is not None:
        return _llama3_scaling(factors, where, head_dim, theta)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{where}: {prefix}type {kind!r} is not supported: linear and yarn are")

    def get(key: str, default: Any = None) -> Any:
        return number(metadata.get(prefix + key, default), f"{where}: {prefix}{key}")

    scaling = {"rope_type": kind, "factor": shortest(get("factor"))}
    if kind == "linear":
        return scaling
    if get("yarn_ext_factor", 1.0) != 1.0:
        raise ValueError(f"{where}: {prefix}yarn_ext_factor {get('yarn_ext_factor')} is not supported")
    context = metadata.get(f"{metadata['general.architecture']}.context_length")
    scaling["original_max_position_embeddings"] = get("original_context_length", context)
    scaling |= {k: shortest(get(f"yarn_{k}")) for k in ("beta_fast", "beta_slow") if f"{prefix}yarn_{k}" in metadata}
    if (times := get("attn_factor", 1.0)) != 1.0:
        scaling["attention_factor"] = times * _yarn_warmth(scaling["factor"])
    return scaling


def _yarn_warmth(factor: float) -> float:
    """llama.cpp's factor on cos and sin; rope.scaling.attn_factor multiplies it."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3_scaling(factors: Tensor, where: object, head_dim: int, theta: float) -> dict[str, Any]:
    if factors.shape != (head_dim // 2,):
        raise ValueError(f"{where}: {ROPE_FACTORS} has shape {tuple(factors.shape)}, but the head dim is {head_dim}")
    scaling = {"rope_type": "llama3", "factor": shortest(float(factors.max())), "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    between = (factors > 1) & (factors < scaling["factor"])
    if between.any():  # each of these tells the length: rope_factors, solved for it
        wavelengths = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        smooth = (1 / factors.double() - 1 / scaling["factor"]) / (1 - 1 / scaling["factor"])
        scaling["original_max_position_embeddings"] = round(float((wavelengths * (3 * smooth + 1))[between].median()))
    if not torch.allclose(rope_factors(head_dim, theta, scaling), factors, rtol=1e-3):
        raise ValueError(f"{where}: {ROPE_FACTORS} is not Llama 3.1's scaling: not supported")
    return scaling


def rope_factors(head_dim: int, theta: float, scaling: dict[str, Any]) -> Tensor:
    """rope_freqs.weight, (Dh/2,) fp32, with the operations of llama.cpp's converter: bit-equal to what it writes."""
    old, low, high = (scaling[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    freqs = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    wavelengths = 2 * math.pi / freqs
    smooth = (old / wavelengths - low) / (high - low)
    blended = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    blended[wavelengths < old / high] = 1.0
    blended[wavelengths > old / low] = scaling["factor"]
    return blended


def scaling_keys(args: ModelArgs) -> dict[str, Any]:
    """Key after rope.scaling. -> value, for linear and yarn. Raises ValueError for what no key can say."""
    scaling = args.rope_scaling
    if not scaling or scaling["rope_type"] not in ("linear", "yarn"):
        return {}
    keys = {"type": scaling["rope_type"], "factor": float(scaling["factor"])}
    if scaling["rope_type"] == "linear":
        return keys
    if not scaling.get("truncate", True):
        raise ValueError("rope_scaling yarn with truncate false has no key in GGUF: export to Hugging Face instead")
    freqs, warmth = rope.frequencies(args.head_size, args.rope_theta, scaling)
    betas = {k: float(scaling[k]) for k in BETAS if scaling.get(k)}
    if not torch.equal(freqs, rope.frequencies(args.head_size, args.rope_theta, scaling | BETAS)[0]):
        said = " and ".join(f"{k} {v:g}" for k, v in betas.items())
        raise ValueError(
            f"rope_scaling yarn with {said}: llama.cpp takes 32 and 1 in this architecture, whatever the file says: "
            "export to Hugging Face instead"
        )
    keys["original_context_length"] = int(scaling["original_max_position_embeddings"])
    keys |= {f"yarn_{k}": v for k, v in betas.items()}
    warmth /= _yarn_warmth(keys["factor"])
    return keys | ({} if math.isclose(warmth, 1.0, rel_tol=1e-9) else {"attn_factor": float(warmth)})
