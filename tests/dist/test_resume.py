"""Checkpoints of a run: what is loaded is what was saved, to the bit, and goes on as if nothing had happened; whatever goes
wrong while saving, on whichever rank, leaves the earlier checkpoints and nothing that looks like one.
"""

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from accessory.checkpoint import export, resume, save
from accessory.checkpoint.formats import open_checkpoint
from accessory.parallel import groups
from accessory.train.state import TrainState
from tests.dist import runs
from tests.dist.runs import Case
from tests.helpers import gathered, run_ranks

# --- what is loaded is what was saved ---------------------------------------------------------------------------------


def unbroken_and_resumed(these: list[tuple[Case, Path]]) -> list[tuple]:
    """Six steps with a save after the second, fourth and sixth; then the same from the second and from the fourth save."""
    results = []
    for case, directory in these:
        run, at = runs.prepare(case), {}
        saver = runs.saver(run, directory)
        begin = saver.start

        def start(step, state, run=run, at=at, begin=begin):
            begin(step, state)
            at[step] = runs.contents(run)

        saver.start = start
        runs.train(run, saver=saver, save_steps=2)
        wrong, empty = [], sum(local.numel() == 0 for local in at[6].values())
        for step in (2, 4):
            other = runs.resumed(case, directory / f"step_{step:08d}")
            wrong += runs.differ(runs.contents(other), at[step])
            runs.train(other, saver=runs.saver(other, directory / "again"))
            wrong += runs.differ(runs.contents(other), at[6])
            keys = ("step", "loss", "grad_norm", "lr", "tokens", "epoch")
            wrong += [
                f"line {a['step']}"
                for a, b in zip(other.lines, run.lines[step:], strict=True)
                if any(a[k] != b[k] for k in keys)
            ]
            wrong += runs.mp_copies_differ(other)
        wholes = {n: runs.whole(case.args, n, p).clone() for n, p in run.model.named_parameters() if n in run.trained}
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
    runs.train(run, steps=2, saver=runs.saver(run, directory))
    wholes = {n: gathered(p).clone() for n, p in run.model.named_parameters()}
    moments = {n: gathered(run.optimizer.state[p]["exp_avg_sq"]).clone() for n, p in run.model.named_parameters()}
    for mode in ("sdp", "ddp"):
        other = runs.resumed(Case(**{**vars(case), "data_parallel": mode}), directory / "latest")
        wrong += [n for n, p in other.model.named_parameters() if not torch.equal(gathered(p), wholes[n])]
        found = {n: gathered(other.optimizer.state[p]["exp_avg_sq"]) for n, p in other.model.named_parameters()}
        wrong += runs.differ(found, moments)
    return wrong


def test_data_parallel_may_change_between_save_and_load(tmp_path):
    assert run_ranks(saved_in_one_mode_loaded_in_another, tmp_path, world=4) == [[]] * 4


# --- damage -----------------------------------------------------------------------------------------------------------


def save_once(case: Case, directory: Path, steps: int) -> None:
    run = runs.prepare(case)
    runs.train(run, steps=steps, saver=runs.saver(run, directory), save_steps=1)


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
    assert {"manifest.json", "params.json", "adapter.json", "adapter.safetensors", "state.json"} < kinds
    assert {
        "consolidated.00-of-02.model.pth",
        "state-00000-of-00002.safetensors",
        "state-00001-of-00002.safetensors",
    } < kinds


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


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory):
    """Steps 1 and 2 of a LoRA run on two ranks."""
    directory = tmp_path_factory.mktemp("two")
    run_ranks(save_once, Case(2, 1, "lora"), directory, 2, world=2)
    return directory


