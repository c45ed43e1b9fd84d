"""Rotary position embedding: frequencies with every scaling that published LLaMAs use, and the rotation of interleaved pairs.

    x = [a0 b0 a1 b1 ...]   pair i turns by position * frequency_i   (Meta's layout; Hugging Face rotates halves instead)

Always fp32: in bf16, 4096 scaled positions collapse to 769 distinct ones. Sources: Su et al. 2021 (RoPE); Chen et al. 2023
(linear); bloc97 2023 (NTK-aware); Peng et al. 2023 (YaRN); Meta's llama-models for Llama 3.1. Proof: tests/unit/test_llama.py.

Shapes: B batch, T tokens, H heads, Dh head dim.
"""

import math
from typing import Any

import torch
from torch import Tensor

from accessory.parallel.derivatives import by_hand

KNOWN = {
    "linear": {"factor"},
    "ntk": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings"},
}
UPPER = -(2**16)  # bits 16 to 31
OPTIONAL = {"yarn": {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"}}


def check_scaling(scaling: dict[str, Any]) -> dict[str, Any]:
    """A rope_scaling dict with its type under "rope_type". Raises ValueError for an unknown type, a missing or unknown key."""
    if not isinstance(scaling, dict):
        raise ValueError(
            f"rope_scaling {scaling!r}: expected an object with rope_type and factor, or Accessory's number above 0"
        )
    scaling = {("rope_type" if k == "type" else k): v for k, v in scaling.items()}
    kind = scaling.get("rope_type")
    if kind not in KNOWN:
        raise ValueError(f"rope_scaling of type {kind!r} is not supported: known types are {', '.join(KNOWN)}")
    keys = set(scaling) - {"rope_type"}
    if missing := KNOWN[kind] - keys:
        raise ValueError(f"rope_scaling {kind}: {', '.join(sorted(missing))} is missing")
    if unknown := keys - KNOWN[kind] - OPTIONAL.get(kind, set()) - {"rope_theta", "original_max_position_embeddings"}:
        raise ValueError(
            f"rope_scaling {kind}: {', '.join(sorted(unknown))} would change the positions and is not known"
        )
    if not isinstance(scaling["factor"], (int, float)) or not scaling["factor"] > 0:
        raise ValueError(f"rope_scaling {kind}: factor {scaling['factor']} must be above 0")
    return scaling


def frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> tuple[Tensor, float]:
    """Angle per position of each pair, (Dh/2,) fp32, and the factor on cos and sin (1 except for YaRN)."""
    if scaling and scaling["rope_type"] == "ntk":
        theta = theta * scaling["factor"] ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    freqs = 1.0 / (theta**exponents)
    if not scaling or scaling["rope_type"] == "ntk":
        return freqs, 1.0
    if scaling["rope_type"] == "linear":
        return freqs / scaling["factor"], 1.0
    if scaling["rope_type"] == "llama3":
        return _llama3(freqs, scaling), 1.0
    return _yarn(freqs, head_dim, theta, scaling)


def _llama3(freqs: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Long wavelengths are divided by factor, short ones kept, those between blended linearly."""
    old, low, high = (scaling[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    wavelengths = 2 * math.pi / freqs
    blend = ((old / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * freqs / scaling["factor"] + blend * freqs


def _yarn(freqs: Tensor, head_dim: int, theta: float, scaling: dict[str, Any]) -> tuple[Tensor, float]:
    """Pairs that turn often within the old context are kept, slow ones interpolated, with a ramp between; logits are warmed."""
    factor, old = scaling["factor"], scaling["original_max_position_embeddings"]

    def pair_with(turns: float) -> float:  # the pair that makes this many turns within the old context
        return head_dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_with(scaling.get("beta_fast") or 32), pair_with(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2).float() - first) / max(last - first, 0.001)).clamp(0, 1)
    scaled = freqs / factor * ramp + freqs * (1 - ramp)
    return scaled, _yarn_warmth(factor, scaling)


def _yarn_warmth(factor: float, scaling: dict[str, Any]) -> float:
    def mscale(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale()


def table(positions: Tensor, freqs: Tensor, factor: float) -> Tensor:
    """cos and sin beside each other for (B, T) positions: (B, T, 1, Dh) fp32, ready to broadcast over heads. On a CPU
    (B, T, 2, Dh), for compiled layers too: then all cos and all sin."""
    angles = positions.unsqueeze(-1).float() * freqs.to(positions.device)  # (B, T, Dh/2)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    pairs = torch.stack((cos, sin), dim=-1).flatten(-2)
    rows = (pairs, torch.cat((cos, sin), dim=-1)) if positions.device.type == "cpu" else (pairs,)
    return torch.stack(rows, dim=2)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns each interleaved pair of x (B, T, H, Dh) by its position's angle, in fp32 or x's fp64; the result has x's dtype."""
    if torch.compiler.is_compiling() and x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return _Turned.apply(x, *table[:, :, 1:].chunk(2, dim=-1))
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    turns = table[:, :, :1].unflatten(-1, (-1, 2))
    if not by_hand():  # inductor knows no complex numbers, vmap none of their views
        (a, b), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)
    # the same numbers in one pass over memory instead of seven: ten times faster on CPU
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns)).flatten(-2).type_as(x)


class _Turned(torch.autograd.Function):
    """The same numbers for inductor, which on a CPU makes no vectors of what takes every other element: a pair in bf16 is one
    int32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int = 1) -> Tensor:  # cos and sin (B, T, 1, Dh/2)
    pairs = x.view(torch.int32)  # a in the lower bits, b in the upper ones, which are those of the number in fp32
    a, b = (pairs << 16).view(torch.float32), (pairs & UPPER).view(torch.float32)
    low, high = _rounded(a * cos - b * sin * sign), _rounded(a * sin * sign + b * cos)
    return (low >> 16 & ~UPPER | high & UPPER).view(torch.bfloat16)


def _rounded(x: Tensor) -> Tensor:
    """The bits of fp32, of which the upper 16 are bf16's nearest, of two as near the even one. By hand: inductor leaves a cast
    to bf16 and back out."""
    bits = x.view(torch.int32)
    return bits + 0x7FFF + (bits >> 16 & 1)
