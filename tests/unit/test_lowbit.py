"""--optim_states bf16 and int8: the codes, the step against torch's fused AdamW, skipped steps, checkpoints, a real training."""

import numpy as np
import pytest
import torch
from torch import nn

from accessory import log
from accessory.checkpoint.resume import moments_of
from accessory.data.sft import Example
from accessory.model import ModelArgs, Transformer, shard_dim
from accessory.model.llama import kv_copied
from accessory.model.lora import partial_grad
from accessory.parallel.fsdp import sharder
from accessory.parallel.grads import GradientRules
from accessory.train import loop, lowbit, objectives, optim
from accessory.train.lowbit import BLOCK, MOMENTS
from accessory.train.state import TrainState
from tests.helpers import sharded_alone

STATES = ("bf16", "int8")


def spread(count: int, seed: int = 0) -> torch.Tensor:
    """Numbers over twelve decades, blocks over thirty: (count blocks, BLOCK)."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return draw(count, BLOCK) * 10 ** (3 * draw(count, BLOCK)) * 10 ** (5 * draw(count, 1))


def empty(blocks: int, states: str, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    if states == "bf16":
        return torch.zeros(blocks, BLOCK, dtype=torch.bfloat16), None
    code = torch.int8 if name == "exp_avg" else torch.uint8
    return torch.zeros(blocks, BLOCK, dtype=code), torch.zeros(blocks, 1)


def noise_of(step: int, states: str, name: str) -> torch.Tensor | None:
    return lowbit.dither(torch.tensor(float(step)), name, states)


def packed(x: torch.Tensor, states: str, name: str, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    codes, unit = empty(x.shape[0], states, name)
    lowbit.pack(x.clone(), codes, unit, noise_of(step, states, name), torch.empty_like(x))
    return codes, unit


def unpacked(codes: torch.Tensor, unit: torch.Tensor | None) -> torch.Tensor:
    x = torch.empty(codes.shape)
    lowbit.unpack(x, codes, unit)
    return x


# --- the codes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize("states", STATES)
def test_what_was_unpacked_is_packed_to_the_same_codes(states: str, name: str) -> None:
    """At any step, with any dither, over and over: 2000 blocks of all sizes, zeros, and blocks with one number."""
    x = spread(2000) if name == "exp_avg" else spread(2000).square().clamp(max=1e30)
    x[0], x[1], x[1, 7] = 0, 0, 3e-20
    codes, unit = packed(x, states, name, 1)
    for step in (2, 3, 1000, 10**6):
        again, unit_again = packed(unpacked(codes, unit), states, name, step)
        assert torch.equal(again, codes), (step, int((again != codes).sum()))
        assert unit is None or torch.equal(unit, unit_again)
    assert not unpacked(codes, unit)[0].any() and unpacked(codes, unit).isfinite().all()


def test_int8_is_exact_at_the_top_and_fine_below() -> None:
    """Against the true numbers: the error of a rounding to either side, relative to the number."""
    ratio = torch.logspace(0, -6, BLOCK)
    for name, levels, power, worst in (("exp_avg", 127, 2, 0.18), ("exp_avg_sq", 255, 4, 0.06)):
        truth = ratio.repeat(50, 1)
        codes = torch.stack([packed(ratio[None].clone(), "int8", name, s)[0][0] for s in range(50)])
        unit = packed(ratio[None].clone(), "int8", name, 0)[1]
        got = unpacked(codes, unit.repeat(50, 1))
        assert (codes[:, 0] == levels).all() and torch.allclose(got[:, 0], truth[:, 0], rtol=1e-3)
        error = (got - truth).abs() / truth
        assert error[:, ratio >= 1e-2].max() < worst, (name, error.max())
        assert not (name == "exp_avg_sq" and (codes == 0).any())
        assert error[:, ratio >= 0.5].max() < 1.3 * power / levels  # from code to code it is power / code of the number


def test_a_second_moment_beside_a_larger_one_is_never_zero() -> None:
    """Or a first moment that is not zero would be divided by epsilon alone."""
    x = torch.tensor(1.0).repeat(1, BLOCK)
    x[0, 1:] = torch.logspace(-8, -30, BLOCK - 1)
    for step in range(20):
        assert (packed(x, "int8", "exp_avg_sq", step)[0] >= 1).all()


def test_a_unit_is_found_again_though_roots_are_off_by_a_bit() -> None:
    """As a GPU's may be."""
    for step in range(50):
        noise = noise_of(step, "int8", "exp_avg")[:, :1]
        unit = lowbit._unit(torch.rand(1000, 1, generator=torch.Generator().manual_seed(step)) + 1e-3, noise)
        for off in (-4, -1, 0, 1, 4):
            other = noise_of(step + 1, "int8", "exp_avg")[:, :1]
            assert torch.equal(lowbit._unit((unit.view(torch.int32) + off).view(torch.float32), other), unit)