def refused(case: Case, path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        runs.resumed(case, path)
    return str(caught.value)


def mixed_up(directory: Path, change: Callable[[Path, Path], None]) -> str:
    """What a run on two ranks says of step 1's state when `change(its resume/, that of step 2)` has been there."""
    one, two = (directory / f"step_{n:08d}" / "resume" for n in (1, 2))
    shutil.copytree(one, keep := one.with_name("kept"))
    try:
        change(one, two)
        texts = run_ranks(refused, Case(2, 1, "lora"), one.parent, world=2)
    finally:
        shutil.rmtree(one)
        keep.rename(one)
    assert all("\n" not in text for text in texts)
    return texts[0]


FIRST, SECOND = "state-00000-of-00002.safetensors", "state-00001-of-00002.safetensors"


def rewrite(file: Path, change: Callable[[dict, dict], None]) -> None:
    """`change(tensors, pieces)`, and the file with what is left of them."""
    with safe_open(file, "pt") as handle:
        tensors, where = {n: handle.get_tensor(n) for n in handle.keys()}, json.loads(handle.metadata()["pieces"])
    change(tensors, where)
    save_file(tensors, file, {"pieces": json.dumps(where)})


def test_state_that_does_not_fit_together_is_refused_by_name(two_saves):
    """Without the manifest's help: the files alone tell."""
    wq, wo = "layers.0.attention.wq.lora_b.weight", "layers.1.attention.wo.lora_a.weight"

    def without(name):
        def change(tensors, where):
            del where[name]
            for key in [k for k in tensors if k.partition("/")[0] == name]:
                del tensors[key]

        return lambda one, two: rewrite(one / SECOND, change)

    def moved(tensors, where):
        where[wq]["at"][0] = [0, where[wq]["at"][0][1] - where[wq]["at"][0][0]]

    def larger(tensors, where):
        where[wo]["of"][1] += 4

    def no_moment(tensors, where):
        del tensors[f"{wo}/exp_avg"]

    cases = {
        f"{SECOND} is missing": lambda one, two: (one / SECOND).unlink(),
        "resume: holds no state-": lambda one, two: [f.unlink() for f in one.glob("state-0*")],
        f"state-00001-of-00003.safetensors: does not belong to {FIRST}": lambda one, two: shutil.copy(two / SECOND, one / "state-00001-of-00003.safetensors"),
        f"{wq} has 96 of 192 numbers, in {FIRST}: a file is missing": without(wq),
        f"{SECOND}: {wq} at ((0, 24), (0, 4)) is also in {FIRST}": lambda one, two: rewrite(one / SECOND, moved),
        f"{SECOND}: {wo} is part of (4, 52), in other files of (4, 48)": lambda one, two: rewrite(one / SECOND, larger),
        f"{SECOND}: is truncated or damaged": lambda one, two: (one / SECOND).write_bytes((two / SECOND).read_bytes()[:-1]),
        f"({wo}/exp_avg is in its list": lambda one, two: rewrite(one / SECOND, no_moment),
        "its pieces are not described": lambda one, two: save_file({"a": torch.zeros(2)}, one / SECOND),
        "its state is of format 1, this version reads 2": lambda one, two: (one / "state.json").write_text('{"format_version": 1}'),
        "state.json: not JSON": lambda one, two: (one / "state.json").write_text("{"),
    }  # fmt: skip
    for expected, change in cases.items():
        assert expected in (said := mixed_up(two_saves, change)), said


def test_state_of_another_model_or_tuning_is_refused_by_name(two_saves):
    path = two_saves / "step_00000001"
    others = {
        Case(2, 1, "full"): "layers.0.attention.wk.lora_a.weight is (4, 48) in it, not trained now",
        Case(2, 1, "lora+saved"): "output.weight is not trained in it, (101, 48) now",
        Case(2, 1, "lora", lora_rank=2): "is (4, 48) in it, (2, 48) now",
        Case(
            2, 1, "lora", lora_targets=("wq",)
        ): "layers.0.attention.wk.lora_a.weight is (4, 48) in it, not trained now",
    }
    for case, expected in others.items():
        for said in run_ranks(refused, case, path, world=2):
            assert expected in said and "resume with the flags it was saved with" in said, said


def test_files_of_two_checkpoints_mixed_up_are_noticed_by_the_manifest(two_saves):
    one, two = (two_saves / f"step_{n:08d}" for n in (1, 2))
    names = [str(f.relative_to(one)) for f in one.rglob("*") if f.is_file()]
    for name in names:
        whole = (one / name).read_bytes()
        if whole == (two / name).read_bytes():
            assert Path(name).name in ("params.json", "adapter.json")
            continue
        shutil.copy(two / name, one / name)
        assert str(one / name) in (resume.problem(one, hashes=True) or "") or name == "manifest.json"
        assert resume.problem(one, hashes=True) is not None
        found, passed_over = resume.find(two_saves, "auto")
        assert found == two.resolve() and passed_over == []
        (one / name).write_bytes(whole)
    assert resume.problem(one, hashes=True) is None


# --- interruption -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL at this very call: nothing after it runs."""


def save_now(
    run: runs.Run, directory: Path, step: int, keep_last: int | None = None, keep: Collection[int] = ()
) -> None:
    saver = runs.saver(run, directory, keep_last)
    saver.start(step, TrainState(step=step).to_json(), keep)
    saver.finish()


def interrupted_everywhere(directory: Path) -> tuple[int, list[str]]:
    """Step 1 is saved; saving step 2 dies before its n-th fsync or rename, for every n; once it survives them all."""
    run, wrong, calls = runs.prepare(Case(1, 1, "lora")), [], 0
    runs.train(run, steps=1, saver=runs.saver(run, directory))
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
            save_now(run, directory, 2)
            break
        except Killed:
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
    runs.train(run, steps=1, saver=runs.saver(run, directory))

    def failing(rank: int, original):
        def call(*args, **keys):
            if groups.rank() == rank:
                raise OSError(28, "No space left on device")
            return original(*args, **keys)

        return call

    parts = [
        (save.Snapshot, "ready", 1),
        (save, "_make_room", 2),
        (save, "write_state", 3),
        (export.Adapter, "write", 1),
        (export, "write_adapter", 0),
        (save, "_seal", 3),
        (save, "_publish", 0),
    ]
    for owner, name, rank in parts:
        original = getattr(owner, name)
        setattr(owner, name, failing(rank, original))
        try:
            with pytest.raises(ValueError) as caught:
                save_now(run, directory, 2)
        finally:
            setattr(owner, name, original)
        messages.append(str(caught.value))
        groups.barrier()
        assert sorted(p.name for p in directory.iterdir()) == ["latest", "step_00000001"], name
        groups.barrier()
    save_now(run, directory, 3)
    assert resume.problem(directory / "step_00000003", hashes=True) is None
    return messages


def test_a_save_that_fails_on_one_rank_fails_on_all_and_the_run_can_go_on(tmp_path):
    for messages in run_ranks(failing_rank, tmp_path, world=4, timeout=60):
        assert len(messages) == 7
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

    def save(step: int, keep_last: int | None, *keep: int) -> None:
        save_now(run, directory, step, keep_last, keep)
        found.append([step for step, _ in resume.steps(directory)])

    runs.train(run, steps=1)
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2), (6, 6)):
        save(step, 2, best)
    (directory / "step_00000006" / "params.json").unlink()  # the newest and best is no longer whole
    resume.retire(directory, 1)
    found.append([step for step, _ in resume.steps(directory)])
    (directory / "step_00000005" / "manifest.json").unlink()
    resume.retire(directory, 1, [6])
    found.append([step for step, _ in resume.steps(directory)])
    save(7, None)
    save(7, 1)  # the same step again
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


