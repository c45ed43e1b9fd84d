"""Rotary embedding against transformers' tables, against the papers' formulae in fp64, and as a rotation."""

import math

import pytest
import torch

from accessory.model import rope
from accessory.model.args import ModelArgs

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA32 = LLAMA3 | {"factor": 32.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3.1": LLAMA3,
    "llama3.2": LLAMA32,
    "llama3, a short context": LLAMA3 | {"original_max_position_embeddings": 64},
    "yarn": YARN,
    "yarn 128k": YARN | {"factor": 32.0},
    "yarn, its betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, attention_factor": YARN | {"attention_factor": 1.7},
    "yarn, mscales": YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8},
    "yarn, not truncated": YARN | {"truncate": False},
    "yarn, factor below 1": YARN | {"factor": 0.5},
    "yarn, a context of 8": YARN | {"original_max_position_embeddings": 8},
}


def reference(head_dim: int, theta: float, scaling: dict, length: int | None = None) -> tuple[torch.Tensor, float]:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=131072 if length is None else length // 2,
        rope_parameters={**scaling, "rope_theta": theta},
    )
    return ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, seq_len=length)


@pytest.mark.parametrize("head_dim, theta", [(128, 500000.0), (64, 10000.0), (10, 1000.0)])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_frequencies_are_those_of_transformers(scaling: dict, head_dim: int, theta: float) -> None:
    freqs, factor = rope.frequencies(head_dim, theta, rope.check_scaling(scaling))
    expected, expected_factor = reference(head_dim, theta, scaling)
    torch.testing.assert_close(freqs, expected, rtol=5e-7, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)
    assert freqs.dtype == torch.float32 and freqs.shape == (head_dim // 2,)


@pytest.mark.parametrize("factor", [2.0, 3.0, 8.0])
def test_ntk_is_dynamic_ntk_at_the_length_where_it_has_this_factor(factor: float) -> None:
    """At twice the old context, dynamic NTK of strength s stretches the base as 2 s - (s - 1) = s + 1 does."""
    freqs, warmth = rope.frequencies(64, 10000.0, {"rope_type": "ntk", "factor": factor})
    expected, _ = reference(64, 10000.0, {"rope_type": "dynamic", "factor": factor - 1}, length=8192)
    torch.testing.assert_close(freqs, expected, rtol=5e-7, atol=0)
    assert warmth == 1.0
    plain, _ = rope.frequencies(
        64, 10000.0, None
    )  # the point of it: the fastest pair is untouched, the slowest slowed by factor
    assert freqs[0] == plain[0] and (plain[-1] / freqs[-1]).item() == pytest.approx(factor, rel=1e-5)


def test_llama3_by_the_definition_in_fp64() -> None:
    freqs, _ = rope.frequencies(128, 500000.0, LLAMA3)
    seen = set()
    for i, ours in enumerate(freqs.double().tolist()):
        plain = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4:
            kind, expected = "kept", plain
        elif wavelength > 8192 / 1:
            kind, expected = "divided", plain / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            kind, expected = "between", (1 - smooth) * plain / 8 + smooth * plain
        seen.add(kind)
        assert ours == pytest.approx(expected, rel=1e-6), (i, kind)
    assert seen == {"kept", "between", "divided"}


def test_tables_are_fp32_and_exact_far_out() -> None:
    freqs, _ = rope.frequencies(128, 500000.0, LLAMA3)
    positions = torch.tensor([[0, 1, 4095, 131071]])
    table = rope.table(positions, freqs, 1.0)
    cos, sin = table[:, :, :1].unflatten(-1, (-1, 2)).unbind(-1)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (1, 4, 1, 64)
    assert torch.equal(table[:, :, 1:], torch.cat((cos, sin), -1))
    angles = positions.double().unsqueeze(-1) * freqs.double()
    for table, exact in ((cos, angles.cos()), (sin, angles.sin())):
        assert (table.squeeze(2) - exact).abs().max() < 5e-3  # fp32 holds an angle of 131071 to 2^-7 turns of rounding
        assert (table.squeeze(2) - exact)[:, :3].abs().max() < 2e-4
    scaled = torch.arange(4096).float() / 4  # why never bf16: positions collapse
    assert len(scaled.bfloat16().unique()) < 1000 and len(scaled.unique()) == 4096


def test_it_turns_interleaved_pairs() -> None:
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    freqs, _ = rope.frequencies(8, 100.0, None)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 3, 9, 0, 2]])
    y = rope.rotate(x, rope.table(positions, freqs, 1.0))
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)))  # Meta's own formulation: complex multiplication
    turned = turned * torch.polar(torch.tensor(1.0), positions[..., None, None].float() * freqs)
    torch.testing.assert_close(y, torch.view_as_real(turned).flatten(-2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y[0, 0], x[0, 0], rtol=0, atol=0)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=1e-6)
    half = rope.rotate(x.bfloat16(), rope.table(positions, freqs, 1.0))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads_first", [True, False])
