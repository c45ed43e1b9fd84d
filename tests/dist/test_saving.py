"""Saving goes on beside training: what is written is the state of the step that asked for it, one save at a time, and whatever
goes wrong there reaches every rank's loop.
"""

import dataclasses
import json
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

from accessory.checkpoint import export, resume, save
from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.save import Saver
from accessory.parallel import groups
from accessory.parallel.fsdp import local
from accessory.train import lowbit, optim
from tests.dist import runs
from tests.dist.runs import Case
from tests.helpers import run_ranks


class Gate:
    """Takes the place of a function that a saving thread calls: it waits there until the gate is opened."""

    def __init__(self, owner, name: str):
        self.owner, self.name, self.original, self.open = owner, name, getattr(owner, name), threading.Event()
        setattr(owner, name, self._call)

    def _call(self, *args, **keys):
        assert threading.current_thread() is not threading.main_thread()
        assert self.open.wait(60)
        return self.original(*args, **keys)

    def restore(self) -> None:
        self.open.set()
        setattr(self.owner, self.name, self.original)


def files_of(path: Path) -> dict[str, str]:
    return {n: e["sha256"] for n, e in json.loads((path / "manifest.json").read_text())["files"].items()}


def saved_while_training_goes_on(directory: Path) -> list[str]:
    """Step 2 is saved without haste; then again behind a gate that opens only after two more steps."""
    wrong = []
    for number, (case, part) in enumerate(
        [
            (Case(2, 2, "full", heads="12/1", cut=(2, 2)), "write_state"),
            (Case(2, 2, "lora", cut=(2, 2)), "_make_room"),
            (Case(2, 2, "full", tied=True, data_parallel="ddp", cut=(2, 2)), "write_state"),
        ]
    ):
        run, calm, busy = runs.prepare(case), directory / f"calm{number}", directory / f"busy{number}"
        runs.train(run, steps=2)
        state = run.state.to_json()
        first, second = runs.saver(run, calm), runs.saver(run, busy)
        first.start(2, state)
        first.finish()
        gate = Gate(save, part)
        second.start(2, state)
        before = runs.contents(run)
        runs.train(run, steps=4)
        if not runs.differ(before, runs.contents(run)):
            wrong.append("nothing was trained meanwhile")
        if resume.steps(busy):
            wrong.append("published before it was written")
        gate.restore()
        second.finish()
        if files_of(calm / "latest") != files_of(busy / "latest"):
            wrong.append(f"{case}: not the state of step 2")
        groups.barrier()
    return wrong


def test_what_is_written_is_the_state_of_the_step_that_asked(tmp_path):
    assert run_ranks(saved_while_training_goes_on, tmp_path, world=4) == [[]] * 4


def second_waits(directory: Path) -> tuple[bool, list[int], list[int]]:
    run = runs.prepare(Case(1, 2, "lora", cut=(2, 2)))
    runs.train(run, steps=1)
    saver, state = runs.saver(run, directory), run.state.to_json()
    gate = Gate(save, "_publish" if groups.rank() == 0 else "write_state")
    saver.start(1, state)
    threading.Timer(0.5, gate.restore).start()
    start, before = time.perf_counter(), [s for s, _ in resume.steps(directory)]
    saver.start(2, state)
    waited, between = time.perf_counter() - start > 0.4, [s for s, _ in resume.steps(directory)]
    saver.finish()
    return waited, before, between[:1]


def test_a_second_save_waits_for_the_first(tmp_path):
    for waited, before, between in run_ranks(second_waits, tmp_path, world=2):
        assert waited and before == [] and between == [1]


def fails_while_training(directory: Path, owner: str, name: str, rank: int) -> tuple[str, int, list[int]]:
    """(the error, the step at which it was raised, the published steps): saves at 2 and 4 of 6, the second fails on `rank`."""
    run = runs.prepare(Case(2, 2, "lora", cut=(2, 2)))
    saver, where = runs.saver(run, directory), {"save": save, "export": export}[owner]
    original, calls = getattr(where, name), []

    def failing(*args, **keys):
        calls.append(1)
        if len(calls) == 2 and groups.rank() == rank:
            raise OSError(28, "No space left on device")
        return original(*args, **keys)

    run_step, step = run.step, 0

    def slow_step(number, shown):  # so that the thread can fail meanwhile
        nonlocal step
        step = number
        time.sleep(0.5 if number >= 4 else 0)
        run_step(number, shown)

    run.step = slow_step
    setattr(where, name, failing)
    try:
        with pytest.raises(ValueError) as caught:
            runs.train(run, saver=saver, save_steps=2)
    finally:
        setattr(where, name, original)
    groups.barrier()
    return str(caught.value), step, [s for s, _ in resume.steps(directory)]


