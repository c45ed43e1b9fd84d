"""A trained head that lies in memory as its transpose, as on CPUs with AMX: training, checkpoints and both ways between the layouts."""

import dataclasses

import pytest
import torch

from accessory.parallel import products
from accessory.parallel.products import as_it_lies
from tests.dist import runs
from tests.dist.runs import Case
from tests.helpers import run_ranks


def is_turned(run: runs.Run) -> bool:
    return as_it_lies(run.model.output.weight) is not run.model.output.weight


def held(run: runs.Run) -> dict[str, torch.Tensor]:
    """Weights and moments, copied, in the shape of the weights."""
    found = {}
    for name, p in run.model.named_parameters():
        moments = run.optimizer.moments(p)
        found |= {name: p.detach().clone(), **{f"{name}/{m}": moments[m].clone() for m in ("exp_avg", "exp_avg_sq")}}
    return found


def there_and_back(mp: int, states: str, directory) -> None:
    case, steps = Case(mp=mp, precision="bf16", heads="12/4", cut=(4, 2)), 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "OPTIM", dataclasses.replace(runs.OPTIM, optim_states=states))
        patch.setattr(products, "AMX", True)
        run = runs.prepare(case)
        for turned in (False, True):  # of the run that goes on
            assert is_turned(run) is not turned
            runs.train(run, steps, saver=runs.saver(run, directory / str(turned)), save_steps=steps)
            patch.setattr(products, "AMX", turned)
            other = runs.resumed(case, directory / str(turned) / "latest")
            assert is_turned(other) is turned
            before, after = held(run), held(other)
            assert before.keys() == after.keys()
            assert all(before[f"output.weight{key}"].any() for key in ("", "/exp_avg", "/exp_avg_sq"))
            for name in before:
                if states == "int8" and name.startswith("output.weight/"):  # its blocks are of other numbers
                    assert (before[name] - after[name]).norm() <= 0.02 * before[name].norm(), name
                else:
                    assert torch.equal(before[name], after[name]), name
            steps += 1
            losses = [runs.train(r, steps) and r.lines[-1]["loss"] for r in (run, other)]
            assert losses[0] == pytest.approx(losses[1], rel=2e-3), losses
            run, steps = other, steps + 1


@pytest.mark.parametrize("mp, states", [(1, "fp32"), (1, "bf16"), (1, "int8"), (2, "fp32")])
def test_a_head_goes_from_one_layout_to_the_other_and_back(tmp_path, mp: int, states: str) -> None:
    run_ranks(there_and_back, mp, states, tmp_path, world=mp)


def test_on_another_device_than_the_cpu_none_is_turned(monkeypatch) -> None:
    """A GPU's host may have AMX."""
    monkeypatch.setattr(products, "AMX", True)
    on = {device: torch.zeros(4, 2, device=device, requires_grad=True) for device in ("cpu", "meta")}
    assert products.turns_head(on["cpu"], torch.bfloat16) and not products.turns_head(on["meta"], torch.bfloat16)


def learnt(precision: str, tuning: str, tied: bool) -> bool | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "AMX", True)
        run = runs.prepare(Case(precision=precision, tuning=tuning, tied=tied))
        return None if run.model.output is None else is_turned(run)


@pytest.mark.parametrize(
    "precision, tuning, tied, turned",
    [
        ("bf16", "full", False, True),
        ("fp32", "full", False, False),
        ("bf16", "lora", False, False),
        ("bf16", "full", True, None),
    ],
)
def test_only_a_head_that_is_trained_and_multiplied_in_bf16_is_turned(precision, tuning, tied, turned) -> None:
    assert run_ranks(learnt, precision, tuning, tied, world=1) == [turned]
