"""What one optimizer step must survive: gradients that are not finite, half precision, dropout; and equal starts at every mp."""

import contextlib
import io
import math
import shutil
from pathlib import Path

import pytest
import torch

from accessory.checkpoint.formats import open_checkpoint
from accessory.model import shard_dim
from accessory.model.llama import kv_copied
from accessory.model.lora import partial_grad
from accessory.parallel import groups
from accessory.parallel.fsdp import local
from accessory.parallel.grads import GradientRules
from accessory.train import loop, objectives, start
from accessory.train import state as train_state
from accessory.train.state import reseed
from tests.dist import runs
from tests.dist.runs import Case
from tests.helpers import run_ranks, tiny_args, write_tiny_checkpoint

# --- the norm ---------------------------------------------------------------------------------------------------------


def norms_of_groups_that_add_differently() -> list[float]:
    """One mp rank's dp group has another last bit in its sum, as a ring that begins elsewhere may have."""
    groups.init(2)
    model = torch.nn.Module()
    model.norm = torch.nn.Linear(1, 3, bias=False)
    model.norm.weight.grad = torch.full_like(model.norm.weight, 1.25)
    rules = GradientRules(model, 4, shard_dim, partial_grad, kv_copied)
    all_reduce = groups.all_reduce

    def reduced(tensor: torch.Tensor, group=None, op: str = "sum") -> torch.Tensor:
        all_reduce(tensor, group, op)
        return tensor.mul_(1 + 2**-22) if group is groups.dp_group() and groups.mp_rank() == 1 else tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "all_reduce", reduced)
        return groups.all_gather_object(rules.global_norm().item())


def test_every_rank_clips_by_the_same_norm():
    for norms in run_ranks(norms_of_groups_that_add_differently, world=4):
        assert len(set(norms)) == 1 and norms[0] == pytest.approx((2 * 3) ** 0.5 * 1.25)


# --- gradients that are not finite ------------------------------------------------------------------------------------


def poisoned_objective(at_step: int, run: runs.Run, rank: int, value: float):
    """next_token, but one dp rank's loss is infinite (or no number) in one step."""

    def objective(model, batch):
        loss, count, metrics = objectives.next_token(model, batch)
        bad = run.state.step == at_step and groups.dp_rank() == rank
        return loss * value if bad else loss, count, metrics

    return objective


def poison_one_shard(run: runs.Run, at_step: int, rank: int) -> None:
    """On one rank of the world, one number of one split weight's gradient becomes infinite, after backward."""
    sum_partial = run.rules.sum_partial

    def poisoned() -> None:
        sum_partial()
        if run.state.step == at_step and groups.rank() == rank:
            gradient = next(g for p, _ in run.rules.cut if (g := local(p.grad)).numel())
            gradient.view(-1)[0] = math.inf

    run.rules.sum_partial = poisoned


def skipped_step(case: Case, where: str) -> tuple[list[dict], list[str], list[str]]:
    """Six steps of which the second is poisoned: (lines, what the second changed, what the third left as it was)."""
    run, bad = runs.prepare(case), 1
    at: dict[int, dict] = {}
    step_of_optimizer = run.optimizer.step

    def step() -> None:
        at[run.state.step] = runs.contents(run)
        step_of_optimizer()

    run.optimizer.step = step
    objective = objectives.next_token
    if where == "one shard":
        poison_one_shard(run, bad, rank=groups.world_size() - 1)
    else:
        objective = poisoned_objective(bad, run, groups.dp_size() - 1, float(where))
    runs.train(run, objective=objective)
    still = [n for n in run.trained if at[bad + 1][n].numel() and torch.equal(at[bad + 1][n], at[bad + 2][n])]
    assert not runs.mp_copies_differ(run)
    return run.lines, runs.differ(at[bad], at[bad + 1]), still


def all_skipped_steps(these: list[tuple[Case, str]]) -> list:
    return [skipped_step(*this) for this in these]


