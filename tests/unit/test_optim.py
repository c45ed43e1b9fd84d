"""Schedules against transformers', fused AdamW's skipped steps against torch's plain AdamW, fp16's loss scale against GradScaler's rule."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from accessory import log
from accessory.data.sft import Example
from accessory.flags import SCHEDULES
from accessory.model import ModelArgs, Transformer, shard_dim
from accessory.model.llama import kv_copied
from accessory.model.lora import partial_grad
from accessory.parallel import groups
from accessory.parallel.fsdp import local, sharder
from accessory.parallel.grads import GradientRules
from accessory.train import loop, objectives, optim
from accessory.train.optim import OptimArgs, lr_at
from accessory.train.state import TrainState
from tests.helpers import gathered, sharded_alone

STEPS = 200


def curve(steps: int = STEPS, **flags) -> np.ndarray:
    args = OptimArgs(**{"lr": 3e-4, "warmup_ratio": 0.0} | flags)
    return np.array([lr_at(s, steps, args) for s in range(steps)])


def reference(name: str, warmup: int, **options) -> np.ndarray:
    """The same 200 learning rates by transformers."""
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    schedule = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS, scheduler_specific_kwargs=options
    )
    rates = []
    for _ in range(STEPS):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return np.array(rates)


@pytest.mark.parametrize("warmup", [0, 1, 20])
@pytest.mark.parametrize(
    "ours, theirs, flags, options",
    [
        ("cosine", "cosine", {}, {}),
        ("cosine", "cosine_with_min_lr", {"min_lr": 3e-5}, {"min_lr": 3e-5}),
        ("linear", "linear", {}, {}),
        ("constant", "constant_with_warmup", {}, {}),
        ("polynomial", "polynomial", {"min_lr": 1e-7}, {"power": 2.0, "lr_end": 1e-7}),
        ("cosine_with_restarts", "cosine_with_restarts", {}, {"num_cycles": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_after_the_warm_up_schedules_are_those_of_transformers(
    ours: str, theirs: str, flags: dict, options: dict, warmup: int
) -> None:
    got, expected = curve(lr_scheduler=ours, warmup_steps=warmup, **flags), reference(theirs, warmup, **options)
    np.testing.assert_allclose(got[warmup:], expected[warmup:], rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("warmup", [0, 20])
def test_wsd_is_that_of_transformers(warmup: int) -> None:
    decay = round((STEPS - warmup) * 0.1)
    expected = reference("warmup_stable_decay", warmup, num_decay_steps=decay, decay_type="linear")
    np.testing.assert_allclose(curve(lr_scheduler="wsd", warmup_steps=warmup)[warmup:], expected[warmup:], rtol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_warms_up_evenly_and_keeps_its_bounds(name: str) -> None:
    rates = curve(lr_scheduler=name, warmup_steps=9, min_lr=2e-5)
    np.testing.assert_allclose(
        rates[:10], 3e-4 * np.arange(1, 11) / 10, rtol=1e-12
    )  # no step at 0, the peak right after
    assert rates[9:].min() >= 2e-5 * (1 - 1e-12) and rates.max() == 3e-4
    if name != "cosine_with_restarts":
        assert (np.diff(rates[9:]) <= 0).all()
    end = lr_at(STEPS, STEPS, OptimArgs(lr=3e-4, min_lr=3e-5, lr_scheduler=name))
    assert end == pytest.approx(3e-4 if name == "constant" else 3e-5, rel=1e-9)
    assert (
        lr_at(0, 1, OptimArgs(lr=3e-4, lr_scheduler=name, warmup_ratio=0.0)) == 3e-4
    )  # a run of one step does something
    assert lr_at(4, 5, OptimArgs(lr=3e-4, lr_scheduler=name, warmup_steps=50)) == pytest.approx(3e-4 * 5 / 51)


def test_restarts_restart() -> None:
    rates = curve(steps=300, lr_scheduler="cosine_with_restarts")
    assert [int(s) for s in np.flatnonzero(np.isclose(rates, 3e-4, rtol=1e-9))] == [0, 100, 200]


def test_how_long_the_warm_up_is() -> None:
    assert OptimArgs(warmup_ratio=0.03).warmup(200) == 6
    assert OptimArgs(warmup_ratio=0.03).warmup(201) == 7  # rounded up, as transformers does
    assert OptimArgs(warmup_ratio=0.5, warmup_steps=0).warmup(200) == 0
    assert OptimArgs(warmup_ratio=0.5, warmup_steps=11).warmup(200) == 11


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"lr": 1e-4, "min_lr": 1e-3}, "--min_lr 0.001 with --lr 0.0001"),
        ({"min_lr": -1.0}, "--min_lr -1.0"),
        ({"lr": -1.0}, "--lr -1.0"),
        ({"adam_betas": [0.9]}, "--adam_betas 0.9: expected two"),
        ({"adam_betas": [0.9, 1.0]}, "--adam_betas 0.9,1.0"),
        ({"warmup_ratio": 1.5}, "--warmup_ratio 1.5"),
        ({"warmup_steps": -1}, "--warmup_steps"),
        ({"clip_grad": -1.0}, "--clip_grad"),
        ({"weight_decay": -0.1}, "--weight_decay"),
    ],
)
def test_figures_that_cannot_be_are_errors(flags: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimArgs(**flags)


# --- AdamW ------------------------------------------------------------------------------------------------------------


def module() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False))
    model[2].weight.requires_grad_(False)
    return model


def test_a_step_that_is_skipped_leaves_no_trace() -> None:
    """Good steps around bad ones equal the good steps alone, by torch's unfused AdamW: weights, moments and counts."""
    args = OptimArgs(lr=1e-2, weight_decay=0.3, adam_betas=[0.8, 0.9])
    ours, theirs = module(), module()
    frozen = ours[2].weight.clone()
    optimizer = optim.adamw(ours, args)
    matrices, rest = [theirs[0].weight], [theirs[0].bias, *theirs[1].parameters()]
    plain = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}],
        betas=(0.8, 0.9),
        fused=False,
    )
    generator = torch.Generator().manual_seed(1)
    for step, bad in enumerate([True, False, False, True, True, False, False]):
        lr = 1e-2 / (step + 1)
        for mine, truth in zip(ours.parameters(), theirs.parameters()):
            gradient = torch.randn(mine.shape, generator=generator)
            if mine.requires_grad:
                mine.grad, truth.grad = gradient.clone(), gradient
                if bad:
                    mine.grad.view(-1)[0] = float("inf") if step else float("nan")
        optim.step(optimizer, lr, torch.tensor(float(bad)))
        assert all(p.grad is None for p in ours.parameters())
        if not bad:
            for group in plain.param_groups:
                group["lr"] = lr
            plain.step()
        for mine, truth in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(mine, truth, rtol=1e-6, atol=1e-7)
    assert torch.equal(ours[2].weight, frozen) and ours[2].weight not in optimizer.state
    for mine, truth in zip(ours.parameters(), theirs.parameters()):
        if mine.requires_grad:
            a, b = optimizer.state[mine], plain.state[truth]
            assert a["step"].item() == b["step"].item() == 4
            for key in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(a[key], b[key], rtol=1e-6, atol=1e-8)


