"""Where a run's time goes: phases that add up, --profile_steps' files, and that neither changes what is trained."""

import gzip
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from accessory.data.sft import Example
from accessory.parallel import groups
from accessory.parallel.grads import GradientRules
from accessory.train import loop, optim, profile
from accessory.train.profile import Phases, Profile
from accessory.train.state import TrainState
from tests.helpers import least_cpu_seconds


class Slow(nn.Module):
    """A loss whose forward takes 20 ms and whose backward takes 40."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, batch) -> tuple:
        time.sleep(0.02)
        loss = self.weight.square().sum()
        loss.register_hook(lambda g: time.sleep(0.04))
        return loss, torch.tensor(1.0), {}


def run(
    steps: int = 4, recorder: Profile | None = None, phases: Phases | None = None, validates: bool = True
) -> nn.Module:
    groups.ensure()
    model = Slow()
    log = SimpleNamespace(start_bar=lambda step: None, step=lambda *_: None, write=lambda record: None)

    def evaluate() -> dict[str, float]:
        time.sleep(0.1)
        return {"val_loss": 1.0, "val_perplexity": 2.7, "val_accuracy": 0.5}

    loop.fit(
        model, optim.adamw(model, optim.OptimArgs(lr=1e-2)), GradientRules(model, 1, lambda n: None, lambda n: False, lambda n: False),
        lambda model, batch: model(batch), [Example(np.arange(3, dtype=np.int32), 1)] * 8, TrainState(),
        loop.LoopArgs(batch_size=1, accum_iter=2, max_steps=steps, eval_steps=2), optim.OptimArgs(lr=1e-2), precision="fp32",
        data_parallel="fsdp", num_workers=0, run_log=log, evaluate=evaluate if validates else None, sample=None, save_best=0,  # type: ignore[arg-type]
        save=lambda state: time.sleep(0.03), phases=phases, profile=recorder,
    )  # fmt: skip
    return model


# --- phases -----------------------------------------------------------------------------------------------------------


def test_phases_are_what_took_the_time_and_add_up_to_it() -> None:
    groups.ensure()
    began, phases = time.perf_counter(), Phases(torch.device("cpu"))
    run(phases=phases)
    total, found = time.perf_counter() - began, phases.record()
    seconds = found["seconds"]
    assert found["steps"] == 4 and tuple(seconds) == profile.PHASES
    assert seconds["forward"] >= 8 * 0.02 and seconds["backward"] >= 8 * 0.04  # two micro batches a step
    assert seconds["evaluation"] >= 3 * 0.1 and seconds["saving"] >= 0.03  # at 0, 2 and 4; at the end
    assert seconds["backward"] > seconds["forward"] * 1.2
    assert sum(seconds.values()) == pytest.approx(total, abs=0.05 * total)


def test_a_mark_costs_next_to_nothing() -> None:
    """Below 5 us: a step has ten of them, so 0.5 % of one of 10 ms is not reached."""
    phases = Phases(torch.device("cpu"))
    seconds, _ = least_cpu_seconds(lambda: [phases.mark("forward") for _ in range(20000)])
    assert seconds / 20000 < 5e-6


class Event:
    """A GPU's event: it has a time once the GPU has come to it, which `reached` says."""

    made: list["Event"] = []
    reached = 0
    waited = 0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = len(Event.made)
        Event.made.append(self)

    def query(self) -> bool:
        return self.at <= Event.reached

    def synchronize(self) -> None:
        Event.waited, Event.reached = Event.waited + 1, max(Event.reached, self.at)

    def elapsed_time(self, other: "Event") -> float:
        assert self.query() and other.query(), "its time is not known yet"
        return 1000.0 * (other.at - self.at)


def test_on_a_gpu_events_are_read_late_and_no_step_waits(monkeypatch) -> None:
    Event.made, Event.reached, Event.waited = [], 0, 0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    phases = Phases(torch.device("cuda"))
    for step in range(5):
        for phase in ("data", "forward", "backward", "optimizer"):
            phases.mark(phase)
        Event.reached = 4 * step  # the GPU is a step behind
        phases.step()
        assert Event.waited == 0 and len(phases.unread) == 4
    assert phases.record() == {"steps": 5, "seconds": dict.fromkeys(profile.PHASES, 0.0) | dict.fromkeys(
        ("data", "forward", "backward", "optimizer"), 5.0)}  # fmt: skip
    assert Event.waited == 1


