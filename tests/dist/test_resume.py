"""Checkpoints of a run: what is loaded is what was saved, to the bit, and goes on as if nothing had happened; whatever goes
wrong while saving, on whichever rank, leaves the earlier checkpoints and nothing that looks like one.
"""

import json
import math
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch

from accessory.checkpoint import export, resume
from accessory.checkpoint.formats import open_checkpoint
from accessory.parallel import groups
from accessory.train.state import TrainState
from tests.dist import runs
from tests.dist.runs import Case
from tests.helpers import run_ranks

BASE = {"path": "/nowhere", "size": {}, "sha256": {}}


def saver(run: runs.Run, directory: Path, keep_last: int | None = None, keep_step: int | None = None, write=None):
    """A save function for loop.fit that writes what a real run writes: the model, or the adapter."""
    tuning, params = run.case.tuning_args, run.case.args.to_dict()
    terms = {
        k: getattr(tuning, k)
        for k in ("lora_rank", "lora_dropout", "lora_targets", "modules_to_save", "bias_tuning", "norm_tuning")
    }
    terms |= {"lora_alpha": tuning.scale * tuning.lora_rank, "base": BASE}

    def write_weights(into: Path) -> list[Path]:
        if tuning.partly:
            return export.write_trained(into, run.model, run.trained, terms, params, run.state.step)
        return export.write_model(into, run.model, params, {}, embedding_dim=int(run.case.tied))

    def save(state: TrainState) -> None:
        resume.save(
            directory,
            state.step,
            run.model,
            run.optimizer,
            state.to_json(),
            write or write_weights,
            {"base": BASE},
            keep_last,
            keep_step,
        )

    return save


def resumed(case: Case, path: Path) -> runs.Run:
    """A new run, its weights spoilt first, with what the checkpoint holds."""
    run = runs.prepare(case)
    with torch.no_grad():
        for parameter in (p for p in run.model.parameters() if p.requires_grad):
            parameter.add_(1.0)
    saved = resume.load(path, run.model, run.optimizer)
    run.state = TrainState.from_json({k: v for k, v in saved.items() if k in TrainState.__dataclass_fields__})
    return run


# --- what is loaded is what was saved ---------------------------------------------------------------------------------


def unbroken_and_resumed(these: list[tuple[Case, Path]]) -> list[tuple]:
    """Six steps with a save after the second, fourth and sixth; then the same from the second and from the fourth save."""
    results = []
    for case, directory in these:
        run, at = runs.prepare(case), {}
        write = saver(run, directory)

        def save(state, run=run, at=at, write=write):
            write(state)
            at[state.step] = runs.contents(run)

        runs.train(run, save=save, save_steps=2)
        wrong, empty = [], sum(local.numel() == 0 for local in at[6].values())
        for step in (2, 4):
            other = resumed(case, directory / f"step_{step:08d}")
            wrong += runs.differ(runs.contents(other), at[step])
            runs.train(other, save=saver(other, directory / "again"))
            wrong += runs.differ(runs.contents(other), at[6])
            keys = ("step", "loss", "grad_norm", "lr", "tokens", "epoch")
            wrong += [
                f"line {a['step']}"
                for a, b in zip(other.lines, run.lines[step:], strict=True)
                if any(a[k] != b[k] for k in keys)
            ]
            wrong += runs.mp_copies_differ(other)
        wholes = {n: export.whole(case.args, n, p).clone() for n, p in run.model.named_parameters() if n in run.trained}
        results.append((wrong, empty, wholes if groups.rank() == 0 else {}))
    return results