def test_compiled_it_is_the_same_to_the_bit(dtype: torch.dtype, heads_first: bool) -> None:
    """Of numbers of every size, infinite ones too, and of a gradient that lies as attention without packing gives it."""
    torch.compiler.reset()
    draw = torch.Generator().manual_seed(0)
    x, g = (torch.randn(2, 5, 3, 8, generator=draw).to(dtype) for _ in range(2))
    x[0] *= 10.0 ** torch.arange(-39, 33, 0.6).view(5, 3, 8)
    x[1, 0, 0, 0], x[1, 1, 1, 1] = torch.inf, torch.nan
    g = g.transpose(1, 2).contiguous().transpose(1, 2) if heads_first else g
    table = rope.table(torch.tensor([[0, 1, 2, 3, 4], [7, 3, 9, 0, 2]]), *rope.frequencies(8, 100.0, None))
    found = []
    for rotate in (rope.rotate, torch.compile(rope.rotate)):
        inputs = x.clone().requires_grad_()
        y = rotate(inputs, table)
        found.append((y, *torch.autograd.grad(y, inputs, g)))
    for mine, other in zip(*found, strict=True):
        if dtype == torch.bfloat16:
            assert torch.equal(mine.isnan(), other.isnan()) and torch.equal(mine.nan_to_num(1.5), other.nan_to_num(1.5))
        else:
            torch.testing.assert_close(mine, other, equal_nan=True)


@pytest.mark.parametrize(
    "scaling, message",
    [
        (
            {"rope_type": "dynamic", "factor": 2.0},
            "'dynamic' is not supported: known types are linear, ntk, llama3, yarn",
        ),
        ({"factor": 2.0}, "type None is not supported"),
        ({"rope_type": "linear"}, "linear: factor is missing"),
        ({"rope_type": "linear", "factor": None}, "factor None"),
        (
            {"rope_type": "llama3", "factor": 8.0},
            "high_freq_factor, low_freq_factor, original_max_position_embeddings is missing",
        ),
        ({"rope_type": "yarn", "factor": 8.0}, "original_max_position_embeddings is missing"),
        ({"rope_type": "linear", "factor": 0.0}, "factor 0.0 must be above 0"),
        ({"rope_type": "linear", "factor": 2.0, "short_factor": [1.0]}, "short_factor would change the positions"),
        (0.0, "rope_scaling 0.0"),
        ("linear", "rope_scaling 'linear'"),
    ],
)
def test_a_scaling_that_is_not_understood_is_refused(scaling, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelArgs.from_dict({"dim": 32, "n_heads": 4, "rope_scaling": scaling})


def test_spellings() -> None:
    def scaling(**keys) -> dict | None:
        return ModelArgs.from_dict({"dim": 32, "n_heads": 4} | keys).rope_scaling

    assert scaling(rope_scaling={"type": "linear", "factor": 2.0}) == {"rope_type": "linear", "factor": 2.0}
    assert scaling(rope_scaling=0.5) == {"rope_type": "linear", "factor": 2.0}  # Accessory's: positions times a half
    assert (
        scaling(rope_scaling=1.0)
        is scaling(rope_scaling={"rope_type": "default"})
        is scaling(rope_scaling=None)
        is scaling()
        is None
    )
    assert scaling(use_scaled_rope=True) == LLAMA3
    assert (
        scaling(use_scaled_rope=True, dim=2048, n_layers=16) == LLAMA32
    )  # Llama 3.2 1B; its file does not tell the factor
    assert scaling(use_scaled_rope=True, dim=3072, n_layers=28) == LLAMA32
    assert scaling(use_scaled_rope=True, rope_scaling_factor=16)["factor"] == 16.0
    assert scaling(use_scaled_rope=False) is None