@pytest.mark.parametrize("states, name", [("bf16", "exp_avg_sq"), ("int8", "exp_avg"), ("int8", "exp_avg_sq")])
def test_rounding_is_right_on_average(states: str, name: str) -> None:
    """Over the steps, the mean of a root's codes is the root: the dither visits all of [0, 1) evenly."""
    x = torch.rand(4, BLOCK, generator=torch.Generator().manual_seed(1)) + 0.5
    x[:, 0] = 1.6
    power = {"bf16": 1.0, "exp_avg": 0.5, "exp_avg_sq": 0.25}[states if states == "bf16" else name]
    mean = torch.stack([unpacked(*packed(x, states, name, s)).double() ** power for s in range(1000)]).mean(0)
    code = {"bf16": 2**-7, "exp_avg": 1.6**0.5 / 127, "exp_avg_sq": 1.6**0.25 / 255}[
        states if states == "bf16" else name
    ]
    assert ((mean - x.double() ** power).abs() / code).max() < 0.03


@pytest.mark.parametrize("states", STATES)
def test_a_second_moment_moves_at_a_large_beta2(states: str) -> None:
    """1000 steps at 0.999 from 1 towards 0, and from 0.5 towards 2: to the nearest, most would not move at all."""
    for start, target in ((1.0, 0.0), (0.5, 2.0)):
        truth = torch.full((8, BLOCK), start) * (1 + torch.rand(8, BLOCK, generator=torch.Generator().manual_seed(2)))
        x = truth.clone()
        for step in range(1, 1001):
            for value in (truth, x):
                value.mul_(0.999).add_(target * 0.001)
            x = unpacked(*packed(x, states, "exp_avg_sq", step))
        assert ((x - truth).abs() / truth).mean() < 0.03, (states, target)


# --- the step ---------------------------------------------------------------------------------------------------------


def module(sharded: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 90), nn.LayerNorm(90), nn.Linear(90, 600, bias=False))  # 9000 = 35.2 blocks
    return sharded_alone(model) if sharded else model


def args(states: str, **keys) -> optim.OptimArgs:
    return optim.OptimArgs(**{"lr": 1e-2, "weight_decay": 0.3, "adam_betas": [0.8, 0.9], "optim_states": states} | keys)


def put_gradients(model: nn.Module, generator: torch.Generator, times: float = 1.0) -> None:
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * times


@pytest.mark.parametrize("states", STATES)
def test_steps_are_those_of_adamw_as_far_as_the_codes_reach(states: str, monkeypatch) -> None:
    monkeypatch.setitem(lowbit.CHUNK, "cpu", 4 * BLOCK)  # tensors of many chunks, the last one with a part of a block
    ours, theirs = module(), module()
    low, full = optim.adamw(ours, args(states)), optim.adamw(theirs, args("fp32"))
    for step in range(30):
        put_gradients(ours, torch.Generator().manual_seed(step), 2.0)
        put_gradients(theirs, torch.Generator().manual_seed(step))
        optim.step(low, 1e-2, torch.tensor(0.0), divide_by=torch.tensor(2.0))
        optim.step(full, 1e-2, torch.tensor(0.0))
        if step == 0:  # the first step is from moments of zero: exact
            assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert low.steps.item() == 30
    for mine, truth in zip(ours.parameters(), theirs.parameters()):
        off = (mine - truth).norm() / (truth - 0).norm()
        assert off < 0.01 and (mine.numel() >= lowbit.SMALL or torch.equal(mine, truth)), off
        for m in MOMENTS:
            a, b = moments_of(mine, low)[m].float(), full.state[truth][m]
            assert a.shape == b.shape and (a - b).norm() / b.norm() < (0.01 if states == "bf16" else 0.03)


@pytest.mark.parametrize("states", STATES)
def test_a_step_that_is_skipped_leaves_no_trace(states: str) -> None:
    ours, clean = module(), module()
    low, good = optim.adamw(ours, args(states)), optim.adamw(clean, args(states))
    for step, bad in enumerate([True, False, True, True, False, False, True]):
        for model, optimizer in ((ours, low), (clean, good)):
            if bad and model is clean:
                continue
            put_gradients(model, torch.Generator().manual_seed(step), float("inf") if bad else 1.0)
            optim.step(optimizer, 1e-2, torch.tensor(float(bad)))
    assert low.steps.item() == good.steps.item() == 3
    for mine, truth in zip(ours.parameters(), clean.parameters()):
        assert torch.equal(mine, truth)
        assert all(torch.equal(low.state[mine][k], good.state[truth][k]) for k in good.state[truth])