LAYOUTS = {
    (2, 2): [
        Case(2, 2, "full", heads="12/1", cut=(2, 2)),
        Case(2, 2, "lora", lora_rank=1, lora_dropout=0.1, data_parallel="sdp", cut=(1, 4), checkpointing=True),
        Case(2, 2, "lora+saved", tied=True, data_parallel="ddp", cut=(2, 2)),
        Case(2, 2, "bias+norm", heads="12/1", cut=(4, 1)),
    ],
    (2, 1): [Case(2, 1, "full", tied=True, heads="12/1"), Case(2, 1, "lora", lora_dropout=0.1, data_parallel="ddp")],
    (1, 2): [
        Case(1, 2, "full", data_parallel="ddp", cut=(2, 2)),
        Case(1, 2, "lora", lora_rank=1, lora_dropout=0.1, cut=(2, 2)),
    ],
    (4, 1): [Case(4, 1, "full", heads="12/2"), Case(4, 1, "lora+saved", heads="12/2", lora_dropout=0.1)],
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout[0]}x{layout[1]}")
def test_resumed_equals_unbroken_to_the_bit(layout, tmp_path):
    these = [(case, tmp_path / str(i)) for i, case in enumerate(LAYOUTS[layout])]
    results = run_ranks(unbroken_and_resumed, these, world=layout[0] * layout[1])
    for rank, of_rank in enumerate(results):
        for (case, _), (wrong, _, _) in zip(these, of_rank):
            assert not wrong, f"rank {rank}, {case}: {wrong[:5]}"
    for i, (case, directory) in enumerate(these):
        empty = sum(of_rank[i][1] for of_rank in results)
        assert empty > 0 or case.lora_rank >= case.dp, "no rank had an empty shard, which this case is for"
        check_weights_beside_the_state(case, directory / "latest", results[0][i][2])


def check_weights_beside_the_state(case: Case, path: Path, wholes: dict[str, torch.Tensor]) -> None:
    """What the checkpoint holds for others (files of mp ranks, or an adapter) is what the run held."""
    assert resume.problem(path, hashes=True) is None
    if case.tuning_args.partly:
        from accessory.checkpoint.adapter import open_adapter

        source = open_adapter(path)[1]
    else:
        checkpoint = open_checkpoint(path)
        source = checkpoint.source
        assert len(checkpoint.files) == case.mp and checkpoint.embedding_dim == (
            int(case.tied) if case.mp > 1 else None
        )
    assert set(source.names()) == set(wholes)
    assert all(torch.equal(source.read(n), wholes[n]) for n in wholes)


def saved_in_one_mode_loaded_in_another(directory: Path) -> list[str]:
    case, wrong = Case(2, 2, "full", heads="12/1", cut=(2, 2)), []
    run = runs.prepare(case)
    runs.train(run, steps=2, save=saver(run, directory))
    wholes = {n: p.full_tensor().clone() for n, p in run.model.named_parameters()}
    moments = {n: run.optimizer.state[p]["exp_avg_sq"].full_tensor().clone() for n, p in run.model.named_parameters()}
    for mode in ("sdp", "ddp"):
        other = resumed(Case(**{**vars(case), "data_parallel": mode}), directory / "latest")
        wrong += [n for n, p in other.model.named_parameters() if not torch.equal(p.full_tensor(), wholes[n])]
        found = {n: other.optimizer.state[p]["exp_avg_sq"].full_tensor() for n, p in other.model.named_parameters()}
        wrong += runs.differ(found, moments)
    return wrong


def test_data_parallel_may_change_between_save_and_load(tmp_path):
    assert run_ranks(saved_in_one_mode_loaded_in_another, tmp_path, world=4) == [[]] * 4


# --- damage -----------------------------------------------------------------------------------------------------------


def save_once(case: Case, directory: Path, steps: int) -> None:
    run = runs.prepare(case)
    runs.train(run, steps=steps, save=saver(run, directory), save_steps=1)


def test_one_flipped_bit_in_any_file_is_noticed_and_named(tmp_path):
    run_ranks(save_once, Case(2, 1, "full", heads="12/1"), tmp_path, 1, world=2)
    run_ranks(save_once, Case(1, 2, "lora", cut=(2, 2)), tmp_path / "adapter", 1, world=2)
    rng, kinds = random.Random(0), set()
    for path in (tmp_path / "step_00000001", tmp_path / "adapter" / "step_00000001"):
        assert resume.problem(path, hashes=True) is None
        files = sorted(f for f in path.rglob("*") if f.is_file())
        assert {str(f.relative_to(path)) for f in files} == set(
            json.loads((path / "manifest.json").read_text())["files"]
        ) | {"manifest.json"}
        for file in files:
            kinds.add(file.name)
            whole = file.read_bytes()
            for _ in range(60 if file.name == "manifest.json" else 6):
                at, bit = rng.randrange(len(whole)), rng.randrange(8)
                file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
                found = resume.problem(path, hashes=True)
                assert found is not None and str(file) in found, (file.name, at, bit, found)
                with pytest.raises(ValueError, match="--resume auto: no whole checkpoint"):
                    resume.find(path.parent, "auto")
                with pytest.raises(ValueError, match="--resume .*step_00000001: "):
                    resume.find(path.parent, str(path))
            file.write_bytes(whole[:-1])
            assert str(file) in (resume.problem(path) or ""), "a shorter file is noticed without hashes"
            file.unlink()
            assert f"{file} is missing" in (resume.problem(path) or "")
            file.write_bytes(whole)
        assert resume.find(path.parent, "auto") == (path.resolve(), [])
    assert {"manifest.json", "params.json", "adapter.json", "adapter.safetensors", "state.json", ".metadata"} < kinds
    assert {"consolidated.00-of-02.model.pth", "__0_0.distcp", "__1_0.distcp"} < kinds