def test_one_bad_gradient_skips_the_step_on_every_rank():
    these = [
        (Case(2, 2, "full", heads="12/2", cut=(2, 2)), "one shard"),
        (Case(2, 2, "lora", data_parallel="sdp", cut=(2, 2)), "inf"),
        (Case(2, 2, "bias+norm", data_parallel="ddp", cut=(1, 4)), "nan"),
        (Case(2, 2, "lora+saved", tied=True, cut=(4, 1)), "-inf"),
    ]
    for rank, results in enumerate(run_ranks(all_skipped_steps, these, world=4)):
        for (case, where), (lines, changed, still) in zip(these, results):
            assert not changed, f"rank {rank}, {case}, {where}: the skipped step changed {changed[:3]}"
            assert not still, f"rank {rank}, {case}, {where}: after it, {still[:3]} no longer move"
            assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1, 1, 1]
            assert not math.isfinite(lines[1]["grad_norm"])
            assert all(
                math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines[:1] + lines[2:]
            )


def never_finite() -> str:
    run = runs.prepare(Case(2, 1, "lora"))
    before, patience = runs.contents(run), train_state.MAX_SKIPPED_IN_A_ROW
    train_state.MAX_SKIPPED_IN_A_ROW = 3
    try:
        with pytest.raises(ValueError) as caught:
            runs.train(run, objective=lambda model, batch: _times(objectives.next_token(model, batch), math.nan))
    finally:
        train_state.MAX_SKIPPED_IN_A_ROW = patience
    assert not [n for n in runs.differ(before, runs.contents(run)) if "/" not in n]
    return str(caught.value)


def _times(result: tuple, factor: float) -> tuple:
    return result[0] * factor, *result[1:]


def test_a_run_that_no_longer_learns_stops_on_every_rank():
    for message in run_ranks(never_finite, world=2):
        assert (
            message.startswith("step 3: the gradient was not finite for 3 steps in a row") and "--precision" in message
        )


# --- half precision ---------------------------------------------------------------------------------------------------


def in_precision(these: list[Case]) -> list[dict]:
    """Losses; and which dtypes a layer saw: its input, its weights while it ran, the rotary tables."""
    results = []
    for case in these:
        run, seen = runs.prepare(case), set()

        def look(layer, inputs, seen=seen):
            x, turns = inputs[:2]
            seen.add((x.dtype, turns.dtype))

        def look_inside(linear, inputs, seen=seen):
            seen.add(("weight", linear.weight.dtype))

        run.model.layers[1].register_forward_pre_hook(look)
        run.model.layers[1].attention.wq.register_forward_pre_hook(look_inside)
        runs.train(run)
        masters = {p.dtype for n, p in run.model.named_parameters() if n in run.trained}
        odd = runs.mp_copies_differ(run)
        results.append({"loss": [line["loss"] for line in run.lines], "seen": seen, "masters": masters, "odd": odd})
    return results


def test_half_precision_keeps_rotary_tables_and_masters_in_fp32():
    names = {"bf16": (torch.bfloat16, 5e-3), "fp16": (torch.float16, 1e-3), "tf32": (torch.float32, 1e-6)}
    these = [
        Case(2, 2, "lora", checkpointing=True, cut=(2, 2)),
        Case(2, 2, "full", heads="12/1", data_parallel="sdp", cut=(2, 2)),
    ]
    exact = run_ranks(in_precision, these, world=4)[0]
    for name, (dtype, tolerance) in names.items():
        results = run_ranks(in_precision, [Case(**{**vars(case), "precision": name}) for case in these], world=4)
        for rank, found in enumerate(results):
            for result, expected in zip(found, exact):
                assert result["seen"] == {(dtype, torch.float32), ("weight", dtype)}, (
                    rank,
                    result["seen"],
                )
                assert result["masters"] == {torch.float32}
                assert not result["odd"], f"{name}: mp ranks no longer hold the same {result['odd']}"
                assert result["loss"] == pytest.approx(expected["loss"], rel=tolerance)