@pytest.mark.parametrize(
    "owner, name, rank", [("save", "write_state", 3), ("save", "_seal", 1), ("save", "_publish", 0)]
)
def test_a_save_that_fails_stops_the_run_on_every_rank_with_the_same_line(owner, name, rank, tmp_path):
    found = run_ranks(fails_while_training, tmp_path, owner, name, rank, world=4, timeout=60)
    for message, step, published in found:
        assert f"--output_dir: saving {tmp_path / 'step_00000004'} failed" in message
        assert "No space left on device" in message and "earlier checkpoints are untouched" in message
        assert step in (4, 5), "known after the next step, or the one that slow_step waits in"
        assert published == [2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000002"]


def another_base(directory: Path) -> tuple[str, list[str]]:
    """What a wrong base, found by its hash on rank 0 in the saving thread, does to all."""
    run = runs.prepare(Case(1, 2, "lora", cut=(2, 2)))
    saver = runs.saver(run, directory)

    def about():
        raise ValueError("--pretrained_path X is not the base this run started from")

    saver.beside.about = about
    with pytest.raises(ValueError) as caught:
        runs.train(run, saver=saver, steps=1)
    return str(caught.value), [p.name for p in directory.glob("*")]


def test_a_wrong_base_is_said_in_its_own_words(tmp_path):
    for message, left in run_ranks(another_base, tmp_path, world=2):
        assert message.endswith("--pretrained_path X is not the base this run started from") and left == []


# --- published weights ------------------------------------------------------------------------------------------------

HALF = {"tok_embeddings.weight", "layers.0.attention.wq.weight", "layers.1.feed_forward.w2.weight"}


def published(case: Case, directory: Path, embedding_dim: int) -> dict[str, torch.Tensor]:
    """Some weights in bf16, as their checkpoint had them; with LoRA, the frozen ones too (--only_save_trainable false)."""
    run = runs.prepare(case)
    runs.train(run, steps=2)
    dtypes = dict.fromkeys(HALF, torch.bfloat16)
    params = case.args.to_dict() | ({"lora_alpha": case.tuning_args.alpha} if case.tuning != "full" else {})
    weights = export.Weights(run.model, params, dtypes, embedding_dim, dict, lambda into: [])
    saver = Saver(directory, run.model, run.optimizer, run.trained, weights, None)
    saver.start(2, run.state.to_json())
    saver.finish()
    wholes = {n: runs.whole(case.args, n, p).clone() for n, p in run.model.named_parameters()}
    return wholes if groups.rank() == 0 else {}


@pytest.mark.parametrize("embedding_dim", [0, 1])
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 2, "full", heads="12/2", cut=(2, 2)),
        Case(4, 1, "full", heads="12/2", tied=True),
        Case(2, 2, "full", data_parallel="ddp", cut=(2, 2)),
        Case(2, 2, "lora", cut=(2, 2)),
    ],
    ids=lambda case: f"{case.mp}x{case.dp} {case.tuning} {case.data_parallel}",
)
def test_ranks_write_their_rows_of_the_published_files(case, embedding_dim, tmp_path):
    wholes = run_ranks(published, case, tmp_path, embedding_dim, world=4)[0]
    files = sorted((tmp_path / "latest").glob("consolidated.*"))
    assert [f.name for f in files] == [f"consolidated.{k:02d}-of-{case.mp:02d}.model.pth" for k in range(case.mp)]
    for file in files:
        assert zipfile.ZipFile(file).testzip() is None
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in torch.load(file, weights_only=True).values())
    checkpoint = open_checkpoint(tmp_path / "latest")
    assert set(checkpoint.source.names()) == set(wholes) and checkpoint.embedding_dim == embedding_dim
    for name, whole in wholes.items():
        expected = whole.to(torch.bfloat16 if name in HALF else torch.float32)
        found = checkpoint.source.read(name)
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
    state = resume.StateFiles(tmp_path / "latest" / "resume")
    assert len(state.names()) == len(wholes) if case.tuning == "full" else all(".lora_" in n for n in state.names())


# --- the memory that copies go to -------------------------------------------------------------------------------------


def buffers_of(cases: list[tuple[Case, str]]) -> list[str]:
    """What was made beforehand is what is copied to: nothing is made at a save."""
    wrong, lowbit.SMALL = [], lowbit.BLOCK  # or all tensors of so small a model would stay fp32
    for case, states in cases:
        run = runs.prepare(case)
        run.optimizer = optim.adamw(run.model, dataclasses.replace(runs.OPTIM, optim_states=states))
        snapshot = save.Snapshot(run.model, run.optimizer)
        snapshot.maker.join()
        made = {key: (t.data_ptr(), t.shape, t.dtype) for key, t in snapshot.tensors.items()}
        runs.train(run, steps=1)
        snapshot.take()
        found = {key: (t.data_ptr(), t.shape, t.dtype) for key, t in snapshot.tensors.items()}
        frozen = {n for n, p in run.model.named_parameters() if not p.requires_grad}
        wrong += [f"{case} {states}: {k}" for k in found if k not in frozen and found[k] != made.get(k)]
        wrong += [f"{case} {states}: {k} is not used" for k in made.keys() - found.keys()]
    return wrong


def test_what_is_copied_to_is_there_before_the_first_save():
    cases = [
        Case(2, 2, "full", heads="12/1", cut=(2, 2)),
        Case(2, 2, "lora", cut=(2, 2)),
        Case(1, 4, "full", tied=True, cut=(1, 2)),
    ]
    pairs = [(case, states) for case in cases for states in ("fp32", "bf16", "int8")]
    assert run_ranks(buffers_of, pairs, world=4) == [[]] * 4


def no_memory(case: Case) -> bool:
    """The thread that makes the buffers finds none; the save makes them itself."""
    run, empty = runs.prepare(case), torch.empty
    runs.train(run, steps=1)

    def refuse(*shape, **options):
        if threading.current_thread() is threading.main_thread():
            return empty(*shape, **options)
        raise RuntimeError("not enough memory")

    torch.empty = refuse
    try:
        snapshot = save.Snapshot(run.model, run.optimizer)
        snapshot.maker.join()
        made = len(snapshot.tensors)
        snapshot.take()
    finally:
        torch.empty = empty
    name, parameter = next((n, p) for n, p in run.model.named_parameters() if snapshot.held[n].written)
    mine = local(parameter.detach())[: snapshot.held[name].rows]
    return made == 0 and torch.equal(snapshot.tensors[name], mine)


def test_without_memory_beforehand_it_is_looked_for_when_a_save_comes():
    assert run_ranks(no_memory, Case(1, 2, "full", cut=(2, 2)), world=2) == [True, True]
