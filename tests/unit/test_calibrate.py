"""Rounding by what it does to tokens (accessory/model/calibrate.py) against the published algorithm in fp64 numpy, and what it is
worth: outputs nearer to the exact ones, in the same format."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from accessory import config
from accessory.data.loader import first_batches, num_tokens
from accessory.flags import ParallelArgs
from accessory.model import calibrate, quant
from accessory.model.calibrate import rounded
from accessory.model.llama import Transformer
from accessory.model.lora import TuningArgs, linears, mark_trainable, packed_weights
from accessory.model.pretrained import build, fill, quantise
from accessory.model.quant import NF4_LEVELS, Layout, dequantise, pack, tables
from accessory.parallel import groups
from accessory.train.start import calibration_tokens
from tests.gpu import bodies
from tests.gpu.bodies import TINY, counting

DATA = counting([40, 25, 64, 37, 51, 46, 58, 32], TINY["vocab_size"])


@pytest.fixture(autouse=True)
def _one_rank() -> None:
    groups.ensure()


def drawn(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight (rows, columns), inputs (3 * columns, columns) that go together and differ in size)."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=random) * torch.logspace(0, -1.5, columns).unsqueeze(1)
    return torch.randn(rows, columns, generator=random) * 0.02, torch.randn(
        3 * columns, columns, generator=random
    ) @ mixed


def both(weight: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple]:
    """(nearest, calibrated), dequantised, and the packed pair."""
    layout = Layout(*weight.shape, 0, 0, *weight.shape)
    order, factor = calibrate._factor(x.t() @ x)
    nearest = pack(weight, layout, torch.float32)
    better = pack(weight, layout, torch.float32, lambda w, absmax: rounded(w, absmax, order, factor))
    return *(dequantise(p, layout, tables("cpu"), torch.float32) for p in (nearest, better)), (nearest, better)


def error(x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> float:
    return ((x @ (weight - other).t()).norm() / (x @ weight.t()).norm()).item()


def published(weight: np.ndarray, absmax: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """GPTQ as its paper derives it, without a Cholesky factor: after each column the inverse of H loses it by one step of
    Gaussian elimination (equation 3), and the rest of the weights move by equation 2. -> codes."""
    columns, levels = weight.shape[1], np.array(NF4_LEVELS)
    damped = gram + 0.01 * np.diag(gram).mean() * np.eye(columns)
    inverse, left, codes = np.linalg.inv(damped), weight.copy(), np.zeros(weight.shape, np.uint8)
    for j in np.argsort(-np.diag(gram), kind="stable"):
        scale = absmax[:, j // quant.BLOCK]
        codes[:, j] = np.abs(left[:, j, None] / scale[:, None] - levels).argmin(1)
        wrong = (left[:, j] - levels[codes[:, j]] * scale) / inverse[j, j]
        left -= np.outer(wrong, inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("columns", [64, 192, 200])
def test_the_levels_are_those_of_the_published_algorithm(columns: int) -> None:
    weight, x = drawn(24, columns)
    gram = x.t() @ x
    absmax = quant._blocks(weight).abs().amax(-1)
    found = rounded(weight, absmax, *calibrate._factor(gram))
    expected = published(weight.double().numpy(), absmax.double().numpy(), gram.double().numpy())
    assert (found[:, columns:] == calibrate.ZERO).all()
    same = (found[:, :columns].numpy() == expected).mean()
    assert same > 0.995, same  # one rounding turned by fp32 moves those after it


@pytest.mark.parametrize("columns", [128, 200])
def test_outputs_are_nearer_in_the_same_format(columns: int) -> None:
    weight, x = drawn(48, columns)
    nearest, better, (old, new) = both(weight, x)
    assert error(x, weight, better) < 0.6 * error(x, weight, nearest)
    fresh = drawn(48, columns)[1].flip(0) + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    assert error(fresh, weight, better) < 0.7 * error(fresh, weight, nearest)
    assert error(torch.eye(columns), weight, better) > error(torch.eye(columns), weight, nearest)  # not the weights
    scales = 4 * Layout(*weight.shape, 0, 0, *weight.shape).head + 48 * -(-columns // quant.BLOCK)
    assert old.nbytes == new.nbytes and torch.equal(old.view(torch.uint8)[:scales], new.view(torch.uint8)[:scales])


def test_inputs_that_have_nothing_to_do_with_each_other_leave_the_nearest_level() -> None:
    weight, _ = drawn(16, 128)
    x = torch.eye(128)
    nearest, better, _ = both(weight, x)
    # of the scales as they are kept, so a weight half-way between two levels may go to the other
    assert (nearest == better).float().mean() > 0.98 and error(x, weight, better) < 1.001 * error(x, weight, nearest)


def test_inputs_that_are_always_zero_and_too_few_tokens() -> None:
    weight, x = drawn(16, 128)
    x[:, 5] = 0
    nearest, better, _ = both(weight, x[:20])
    assert error(x[:20], weight, better) < 0.5 * error(x[:20], weight, nearest) and better.isfinite().all()
    assert both(weight, torch.zeros(3, 128))[1].isfinite().all()


def test_what_is_not_finite_names_the_way_out() -> None:
    _, x = drawn(4, 64)
    x[3, 3] = float("nan")
    with pytest.raises(ValueError, match="not finite: check the checkpoint, or .* --calibration_tokens 0"):
        calibrate._factor(x.t() @ x)


def test_a_cut_inside_a_block_keeps_to_its_own_columns() -> None:
    gram = torch.eye(40) * 3
    wide = calibrate._widened(gram, Layout(8, 40, 0, 75, 8, 140))  # columns 75 to 114 of 64 to 127
    assert wide.shape == (64, 64) and torch.equal(wide, torch.eye(64) * 3)


# --- the model --------------------------------------------------------------------------------------------------------


def model_of(tokens: int, dropout: float = 0.0, quantised: bool = True, **tuning) -> Transformer:
    """Tiny, random; `tokens`: that it is calibrated on."""
    checkpoint, args = bodies.random_checkpoint(TINY, torch.float32)
    flags = TuningArgs(**({"lora_rank": 4, "lora_dropout": dropout} | tuning))
    model = build(checkpoint, args, flags)
    mark_trainable(model, flags)
    quantise(model, ParallelArgs(precision="fp32", quant="nf4" if quantised else None))
    batches = first_batches(DATA, tokens, seed=0, dp_rank=0, dp_size=1) if tokens else None
    fill(model, checkpoint, lambda name: None, calibrate_on=batches)
    return model


def test_a_model_is_nearer_to_the_exact_one() -> None:
    bodies.calibrated_nf4_is_as_good_as_the_cpus("cpu", TINY, DATA)


def test_every_linear_is_packed_and_nothing_else_is_left() -> None:
    model = model_of(100, dropout=0.5, modules_to_save=["layers.0.attention.wq"])
    assert len(packed_weights(model)) == 13 and model.training and all(m.training for m in model.modules())
    assert torch.equal(model.layers[0].attention.wq.weight, model_of(0, quantised=False).layers[0].attention.wq.weight)
    assert all(linear.weight.ndim == 1 for name, linear in linears(model) if name != "layers.0.attention.wq")
    assert not [m for m in model.modules() if m._forward_pre_hooks]


def test_the_same_tokens_give_the_same_bits() -> None:
    first, second = (packed_weights(model_of(100, dropout=0.5)) for _ in range(2))
    assert all(torch.equal(*(m[n].weight.view(torch.uint8) for m in (first, second))) for n in first)


# --- which tokens -----------------------------------------------------------------------------------------------------


def test_the_first_items_of_a_run_are_dealt_out() -> None:
    alone = first_batches(DATA, 150, seed=3, dp_rank=0, dp_size=1)
    assert len(alone) == 1 and 150 <= alone[0].tokens.shape[1] < 150 + 64
    dealt = [first_batches(DATA, 150, seed=3, dp_rank=r, dp_size=2) for r in range(2)]
    assert sum(b.tokens.shape[1] for part in dealt for b in part) == alone[0].tokens.shape[1]
    every = first_batches(DATA, 10**9, seed=3, dp_rank=0, dp_size=1)
    assert sum(b.tokens.shape[1] for b in every) == sum(num_tokens(e) for e in DATA)


def test_how_many() -> None:
    args = SimpleNamespace(dim=64, ffn_dim=192, n_heads=4, head_size=16)
    nf4 = ParallelArgs(quant="nf4")
    assert calibration_tokens(nf4, args, as_test=False) == 768
    assert calibration_tokens(nf4, args, as_test=True) == 256
    assert calibration_tokens(ParallelArgs(quant="nf4", calibration_tokens=0), args, as_test=True) == 0
    assert calibration_tokens(ParallelArgs(), args, as_test=False) == 0
    assert config.parse(["--quant", "nf4", "--calibration_tokens", "512"], ParallelArgs)[0].calibration_tokens == 512
    for wrong, said in (
        (["--calibration_tokens", "9"], "is for --quant nf4"),
        (["--calibration_tokens", "-1"], "0 or more"),
    ):
        with pytest.raises(ValueError, match=f"--calibration_tokens {wrong[1]}.*{said}"):
            config.parse(wrong, ParallelArgs)
