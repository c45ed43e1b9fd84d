"""A base held in NF4 at any layout: the very numbers of one rank, sharded over dp, the same training; a run saved on one layout
and continued on another, and its adapter merged into the exact base."""

import dataclasses
import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

from accessory.checkpoint.adapter import open_adapter
from accessory.checkpoint.formats import open_checkpoint
from accessory.data.loader import first_batches
from accessory.data.sft import DataArgs
from accessory.main_finetune import answer, load
from accessory.model.llama import kv_copied, shard_dim
from accessory.model.lora import TuningArgs, packed_weights
from accessory.model.quant import dequantise
from accessory.parallel import groups
from accessory.flags import ParallelArgs
from accessory.parallel.fsdp import local, reshard
from accessory.train import loop, optim
from accessory.train.run import train
from accessory.train.start import RunArgs
from accessory.weights.lora import merged
from tests.dist import runs
from tests.dist.runs import Case
from tests.dist.test_parity import same_run
from tests.helpers import (
    gather_over_mp,
    gathered,
    random_weights,
    run_ranks,
    tiny_args,
    write_tiny_checkpoint,
    write_tiny_data,
)

LAYOUTS = [
    Case(1, 2, "lora", cut=(1, 4), quant="nf4"),
    Case(2, 1, "lora", checkpointing=True, quant="nf4"),
    Case(2, 2, "lora", data_parallel="sdp", cut=(2, 2), quant="nf4"),
    Case(2, 2, "lora+saved", checkpointing=True, cut=(4, 1), quant="nf4"),
    Case(2, 2, "bias+norm", data_parallel="ddp", cut=(1, 4), quant="nf4"),
    Case(4, 1, "lora", heads="12/2", quant="nf4"),
    Case(3, 1, "lora", heads="24/24", quant="nf4"),
]


# --- the same training ------------------------------------------------------------------------------------------------


def train_all(these: list[Case]) -> list[dict]:
    """As test_parity's; the packed weights stay as they were, to the bit."""
    results = []
    for case in these:
        run = runs.prepare(case)
        before = {n: bits(m.weight).clone() for n, m in packed_weights(run.model).items()}
        gradients = runs.keep_first_gradients(run)
        runs.train(run)
        moved = [n for n, m in packed_weights(run.model).items() if not torch.equal(bits(m.weight), before[n])]
        odd = runs.mp_copies_differ(run)
        assert len(before) == 14 and not moved and not odd, (case, moved, odd)
        result = {"loss": [line["loss"] for line in run.lines], "norm": [line["grad_norm"] for line in run.lines]}
        keys = ("step", "val_loss", "val_accuracy")
        result |= {"validation": [line[k] for line in run.validations for k in keys], "gradients": gradients}
        results.append(result)
    return results


def bits(parameter: torch.Tensor) -> torch.Tensor:
    return local(parameter.detach()).view(torch.uint8)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict]:
    these = list({(c.tuning, c.heads): Case(1, 1, c.tuning, heads=c.heads, quant="nf4") for c in LAYOUTS}.values())
    return dict(zip(these, run_ranks(train_all, these, world=1)[0]))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_layout_trains_as_one_rank(world: int, alone: dict) -> None:
    these = [c for c in LAYOUTS if c.mp * c.dp == world]
    for case, result in zip(these, run_ranks(train_all, these, world=world)[0], strict=True):
        print(f"{case}: {same_run(result, alone[Case(1, 1, case.tuning, heads=case.heads, quant='nf4')])}")


# --- the same numbers -------------------------------------------------------------------------------------------------