def put_gradients(model: nn.Module, like: nn.Module, seed: int) -> None:
    """The same ones on both, as DTensors where `like` is sharded."""
    draw = torch.Generator().manual_seed(seed)
    for p, q in zip(model.parameters(), like.parameters()):
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=draw)
            mine = p.grad.clone()
            q.grad = mine if not isinstance(q, DTensor) else DTensor.from_local(mine, q.device_mesh, q.placements)


@pytest.mark.parametrize("sharded", [False, True])
def test_steps_are_those_of_torchs_fused_adamw(sharded: bool) -> None:
    """To the bit: through a gradient that is missing, a divisor, a checkpoint by state_dict, and parameters put elsewhere."""
    theirs, ours = module(), module()
    if sharded:
        sharded_alone(ours)
    plain = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], fused=True, weight_decay=0.0)
    plain_args = OptimArgs(lr=1e-2, adam_betas=[0.9, 0.999])
    optimizer = optim.adamw(ours, plain_args)
    for step in range(8):
        put_gradients(theirs, ours, step)
        if step == 2:  # its count of steps goes on, so the last one comes late
            next(theirs.parameters()).grad = next(ours.parameters()).grad = None
        if step == 4:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = optim.adamw(ours, plain_args)
            optimizer.load_state_dict(state)
        if step == 6:
            ours.double().float()
        plain.param_groups[0]["lr"], plain.grad_scale, plain.found_inf = 1e-2, torch.tensor(3.0), torch.tensor(0.0)
        plain.step()
        if step == 2:
            plain.state[next(theirs.parameters())]["step"] += 1
        optim.step(optimizer, 1e-2, torch.tensor(0.0), torch.tensor(3.0))
        for mine, truth in zip(ours.parameters(), theirs.parameters()):
            assert torch.equal(local(mine.detach()), truth), step