@pytest.mark.parametrize("states", STATES)
def test_sharded_parameters_take_the_same_steps(states: str) -> None:
    plain, sharded = module(), module(sharded=True)
    optimizers = [optim.adamw(m, args(states)) for m in (plain, sharded)]
    for step in range(5):
        put_gradients(plain, torch.Generator().manual_seed(step))
        for p, q in zip(plain.parameters(), sharded.parameters()):
            q.grad = torch.distributed.tensor.DTensor.from_local(p.grad.clone(), q.device_mesh, q.placements)
        for optimizer in optimizers:
            optim.step(optimizer, 1e-2, torch.tensor(0.0))
    for p, q in zip(plain.parameters(), sharded.parameters()):
        assert torch.equal(p, q.full_tensor())


def test_memory_is_a_half_and_a_quarter() -> None:
    """Of a model of published proportions: embedding and matrices large, norms small."""
    model = Transformer(
        ModelArgs.from_dict({"dim": 256, "n_layers": 2, "n_heads": 4, "vocab_size": 2000, "hidden_dim": 688})
    ).init_weights()
    used = {}
    for states in ("fp32", *STATES):
        optimizer = optim.adamw(model, args(states))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optim.step(optimizer, 0.0, torch.tensor(0.0))
        used[states] = sum(v.nbytes for s in optimizer.state.values() for k, v in s.items() if k != "step")
        count = sum(p.numel() for p in model.parameters())
        assert used[states] == pytest.approx(lowbit.BYTES[states] * count, rel=0.01)  # what the plan says
    assert used["bf16"] < 0.505 * used["fp32"] and used["int8"] < 0.27 * used["fp32"]


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ("fp32", *STATES))
@pytest.mark.parametrize("states", ("fp32", *STATES))
def test_moments_go_to_another_optimizer_and_on(states: str, to: str) -> None:
    """Held the same way, the run goes on to the bit; held in another, from the same numbers as well as that one can."""
    model, other = module(), module()
    first, second = optim.adamw(model, args(states)), optim.adamw(other, args(to))
    for step in range(4):
        put_gradients(model, torch.Generator().manual_seed(step))
        optim.step(first, 1e-2, torch.tensor(0.0))
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters()):
            q.copy_(p)
            source, target = moments_of(p, first), moments_of(q, second)
            target["step"].fill_(source["step"].item())
            for m in MOMENTS:
                target[m].copy_(source[m])
            if hasattr(second, "keep"):
                second.keep(q, target)
            for m in MOMENTS:
                a, b = source[m].float(), moments_of(q, second)[m].float()
                assert (a - b).norm() / a.norm() < 0.02 and (states != to or torch.equal(a, b))
    for each, optimizer in ((model, first), (other, second)):
        put_gradients(each, torch.Generator().manual_seed(9))
        optim.step(optimizer, 1e-2, torch.tensor(0.0))
    same = [torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters())]
    assert all(same) == (to in ("fp32", states))  # whose step is the same; only what is then held is not


# --- a training -------------------------------------------------------------------------------------------------------


def curve(tmp_path, states: str, seed: int, steps: int = 60) -> np.ndarray:
    """Loss by step of a small model that learns a made-up language: the next token is one of two, by the last."""
    torch.manual_seed(seed)
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 97, "hidden_dim": 128}
    model = Transformer(ModelArgs.from_dict(sizes)).init_weights()
    sharder("fsdp", "fp32")(model)
    rng = np.random.default_rng(seed)
    follow = rng.integers(0, 97, (97, 2))
    data = []
    for _ in range(64):
        ids = [int(rng.integers(97))]
        for _ in range(31):
            ids.append(int(follow[ids[-1], rng.integers(2)]))
        data.append(Example(np.array(ids, dtype=np.int32), 1))
    rules = GradientRules(model, 4, shard_dim, partial_grad, kv_copied)
    optim_args = optim.OptimArgs(lr=3e-3, warmup_steps=10, weight_decay=0.01, optim_states=states)
    lines: list[dict] = []
    run_log = log.RunLog(tmp_path, 1, (), None, steps)  # rank 1 writes nothing
    run_log.write = lines.append  # type: ignore[assignment]
    loop.fit(
        model, optim.adamw(model, optim_args), rules, objectives.next_token, data, TrainState(),
        loop.LoopArgs(batch_size=16, max_steps=steps, seed=seed), optim_args, precision="fp32", data_parallel="fsdp",
        num_workers=0, run_log=run_log, evaluate=None, sample=None, save_best=0, save=lambda s: None,
    )  # fmt: skip
    return np.array([line["loss"] for line in lines])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_training_loses_as_with_fp32_within_a_percent(tmp_path, seed: int) -> None:
    full = curve(tmp_path, "fp32", seed)
    assert full[-1] < 0.7 * full[0]  # it learns
    for states in STATES:
        low = curve(tmp_path, states, seed)
        smooth = [np.convolve(c, np.ones(8) / 8, "valid") for c in (low, full)]
        assert np.abs(smooth[0] / smooth[1] - 1).max() < 0.01, (states, np.abs(smooth[0] / smooth[1] - 1).max())