def over_a_frozen_bf16_base(case: Case) -> tuple[list[float], dict[str, set[torch.dtype]]]:
    weights = {n: t if "lora_" in n else t.bfloat16() for n, t in runs.case_weights(case).items()}
    run = runs.prepare(case, weights)
    runs.train(run)
    dtypes: dict[str, set[torch.dtype]] = {"trained": set(), "frozen": set()}
    for name, parameter in run.model.named_parameters():
        dtypes["trained" if name in run.trained else "frozen"].add(parameter.dtype)
    return [line["loss"] for line in run.lines], dtypes


def test_a_frozen_base_stays_in_the_dtype_of_its_file_at_every_layout():
    alone, dtypes = run_ranks(over_a_frozen_bf16_base, Case(1, 1, "lora+saved"), world=1)[0]
    assert dtypes == {"trained": {torch.float32}, "frozen": {torch.bfloat16}}
    for mode in ("fsdp", "ddp"):
        case = Case(2, 2, "lora+saved", data_parallel=mode, checkpointing=True, cut=(2, 2))
        for loss, found in run_ranks(over_a_frozen_bf16_base, case, world=4):
            assert loss == pytest.approx(alone, rel=1e-6) and found == dtypes


def fp16_with_scale(start: float) -> list[dict]:
    """Training in fp16 from this loss scale; the scale of every save is what a resumed run would get."""
    run, scales = runs.prepare(Case(2, 1, "full", precision="fp16")), []
    run.state.loss_scale = {"value": start, "good": 1998.0}
    runs.train(run, save=lambda state: scales.append(dict(state.loss_scale)))
    return [*run.lines, scales[-1]]


def test_fp16_halves_its_scale_at_an_overflow_and_doubles_it_after_2000_good_steps():
    for lines in run_ranks(fp16_with_scale, 2.0**40, world=2):  # inf in every fp16 gradient until it is far lower
        assert [line["skipped_steps"] for line in lines[:-1]] == [1, 2, 3, 4, 5, 6]
        assert lines[-1] == {"value": 2.0**34, "good": 0.0}
    for lines in run_ranks(fp16_with_scale, 2.0**8, world=2):
        assert [line["skipped_steps"] for line in lines[:-1]] == [0] * 6
        assert lines[-1] == {"value": 2.0**9, "good": 4.0}


# --- randomness -------------------------------------------------------------------------------------------------------


def with_dropout(case: Case) -> tuple[list[float], list[str]]:
    run = runs.prepare(case)
    runs.train(run)
    return [line["loss"] for line in run.lines], runs.mp_copies_differ(run)


def test_dropout_masks_depend_on_step_and_dp_rank_but_not_on_mp():
    """Column layers drop a replicated input, so the same numbers must go at every mp. (Row layers drop their own slice.)"""
    column = {"tuning": "lora", "heads": "12/1", "lora_targets": ("wq", "wk", "wv", "w1", "w3")}
    plain = run_ranks(with_dropout, Case(**column), world=1)[0][0]
    alone = run_ranks(with_dropout, Case(**column, lora_dropout=0.3), world=1)[0][0]
    assert min(abs(a - b) for a, b in zip(alone, plain)) > 1e-4, "dropout does nothing"
    for mp, checkpointing in ((2, True), (4, False)):
        for loss, odd in run_ranks(
            with_dropout, Case(mp, 1, **column, lora_dropout=0.3, checkpointing=checkpointing), world=mp
        ):
            assert loss == pytest.approx(alone, rel=1e-6) and not odd
    case = Case(2, 2, "lora", heads="12/1", lora_dropout=0.3, cut=(2, 2))
    assert not [odd for _, odd in run_ranks(with_dropout, case, world=4) if odd]


def draws(mp: int) -> tuple[int, list[float]]:
    """The first random number of some steps on this rank, and its dp rank."""
    groups.init(mp)
    found = []
    for seed, step in ((0, 0), (0, 1), (1, 0), (10, 1), (1, 1)):
        reseed(seed, step, groups.dp_rank())
        found.append(torch.rand(()).item())
    return groups.dp_rank(), found