def test_the_norm_of_many_numbers_is_exact() -> None:
    """Of a fp32 sum of 21 million squares, of a gradient that lies as its transpose and of an empty one."""
    groups.init(1, on="cpu")
    model = nn.ModuleDict({"w1": nn.Linear(4096, 4100, bias=False), "w2": nn.Linear(2048, 2048), "norm": nn.RMSNorm(0)})
    for p in model.parameters():
        p.grad = torch.randn(p.shape).add_(1)
    model["w1"].weight.grad = torch.randn(4096, 4100).add_(1).t()
    rules = GradientRules(model, 4, shard_dim, partial_grad, kv_copied)
    truth = sum(p.grad.double().square().sum() for p in model.parameters()).sqrt()
    torch.testing.assert_close(rules.global_norm().double(), truth, rtol=1e-5, atol=0)
    for wrong in (torch.inf, torch.nan):
        model["w2"].weight.grad[5, 7] = wrong
        torch.testing.assert_close(rules.global_norm(), torch.tensor(wrong), equal_nan=True)


def test_a_divisor_of_one_is_left_out(monkeypatch) -> None:
    """On the CPU: the kernel would write every gradient back, and the weights are the same without."""
    models, seen = (module(), module()), []
    kernel = torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *a, **k: (seen.append(k["grad_scale"]), kernel(*a, **k)))
    for model, by in zip(models, (torch.tensor(1.0), None)):
        put_gradients(model, module(), 0)
        optim.step(optim.adamw(model, OptimArgs(lr=1e-2)), 1e-2, torch.tensor(0.0), by)
    assert seen == [None] * len(seen) and all(map(torch.equal, *(m.parameters() for m in models)))


@pytest.mark.parametrize("rows", [7, 700])  # of fewer than 4096 numbers, or more
@pytest.mark.parametrize("states", ["fp32", "bf16"])
def test_a_weight_that_lies_as_its_transpose_learns_the_same(states: str, rows: int) -> None:
    """Whichever way its gradient lies, and moments that were saved."""
    args, draw = OptimArgs(lr=0.1, weight_decay=0.1, optim_states=states), torch.Generator().manual_seed(0)
    start = torch.randn(rows, 16, generator=draw)
    plain, turned = (nn.Linear(16, rows, bias=False) for _ in range(2))
    plain.weight = nn.Parameter(start.clone())
    turned.weight = nn.Parameter(start.t().contiguous().t())
    optimizers = [optim.adamw(model, args) for model in (plain, turned)]
    for step in range(6):
        gradient = torch.randn(rows, 16, generator=draw)
        plain.weight.grad = gradient.clone()
        turned.weight.grad = gradient.clone() if step % 2 else gradient.t().contiguous().t()
        if step == 3 and states == "fp32":
            optimizers[1] = optim.adamw(turned, args)
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for optimizer in optimizers:
            optim.step(optimizer, 0.1, torch.zeros(()))
    assert turned.weight.stride() == (1, rows) and not torch.equal(plain.weight, start)
    if states == "fp32" or rows == 7:
        assert torch.equal(plain.weight, turned.weight)
    else:  # the pattern of rounding falls on other numbers
        torch.testing.assert_close(plain.weight, turned.weight, rtol=1e-2, atol=1e-2)