def test_a_damaged_checkpoint_is_passed_over_for_an_older_whole_one(tmp_path):
    run_ranks(save_once, Case(1, 1, "lora"), tmp_path, 3, world=1)
    (tmp_path / "step_00000003" / "resume" / "state.json").unlink()
    (tmp_path / "step_00000002" / "manifest.json").unlink()
    path, passed_over = resume.find(tmp_path, "auto")
    assert path == (tmp_path / "step_00000001").resolve()
    assert [str(tmp_path / "step_00000003") in passed_over[0], str(tmp_path / "step_00000002") in passed_over[1]] == [
        True,
        True,
    ]
    assert resume.find(tmp_path / "empty", "auto") == (None, [])
    with pytest.raises(ValueError, match="--resume .*nothing: no such checkpoint directory"):
        resume.find(tmp_path, str(tmp_path / "nothing"))


class Evil:
    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


def load_evil(case: Case, path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        resumed(case, path)
    return str(caught.value)


def test_a_metadata_pickle_with_code_in_it_is_refused(tmp_path):
    case = Case(1, 1, "lora")
    run_ranks(save_once, case, tmp_path, 1, world=1)
    mark, file = tmp_path / "mark", tmp_path / "step_00000001" / "resume" / ".metadata"
    honest = file.read_bytes()
    by_attribute = b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x02os\x93."
    through_a_class = b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x17FileSystemWriter.__init__\x93."
    attacks = [pickle.dumps(Evil(os.system, f"touch {mark}"), protocol) for protocol in (2, 4)]
    attacks += [
        pickle.dumps(Evil(eval, f"open({str(mark)!r}, 'w')")),
        pickle.dumps(Evil(getattr, Path, "touch")),
        by_attribute,
        through_a_class,
    ]
    attacks += [
        pickle.dumps({"state_dict_metadata": Evil(exec, f"open({str(mark)!r}, 'w')")}),
        honest[: len(honest) // 2],
        b"",
    ]
    for attack in attacks:
        file.write_bytes(attack)
        message = run_ranks(load_evil, case, tmp_path / "step_00000001", world=1)[0]
        assert str(file) in message and "do not load it" in message
        assert not mark.exists()


# --- interruption -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL at this very call: nothing after it runs."""


def interrupted_everywhere(directory: Path) -> tuple[int, list[str]]:
    """Step 1 is saved; saving step 2 dies before its n-th fsync or rename, for every n; once it survives them all."""
    run, wrong, calls = runs.prepare(Case(1, 1, "lora")), [], 0
    runs.train(run, steps=1, save=saver(run, directory))
    fsync, replace = os.fsync, os.replace
    for calls in range(1000):
        left = calls

        def dying(original):
            def call(*args):
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return original(*args)

            return call

        os.fsync, os.replace = dying(fsync), dying(replace)
        try:
            saver(run, directory)(TrainState(step=2))
            break
        except (Killed, ValueError):  # dcp.save turns it into its own exception
            pass
        finally:
            os.fsync, os.replace = fsync, replace
        found, passed_over = resume.find(directory, "auto")
        if found is None or found.name not in ("step_00000001", "step_00000002") or passed_over:
            wrong.append(f"call {calls}: {found}, {passed_over}")
        if resume.find(directory, str(directory))[0] is None:  # through `latest`
            wrong.append(f"call {calls}: latest")
        if found is not None and found.name == "step_00000002":
            shutil.rmtree(found)
            os.replace(directory / "latest", directory / ".latest-old")
            (directory / "latest").symlink_to("step_00000001")
    left_over = [p.name for p in directory.iterdir() if p.name.startswith((".trash", "step_00000002.tmp"))]
    return calls, wrong + left_over


def test_a_save_that_dies_at_any_moment_leaves_nothing_that_counts(tmp_path):
    calls, wrong = run_ranks(interrupted_everywhere, tmp_path, world=1)[0]
    assert calls > 10 and not wrong


def failing_rank(directory: Path) -> list[str]:
    """Step 1 is saved; saving step 2 fails on one rank in one part of it; then step 3 is saved."""
    run, messages = runs.prepare(Case(2, 2, "lora", cut=(2, 2))), []
    runs.train(run, steps=1, save=saver(run, directory))

    def failing(rank: int, original):
        def call(*args, **keys):
            if groups.rank() == rank:
                raise OSError(28, "No space left on device")
            return original(*args, **keys)

        return call

    def write_nothing(into: Path) -> list[Path]:
        return []

    writer = resume.dcp.FileSystemWriter
    parts = [
        (resume, "_make_room", 2),
        (None, "write", 3),
        (writer, "write_data", 1),
        (resume, "_seal", 3),
        (resume, "_publish", 0),
    ]
    for owner, name, rank in parts:
        write = failing(rank, write_nothing) if owner is None else None
        original = getattr(owner, name, None)
        if owner is not None:
            setattr(owner, name, failing(rank, original))
        try:
            with pytest.raises(ValueError) as caught:
                saver(run, directory, write=write)(TrainState(step=2))
        finally:
            if owner is not None:
                setattr(owner, name, original)
        messages.append(str(caught.value))
        groups.barrier()
        assert sorted(p.name for p in directory.iterdir()) == ["latest", "step_00000001"], name
        groups.barrier()
    saver(run, directory)(TrainState(step=3))
    assert resume.problem(directory / "step_00000003", hashes=True) is None
    return messages


def test_a_save_that_fails_on_one_rank_fails_on_all_and_the_run_can_go_on(tmp_path):
    for messages in run_ranks(failing_rank, tmp_path, world=4, timeout=60):
        assert len(messages) == 5
        for message in messages:
            assert "No space left on device" in message and "earlier checkpoints are untouched" in message
            assert "--output_dir: saving" in message and "\n" not in message


def fails_together(failing: list[int]) -> tuple[str, str]:
    error = OSError(f"disk of {groups.rank()}") if groups.rank() in failing else None
    with pytest.raises((ValueError, OSError)) as caught:
        groups.together(error)
    groups.together(None)
    return type(caught.value).__name__, str(caught.value)


def test_all_ranks_raise_when_one_fails():
    assert run_ranks(fails_together, [2], world=3) == [("ValueError", "rank 2: disk of 2")] * 2 + [
        ("OSError", "disk of 2")
    ]
    assert run_ranks(fails_together, [0, 1], world=3)[2] == ("ValueError", "rank 0: disk of 0")


# --- retention --------------------------------------------------------------------------------------------------------


def retained(directory: Path) -> list[list[int]]:
    run, found = runs.prepare(Case(1, 1, "lora")), []

    def save(step: int, keep_last: int | None, keep_step: int | None) -> None:
        saver(run, directory, keep_last, keep_step)(TrainState(step=step))
        found.append([step for step, _ in resume.steps(directory)])

    runs.train(run, steps=1)
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2), (6, 6)):
        save(step, 2, best)
    (directory / "step_00000006" / "params.json").unlink()  # the newest and best is no longer whole
    resume.retire(directory, 1, None)
    found.append([step for step, _ in resume.steps(directory)])
    (directory / "step_00000005" / "manifest.json").unlink()
    resume.retire(directory, 1, 6)
    found.append([step for step, _ in resume.steps(directory)])
    save(7, None, None)
    save(7, 1, None)  # the same step again
    assert resume.problem(directory / "step_00000007", hashes=True) is None
    assert (directory / "latest").resolve().name == "step_00000007"
    return found


def test_retention_keeps_the_newest_whole_ones_and_the_best(tmp_path):
    found = run_ranks(retained, tmp_path, world=1)[0]
    assert found[:6] == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6]]
    assert found[6] == [5, 6], "5 is the newest whole one"
    assert found[7] == [5, 6], "nothing whole is left, so nothing is deleted"
    assert 7 in found[8] and 7 in found[9]
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert math.isfinite(json.loads((tmp_path / "latest/resume/state.json").read_text())["adam_step"])