def test_a_damaged_later_checkpoint_takes_no_place_of_the_newest(tmp_path):
    """A flipped bit, which sizes do not show: the run goes on from the checkpoint before it, whose followers are to stay."""
    run_ranks(save_once, Case(1, 1, "lora"), tmp_path, 3, world=1)
    file = tmp_path / "step_00000003" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert resume.find(tmp_path, "auto")[0] == (tmp_path / "step_00000002").resolve()
    for keep, left in ((1, [2, 3]), (None, [2, 3])):
        resume.retire(tmp_path, keep, newest=2)
        assert [step for step, _ in resume.steps(tmp_path)] == left
    assert resume.find(tmp_path, "auto")[0] == (tmp_path / "step_00000002").resolve()


def test_going_back_needs_the_later_checkpoints_out_of_the_way(tmp_path):
    """Else retention would take the new ones for the oldest, and the next --resume auto go on with the later ones."""
    run_ranks(save_once, Case(1, 1, "lora"), tmp_path / "run", 3, world=1)
    first, last = (tmp_path / "run" / f"step_{n:08d}" for n in (1, 3))
    with pytest.raises(ValueError, match=f"--resume {first}: {last} comes after it: move away .* another --output_dir"):
        resume.find(tmp_path / "run", str(first))
    assert resume.find(tmp_path / "elsewhere", str(first)) == (first, [])
    assert resume.find(tmp_path / "run", str(last)) == resume.find(tmp_path / "run", str(tmp_path / "run")) == (last, [])
    (last / "manifest.json").unlink()
    (last.with_name("step_00000002")).rename(tmp_path / "away")
    assert resume.find(tmp_path / "run", str(first)) == (first, [])