def test_dp_ranks_and_steps_draw_different_numbers():
    numbers = run_ranks(draws, 2, world=4)
    assert numbers[0] == numbers[1] and numbers[2] == numbers[3]
    assert len({number for _, found in numbers for number in found}) == 10


def initial_adapters(mp: int) -> dict[str, torch.Tensor]:
    from tests.helpers import random_weights

    case = Case(mp, groups.world_size() // mp, "lora")
    run = runs.prepare(case, random_weights(case.args))
    return {n: runs.whole(case.args, n, p).clone() for n, p in run.model.named_parameters() if "lora_" in n}


def test_new_adapters_are_the_same_at_every_layout():
    alone = run_ranks(initial_adapters, 1, world=1)[0]
    assert len({t.flatten()[0].item() for n, t in alone.items() if "lora_a" in n}) == 14, "two adapters start alike"
    bound = {n: t.shape[1] ** -0.5 for n, t in alone.items() if "lora_a" in n}  # Kaiming, a = sqrt 5, as PEFT has it
    for name, value in alone.items():
        assert not value.any() if "lora_b" in name else 0.8 * bound[name] < value.abs().max() <= bound[name], name
    for mp, world in ((2, 2), (4, 4), (2, 4)):
        for found in run_ranks(initial_adapters, mp, world=world):
            assert all(torch.equal(found[n], alone[n]) for n in alone) and set(found) == set(alone)


# --- ranks that were not started alike --------------------------------------------------------------------------------


def unlike(models: Path) -> list[str]:
    """What the ranks say where rank 1 was given other flags, data, weights, another division; where only paths differ, nothing."""
    second, said = groups.rank() == 1, []

    def says(work, *given) -> None:
        with pytest.raises(ValueError) as caught:
            work(*given)
        said.append(str(caught.value))

    with contextlib.redirect_stdout(io.StringIO()):
        says(groups.init, 2 if second else 1)
        groups.init(1)
    start.check_code_agrees()
    with pytest.MonkeyPatch.context() as patched:
        if second:
            patched.setattr(torch, "__version__", "2.0.0")
        says(start.check_code_agrees)
    says(start.check_flags_agree, loop.LoopArgs(max_steps=5 if second else 3))
    says(start.check_agree, {"training data": "ab" if second else "cd"}, "give every rank the same files")
    start.check_flags_agree(start.RunArgs(pretrained_path="/b" if second else "/a", output_dir="x"), loop.LoopArgs())
    held = {name: start.weights_sample(open_checkpoint(models / name)) for name in ("plain", "shards", "merged")}
    start.check_agree({"weights": held["shards" if second else "plain"]}, "the numbers are the same")
    says(start.check_agree, {"weights": held["merged" if second else "plain"]}, "give every rank the same files")
    assert said[-1].startswith(f"rank 1 has weights {held['merged']}, rank 0 {held['plain']}: give every rank")
    return said[:-1]


def test_ranks_that_were_not_started_alike_are_told_together(tmp_path):
    args = tiny_args()
    write_tiny_checkpoint(tmp_path / "plain", args)
    write_tiny_checkpoint(tmp_path / "shards", args, shards=2)
    weights = torch.load(tmp_path / "plain/consolidated.00.pth", weights_only=True)
    weights["layers.1.attention.wq.weight"] += 1e-3  # all that a merged adapter may have changed
    shutil.copytree(tmp_path / "plain", tmp_path / "merged")
    torch.save(weights, tmp_path / "merged/consolidated.00.pth")
    assert run_ranks(unlike, tmp_path, world=2) == [
        [
            "--model_parallel_size is not the same on every rank (1, 2): start them alike",
            f"rank 1 has torch 2.0.0, rank 0 {torch.__version__}: install the same on every node",
            "rank 1 has --max_steps 5, rank 0 3: start every rank with the same flags",
            "rank 1 has training data ab, rank 0 cd: give every rank the same files",
        ]
    ] * 2
