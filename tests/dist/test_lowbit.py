"""--optim_states bf16 and int8 over ranks: copies agree to the bit, and a checkpoint goes on at its layout and at others."""

import dataclasses
from pathlib import Path

import pytest
import torch

from accessory.checkpoint import resume
from accessory.checkpoint.pieces import pieces
from accessory.checkpoint.resume import moments_of
from accessory.parallel.fsdp import local
from accessory.train import lowbit, optim
from accessory.train.state import TrainState
from tests.dist import runs
from tests.dist.runs import Case
from tests.helpers import run_ranks


def prepared(case: Case, states: str) -> runs.Run:
    lowbit.SMALL = lowbit.BLOCK  # or all tensors of so small a model would stay fp32
    run = runs.prepare(case)
    run.optimizer = optim.adamw(run.model, dataclasses.replace(runs.OPTIM, optim_states=states))
    return run


def decoded(run: runs.Run) -> dict[str, torch.Tensor]:
    """This rank's weights and moments, as numbers, without the rows that pad a vocabulary."""
    found, held = {}, pieces(run.model)
    for name, parameter in run.model.named_parameters():
        tensors = {name: parameter.detach()} | moments_of(parameter, run.optimizer)
        found |= {f"{name}/{k}": local(t)[: held[name].rows].clone() for k, t in tensors.items() if k != "step"}
    return found


def unbroken(case: Case, states: str, directory: Path) -> tuple[dict, list]:
    """Five steps, saved after the third. -> (its contents at the end, losses)"""
    run = prepared(case, states)
    saver = runs.saver(run, directory)
    runs.train(run, 5, lambda s: saver.start(s.step, s.to_json()), save_steps=3, validates=False)
    saver.finish()
    assert not runs.mp_copies_differ(run)
    return decoded(run), [line["loss"] for line in run.lines]


def continued(case: Case, states: str, path: Path) -> tuple[dict, list]:
    run = prepared(case, states)
    saved = resume.load(path, run.model, run.optimizer)
    run.state = TrainState.from_json({k: v for k, v in saved.items() if k in TrainState.__dataclass_fields__})
    assert {int(s["step"]) for s in run.optimizer.state.values()} == {3}
    runs.train(run, 5, validates=False)
    assert not runs.mp_copies_differ(run)
    return decoded(run), [line["loss"] for line in run.lines]


@pytest.mark.parametrize("states", ["bf16", "int8"])
def test_a_checkpoint_goes_on_at_its_layout_to_the_bit_and_at_others(states: str, tmp_path: Path) -> None:
    case = Case(2, 2, cut=(2, 2))
    whole = run_ranks(unbroken, case, states, tmp_path, world=4)
    step = tmp_path / "step_00000003"
    again = run_ranks(continued, case, states, step, world=4)
    for (one, losses), (other, rest) in zip(whole, again):
        assert runs.differ(one, other) == [] and rest == losses[3:]
    for layout, world in (((1, 2), 2), ((4, 1), 4), ((1, 1), 1)):
        other = Case(*layout, cut=(1, runs.GROUP // layout[1]))
        assert run_ranks(continued, other, states, step, world=world)[0][1] == pytest.approx(whole[0][1][3:], rel=2e-3)
    changed = run_ranks(continued, case, "fp32", step, world=4)
    assert changed[0][1] == pytest.approx(whole[0][1][3:], rel=2e-3)


@pytest.mark.parametrize("states", ["bf16", "int8"])
def test_ranks_that_hold_the_same_agree(states: str, tmp_path: Path) -> None:
    """ddp: every rank updates all of its slice, by itself; kv heads and norms are copies over mp."""
    case = Case(2, 2, cut=(2, 2), data_parallel="ddp", heads="12/1")
    found = run_ranks(unbroken, case, states, tmp_path, world=4)
    assert runs.differ(found[0][0], found[2][0]) == [] and runs.differ(found[1][0], found[3][0]) == []