def test_only_matrices_decay() -> None:
    model = Transformer(
        ModelArgs.from_dict(
            {"dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 11, "hidden_dim": 16, "attention_bias": True}
        )
    ).init_weights()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {
        g["weight_decay"]: [names[id(p)] for p in g["params"]]
        for g in optim.adamw(model, OptimArgs(weight_decay=0.1)).param_groups
    }
    assert sorted(groups[0.1] + groups[0.0]) == sorted(names.values())
    assert all("norm" in n or n.endswith(".bias") for n in groups[0.0]) and not any(
        "norm" in n or "bias" in n for n in groups[0.1]
    )


# --- fp16's loss scale ------------------------------------------------------------------------------------------------


def test_the_loss_scale_moves_as_gradscalers() -> None:
    scale = optim.LossScale("fp16", torch.device("cpu"))
    value, tracker = torch.tensor(2.0**16), torch.zeros((), dtype=torch.int32)
    bad = {3, 10, 11, 500, 2900, 5200}
    for step in range(6000):
        found = torch.tensor(float(step in bad))
        scale.update(found)
        torch._amp_update_scale_(value, tracker, found, 2.0, 0.5, 2000)
        assert scale.value.item() == value.item() and scale.good.item() == tracker.item(), step
    assert scale.value.item() == 2.0 ** (16 - 6 + 2)  # six bad ones; 2000 good in a row after 500 and after 2900
    again = optim.LossScale("fp16", torch.device("cpu"))
    again.load_state_dict(scale.state_dict())
    assert (again.value, again.good) == (scale.value, scale.good)
    for _ in range(50):
        scale.update(torch.tensor(1.0))
    assert scale.value.item() == 1.0  # never below


@pytest.mark.parametrize("precision", ["bf16", "fp32", "tf32"])
def test_other_precisions_have_none(precision: str) -> None:
    scale = optim.LossScale(precision, torch.device("cpu"))
    for found in (1.0, 0.0):
        scale.update(torch.tensor(found))
    assert scale.value.item() == 1.0


# --- in the loop ------------------------------------------------------------------------------------------------------


def train(tmp_path: Path, bad, steps: int, precision: str = "fp32") -> tuple[dict, TrainState]:
    """A tiny run whose loss is infinite where bad(number of the step). -> (weights, state)"""
    model = Transformer(
        ModelArgs.from_dict({"dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 11, "hidden_dim": 16})
    ).init_weights()
    sharder("fsdp", precision)(model)
    args = OptimArgs(lr=1e-2, lr_scheduler="constant", warmup_ratio=0.0)
    rules = GradientRules(model, 2, shard_dim, partial_grad, kv_copied)
    calls = []

    def objective(model: nn.Module, batch) -> tuple:
        calls.append(1)
        loss, count, metrics = objectives.next_token(model, batch)
        return loss * (float("inf") if bad(len(calls) - 1) else 1.0), count, metrics

    data = [Example(np.arange(6, dtype=np.int32) + i, 2) for i in range(5)]
    run_log = log.RunLog(tmp_path, 0, (), None, steps)
    state = loop.fit(
        model, optim.adamw(model, args), rules, objective, data, TrainState(), loop.LoopArgs(batch_size=5, max_steps=steps), args,
        precision=precision, data_parallel="fsdp", num_workers=0, run_log=run_log, evaluate=None, sample=None, save_best=False, save=lambda s: None,
    )  # fmt: skip
    return {n: gathered(p.detach()).clone() for n, p in model.named_parameters()}, state


def test_the_loop_skips_what_is_not_finite_and_goes_on(tmp_path: Path) -> None:
    clean, state = train(tmp_path, lambda step: False, 4)
    assert state.skipped_steps == 0
    skipping, state = train(tmp_path, lambda step: step in (1, 3, 5), 7)
    assert state.skipped_steps == 3 and state.step == 7
    for name, value in clean.items():  # the windows are the whole data set each time; only their order differs
        torch.testing.assert_close(skipping[name], value, rtol=1e-5, atol=1e-6)


def test_the_loop_stops_when_nothing_is_finite_any_more(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step 22: the gradient was not finite for 20 steps in a row; lower --lr"):
        train(tmp_path, lambda step: step >= 2, 60)


def test_fp16_saves_its_scale(tmp_path: Path) -> None:
    _, state = train(tmp_path, lambda step: step == 1, 4, precision="fp16")
    assert state.skipped_steps == 1 and state.loss_scale == {"value": 2.0**15, "good": 2.0}