def unpacked(case: Case) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, int]]]:
    """({weight: what it stands for, whole}, {weight: (bytes this rank holds, bytes of its mp slice)}). Collective."""
    run, found, held = runs.prepare(case), {}, {}
    for name, linear in packed_weights(run.model).items():
        packed = gathered(linear.weight.detach())
        held[name] = local(linear.weight.detach()).nbytes, packed.nbytes
        value = dequantise(packed, linear.packed, linear.table, torch.float32)
        parts = gather_over_mp(value.contiguous())
        if kv_copied(name):
            parts = parts[:: max(1, groups.mp_size() // case.args.kv_heads)]
        found[name] = torch.cat(parts, shard_dim(name))
    return found, held


def all_unpacked(these: list[Case]) -> list:
    return [unpacked(case) for case in these]


def test_every_layout_holds_the_same_numbers_and_shares_them_out() -> None:
    """Cuts on blocks and inside them, copies of kv heads: to the bit. Under fsdp a dp rank holds its share of the bytes."""
    [[(expected, _)]] = run_ranks(all_unpacked, [Case(1, 1, "lora", quant="nf4")], world=1)
    exact = random_weights(Case().args)
    assert len(expected) == 14
    for name, value in expected.items():
        assert value.shape == exact[name].shape and 0.02 < (value - exact[name]).norm() / exact[name].norm() < 0.2, name
    these = [Case(4, 1, "lora", quant="nf4"), Case(2, 2, "lora", cut=(1, 4), quant="nf4")]
    these += [Case(2, 2, "lora", cut=(1, 4), data_parallel="ddp", quant="nf4"), Case(1, 4, "lora", quant="nf4")]
    for rank, results in enumerate(run_ranks(all_unpacked, these, world=4)):
        for case, (found, held) in zip(these, results):
            wrong = [n for n in expected if not torch.equal(found[n], expected[n])]
            assert not wrong, (case, rank, wrong)
            share = 1 if case.data_parallel == "ddp" else case.dp
            assert all(mine <= -(-whole // share) + 4 for mine, whole in held.values()), (case, rank, held)


def rounded_copy(to: list[torch.Tensor], given: list[torch.Tensor]) -> None:
    """torch._foreach_copy_ as it is on a GPU: 16 bit by way of fp32, after which every NaN is the same."""
    for one, other in zip(to, given):
        one.copy_(other.float() if other.dtype in (torch.bfloat16, torch.float16) else other)


def changed_by_gathering(these: list[Case]) -> list[list[str]]:
    """Of each case the packed weights that FSDP gathers otherwise than they are, were this a GPU. Collective."""
    results = []
    for case in these:
        run, changed = runs.prepare(case), []
        kept = {n: bits(gathered(m.weight.detach())) for n, m in packed_weights(run.model).items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "_foreach_copy_", rounded_copy)
            for layer in run.model.layers:
                layer.unshard()
            changed = [n for n, m in packed_weights(run.model).items() if not torch.equal(bits(m.weight), kept[n])]
        results.append(changed)
    return results


def test_what_a_gpu_gathers_is_what_was_packed() -> None:
    """Some of the bytes are NaN, whatever the dtype that they are held in."""
    nan = torch.tensor([0x7FC1, 0x7F81, 0x3F80], dtype=torch.int16).view(torch.bfloat16)
    rounded_copy([copied := torch.empty_like(nan)], [nan])
    assert (bits(copied) != bits(nan)).any()
    these = [
        Case(1, 2, "lora", data_parallel=kind, precision="bf16", cut=(1, 4), quant="nf4") for kind in ("fsdp", "ddp")
    ]
    these += [Case(1, 2, "lora", precision="fp16", cut=(1, 4), quant="nf4", lora_targets=("wq",))]
    assert run_ranks(changed_by_gathering, these, world=2) == [[[], [], []]] * 2


# --- rounded by what it does to tokens --------------------------------------------------------------------------------


def errors_of(these: list[Case]) -> list[tuple[dict[str, torch.Tensor], list[float]]]:
    """For each case: ({weight: what it stands for, this slice}, how far the last layer's output of all examples is from the exact
    model's: nearest levels, and calibrated). Collective."""
    results = []
    for case in these:
        slices, outputs = {}, []
        for quant, calibrated in ((None, False), ("nf4", False), ("nf4", True)):
            run = runs.prepare(dataclasses.replace(case, quant=quant, calibrated=calibrated))
            found = []
            run.model.norm.register_forward_pre_hook(lambda _, given: found.append(given[0].clone()))
            with torch.no_grad():
                for batch in first_batches(runs.examples(), 10**6, seed=0, dp_rank=0, dp_size=1):
                    run.model.eval()(batch.tokens, cu_seqlens=batch.cu_seqlens)
            outputs.append(torch.cat(found, 1))
            reshard(run.model)
            for name, linear in packed_weights(run.model).items() if calibrated else ():
                packed = gathered(linear.weight.detach())
                slices[name] = dequantise(packed, linear.packed, linear.table, torch.float32)
        exact, *others = outputs
        results.append((slices, [((y - exact).norm() / exact.norm()).item() for y in others]))
    return results


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_calibrated_at_any_layout(world: int) -> None:
    """Nearer to the exact model than nearest levels; the same on all dp ranks, whose tokens differ."""
    layouts = {1: [(1, 1)], 2: [(1, 2), (2, 1)], 3: [(3, 1)], 4: [(2, 2), (4, 1)]}[world]
    these = [Case(mp, dp, "lora", heads="24/24", cut=(2, 4 // dp)) for mp, dp in layouts]
    ranks = run_ranks(errors_of, these, world=world, timeout=180)
    for index, case in enumerate(these):
        for whole, (nearest, calibrated) in (results[index] for results in ranks):
            print(f"{case.mp}x{case.dp}: {calibrated / nearest:.3f}")
            assert len(whole) == 14 and calibrated < 0.9 * nearest, (case, nearest, calibrated)
        slices = [results[index][0] for results in ranks]
        for rank, mine in enumerate(slices):  # rank = dp_rank * mp + mp_rank
            assert all(torch.equal(mine[n], slices[rank % case.mp][n]) for n in mine), (case, rank)


# --- a run ------------------------------------------------------------------------------------------------------------


def finetune(base: Path, data: Path, out: Path, steps: int, mp: int, quant: str | None, **run_flags) -> str:
    """A run as main_finetune starts it; the text of its error, if it has one."""
    groups.forget_model_parallel()
    tuning = TuningArgs(lora_rank=4, lora_alpha=8.0)
    tuning.given = frozenset()
    run = RunArgs(
        pretrained_path=str(base), output_dir=str(out), resume="auto", report_to="none", keep_best=False, **run_flags
    )
    parallel = ParallelArgs(mp, precision="bf16", quant=quant)
    batch = loop.LoopArgs(batch_size=1, global_batch_size=4, max_steps=steps, eval_steps=100, save_steps=100)
    sft = DataArgs(data_config=str(data), max_seq_len=256, num_workers=0)
    try:
        train(run, parallel, tuning, sft, optim.OptimArgs(lr=1e-2, warmup_steps=0), batch, load, answer)
    except ValueError as error:
        return str(error)
    return ""


def one_life(base: Path, data: Path, out: Path) -> list[str]:
    """2 steps at mp 2; with the exact base, refused; 2 more at mp 1 x dp 2; another run that would save whole weights; what the
    first two and the third said."""
    with contextlib.redirect_stdout(io.StringIO()) as same:
        first, exact = finetune(base, data, out, 2, 2, "nf4"), finetune(base, data, out, 4, 2, None)
    with contextlib.redirect_stdout(io.StringIO()) as other:
        second = finetune(base, data, out, 4, 1, "nf4")
    whole = finetune(base, data, out / "whole", 2, 1, "nf4", only_save_trainable=False)
    return [first, exact, second, whole, same.getvalue(), other.getvalue()]


def test_a_run_is_saved_continued_and_merged_into_the_exact_base(tmp_path: Path) -> None:
    base = write_tiny_checkpoint(tmp_path / "base", tiny_args(vocab_size=320), dtype=torch.bfloat16)
    data = write_tiny_data(tmp_path / "data")
    first, exact, second, whole, same, other = run_ranks(one_life, base, data, tmp_path / "run", world=2)[0]
    assert first == second == ""
    assert "rounded anew on 1 x 2 ranks (model x data parallel; 2 x 1 when it was saved)" in other
    assert "rounding to nf4" in same and "rounded anew" not in same
    assert "--quant changed (nf4 then, None now)" in exact
    assert whole.startswith("--only_save_trainable false with --quant nf4") and "merge_lora" in whole
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["loss"] for r in lines if "loss" in r}
    assert sorted(losses) == [1, 2, 3, 4] and losses[4] < losses[1]
    terms, adapter = open_adapter(tmp_path / "run" / "latest")
    assert terms["quant"] == "nf4" and not [n for n in adapter.names() if n.endswith("wq.weight")]
    model, raw = merged(open_checkpoint(base).source, adapter, terms), open_checkpoint(base).source
    for name in ("layers.0.attention.wq.weight", "layers.1.feed_forward.w2.weight"):
        a, b = (adapter.read(name.replace("weight", f"lora_{half}.weight")).float() for half in "ab")
        assert torch.equal(model.read(name), (raw.read(name).float() + 2.0 * (b @ a)).to(torch.bfloat16))


def test_a_run_continued_is_the_unbroken_one(tmp_path: Path) -> None:
    base = write_tiny_checkpoint(tmp_path / "base", tiny_args(vocab_size=320), dtype=torch.bfloat16)
    data = write_tiny_data(tmp_path / "data")
    assert run_ranks(broken_and_unbroken, base, data, tmp_path, world=2) == [["", "", ""]] * 2
    ends = [open_adapter(tmp_path / name / "step_00000003")[1] for name in ("broken", "unbroken")]
    assert all(torch.equal(ends[0].read(n), ends[1].read(n)) for n in ends[0].names())


def broken_and_unbroken(base: Path, data: Path, out: Path) -> list[str]:
    errors = [finetune(base, data, out / "broken", steps, 1, "nf4") for steps in (1, 3)]
    return [*errors, finetune(base, data, out / "unbroken", 3, 1, "nf4")]
