"""Training state saved on one layout and loaded on another: the same numbers, to the bit, and the run goes on as it would have.

    mp x dp   1x1  2x1  1x2  2x2  4x1  1x4      kv heads 2 (so mp 4 holds copies), 101 rows of vocabulary (no mp divides it)

The whole matrix of runs is bench/resume_matrix.py; here are the states of all its layouts and some of its runs.
"""

from pathlib import Path

import pytest
import torch

from accessory.checkpoint.pieces import MOMENTS, StateFiles
from accessory.parallel import groups
from accessory.train import loop
from tests.dist import runs
from tests.dist.runs import Case
from tests.helpers import gather_over_mp, gathered, run_ranks

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]
KINDS = {
    "full": {"tuning": "full"},
    "full, tied": {"tuning": "full", "tied": True},
    "lora": {"tuning": "lora"},
    "lora, embeddings": {"tuning": "lora+saved"},
    "lora, rank below dp": {"tuning": "lora", "lora_rank": 1},
}
SAVED_AT, STEPS = 3, 8  # of the test's runs: beyond the epoch's edge


def case_of(layout: tuple[int, int], kind: str, data_parallel: str = "fsdp") -> Case:
    mp, dp = layout
    return Case(mp, dp, cut=(1, runs.GROUP // dp), data_parallel=data_parallel, **KINDS[kind])


# --- the state --------------------------------------------------------------------------------------------------------


def wholes(run: runs.Run) -> dict[str, torch.Tensor]:
    """Trained parameters and moments, gathered by other means than those that save. Collective."""
    found, named = {}, dict(run.model.named_parameters())
    for name in run.trained:
        found[name] = runs.whole(run.case.args, name, named[name]).clone()
        for moment in MOMENTS:
            found[f"{name}/{moment}"] = runs.whole(
                run.case.args, name, run.optimizer.state[named[name]][moment]
            ).clone()
    return found


def of_first_rank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors if groups.rank() == 0 else {}


def save_state(case: Case, directory: Path) -> dict[str, torch.Tensor]:
    run = runs.prepare(case)
    runs.train(run, steps=1, saver=runs.saver(run, directory), validates=False)
    return of_first_rank(wholes(run))


def load_states(cases: list[Case], paths: list[Path]) -> list[dict[str, torch.Tensor]]:
    found = []
    for case, path in zip(cases, paths, strict=True):
        run = runs.resumed(case, path)
        assert not runs.mp_copies_differ(run)
        steps = {int(s["step"]) for s in run.optimizer.state.values()}
        assert steps == {1} and run.state.step == 1
        check_padding(run)
        found.append(of_first_rank(wholes(run)))
    return found


def check_padding(run: runs.Run) -> None:
    for name in ("tok_embeddings.weight", "output.weight"):
        if name in dict(run.model.named_parameters()):
            whole = gather_over_mp(gathered(run.model.get_parameter(name).detach()))
            assert not torch.cat(whole)[run.case.args.vocab_size :].any(), name


@pytest.mark.parametrize("kind", ["full", "full, tied", "lora, embeddings", "lora, rank below dp"])
def test_state_saved_at_2x2_is_the_same_on_every_layout(kind, tmp_path):
    saved = run_ranks(save_state, case_of((2, 2), kind), tmp_path, world=4)[0]
    check_files(tmp_path / "latest", saved)
    for world in (1, 2, 4):
        cases = [case_of(layout, kind) for layout in LAYOUTS if layout[0] * layout[1] == world]
        for case, found in zip(
            cases, run_ranks(load_states, cases, [tmp_path / "latest"] * len(cases), world=world)[0]
        ):
            assert runs.differ(found, saved) == [], case


def check_files(checkpoint: Path, saved: dict[str, torch.Tensor]) -> None:
    """The files hold every number once."""
    files = StateFiles(checkpoint / "resume")
    assert files.trained == set(files.names()) == {key for key in saved if "/" not in key}
    assert all(torch.equal(files.read(name), saved[name]) for name in files.names())
    data = sum(4 * value.numel() for value in saved.values())
    assert (
        data
        < sum(f.stat().st_size for f in checkpoint.glob("resume/*.safetensors"))
        < data + 4 * 8192 + 200 * len(saved)
    )


# --- runs that go on --------------------------------------------------------------------------------------------------


def trained_on(run: runs.Run, steps: int, save=lambda state: None) -> list[list[int]]:
    """Trains to the end; the sample ids of each step, over all dp ranks."""
    mine, original = [], loop.train_windows

    def recording(*args, **keys):
        for window in original(*args, **keys):
            mine.append(window.sample_ids)
            yield window

    loop.train_windows = recording
    try:
        runs.train(run, steps=steps, save=save, save_steps=SAVED_AT, validates=False)
    finally:
        loop.train_windows = original
    ranks = groups.all_gather_object(mine)[:: groups.mp_size()]
    return [sorted(sum(ids, [])) for ids in zip(*ranks, strict=True)]


def unbroken(cases: list[Case], directories: list[Path], steps: int) -> list[dict]:
    """Runs of so many steps that are saved after SAVED_AT."""
    found = []
    for case, directory in zip(cases, directories, strict=True):
        run = runs.prepare(case)
        saver = runs.saver(run, directory)
        ids = trained_on(
            run, steps, lambda s, saver=saver: saver.start(s.step, s.to_json()) if s.step == SAVED_AT else None
        )
        saver.finish()
        found.append({"ids": ids[SAVED_AT:], "lines": run.lines[SAVED_AT:], "contents": runs.contents(run)})
    return found


def continued(pairs: list[tuple[Case, Path]], steps: int) -> list[dict]:
    """The rest of the runs, on these layouts."""
    found = []
    for case, directory in pairs:
        run = runs.resumed(case, directory / f"step_{SAVED_AT:08d}")
        ids = trained_on(run, steps)
        found.append({"ids": ids, "lines": run.lines, "contents": runs.contents(run)})
    return found


def apart(one: list[dict], other: list[dict], key: str) -> float:
    """The largest relative difference of this figure between two runs, step by step."""
    assert [a["step"] for a in one] == [b["step"] for b in other] and one[0]["step"] == SAVED_AT + 1
    return max(abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(one, other))


JUMPS = [
    ("full", (2, 2), [(2, 2), (4, 1), (1, 1)]),
    ("full, tied", (4, 1), [(1, 4)]),
    ("lora", (1, 4), [(2, 1)]),
    ("lora", (4, 1), [(2, 2)]),
]


@pytest.mark.parametrize("kind, then, now", JUMPS, ids=lambda value: str(value).replace(" ", ""))
def test_a_run_goes_on_at_another_layout_as_it_would_have(kind, then, now, tmp_path):
    first = [
        of_rank[0] for of_rank in run_ranks(unbroken, [case_of(then, kind)], [tmp_path], STEPS, world=then[0] * then[1])
    ]
    for layout in now:
        again = run_ranks(continued, [(case_of(layout, kind), tmp_path)], STEPS, world=layout[0] * layout[1])
        ids, lines = again[0][0]["ids"], again[0][0]["lines"]
        assert ids == first[0]["ids"] and all(len(step) > 0 for step in ids)
        assert apart(first[0]["lines"], lines, "loss") <= 1e-5
        assert apart(first[0]["lines"], lines, "grad_norm") <= 1e-4
        if layout == then:
            assert apart(first[0]["lines"], lines, "loss") == apart(first[0]["lines"], lines, "grad_norm") == 0
            for one, other in zip(first, again):
                assert runs.differ(one["contents"], other[0]["contents"]) == []