def test_the_line_names_what_counts() -> None:
    record = {"steps": 7, "seconds": dict.fromkeys(profile.PHASES, 0.0) | {"forward": 2.5, "backward": 7.5}}
    assert profile.time_line(record, 1) == "time: 10.0 s for 7 step(s): forward 2.50 s (25.0%), backward 7.50 s (75.0%)"
    assert profile.time_line(record, 4).endswith("what layers and FSDP exchange is within forward and backward")
    assert profile.time_line({"steps": 0, "seconds": dict.fromkeys(profile.PHASES, 0.0)}, 1).startswith("time: 0.0 s")


# --- --profile_steps --------------------------------------------------------------------------------------------------


def steps_in(trace: Path) -> list[str]:
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    return sorted({e["name"] for e in events if e.get("name", "").startswith("step ")})


@pytest.mark.parametrize(
    "first, last, expected", [(1, 1, ["step 1"]), (2, 3, ["step 2", "step 3"]), (4, 4, ["step 4"])]
)
def test_the_trace_has_these_steps_and_no_others(tmp_path: Path, capsys, first: int, last: int, expected: list) -> None:
    run(recorder=Profile(tmp_path / "profile", first, last, rank=0))
    assert steps_in(tmp_path / "profile" / "trace_rank0.json.gz") == expected
    said = capsys.readouterr().out
    assert f"profile of steps {first} to {last}" in said and "perfetto" in said
    if not torch.cuda.is_available():
        assert "a snapshot of memory is for GPUs only" in said and len(list((tmp_path / "profile").iterdir())) == 1


def test_a_run_that_ends_within_them_leaves_what_there_is(tmp_path: Path) -> None:
    recorder = Profile(tmp_path, 3, 9, rank=1)
    run(recorder=recorder)
    assert not list(tmp_path.iterdir())
    recorder.stop(4)
    assert {"step 3", "step 4"} <= set(steps_in(tmp_path / "trace_rank1.json.gz"))
    recorder.stop(4)  # harmless


def test_a_run_that_ends_before_them_says_so(tmp_path: Path, capsys) -> None:
    Profile(tmp_path, 5, 6, rank=0).stop(3)
    assert "--profile_steps 5:6: the run ended at step 3, nothing is recorded" in capsys.readouterr().out


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "profile").touch()  # a file where the directory would be
    run(recorder=Profile(tmp_path / "profile", 2, 2, rank=1))
    assert "profile of steps 2 to 2" in (said := capsys.readouterr().out) and "not written: File exists" in said

    def full(self, path: str) -> None:
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full)
    run(recorder=Profile(tmp_path / "other", 2, 2, rank=0))
    assert "not written: No space left on device" in capsys.readouterr().out and not list(
        (tmp_path / "other").iterdir()
    )


def test_looking_changes_nothing(tmp_path: Path) -> None:
    plain, watched = run(validates=False), run(recorder=Profile(tmp_path, 1, 3, 0), validates=False)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters()))


@pytest.mark.parametrize("text", ["3", "5:2", "0:2", "a:b", "1:2:3", "-1:2", ":", "2:", "1.5:2", ""])
def test_what_names_no_steps_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--profile_steps .*: expected first:last, steps counted from 1, such as 3:5"):
        loop.LoopArgs(profile_steps=text)


def test_steps_that_the_run_has_not(tmp_path: Path, capsys) -> None:
    assert loop.LoopArgs(profile_steps="2:5").profile_steps == "2:5"
    profile.check_steps("2:5", 5)
    profile.check_steps(None, 5)
    with pytest.raises(ValueError, match=r"--profile_steps 2:6: the run has 5 step\(s\)"):
        profile.check_steps("2:6", 5)
    assert profile.profile_of(None, tmp_path, 0, 0) is None
    assert profile.profile_of("2:5", tmp_path, 5, 0) is None and "already at step 5" in capsys.readouterr().out
    assert profile.profile_of("2:5", tmp_path, 3, 0).first == 2  # recorded from step 4 on
