"""What a run tells: metrics.jsonl always; TensorBoard read back with its own reader; Weights & Biases by a module in its place."""

import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from accessory import log
from accessory.config import parse
from accessory.train.start import RunArgs

TRAIN = {"step": 1, "epoch": 0.5, "loss": 2.5, "lr": 1e-3}
VAL = {"step": 1, "epoch": 0.5, "val_loss": 2.0}


class FakeRun:
    def __init__(self, kwargs: dict[str, Any]):
        self.kwargs, self.logged, self.axes, self.finished = kwargs, [], [], False

    def log(self, record: dict[str, Any]) -> None:
        assert not self.finished
        self.logged.append(record)

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch) -> ModuleType:
    """`wandb` with what we use of it: its runs are in `.runs`, `.fails` is what init raises."""
    fake: Any = ModuleType("wandb")
    fake.Error, fake.runs, fake.fails = type("Error", (Exception,), {}), [], None

    def init(**kwargs: Any) -> FakeRun:
        if fake.fails is not None:
            raise fake.fails
        fake.runs.append(FakeRun(kwargs))
        return fake.runs[-1]

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def play(directory: Path, report_to: list[str], resumed: int | None = None, rank: int = 0) -> None:
    run_log = log.RunLog(directory, rank, report_to, resumed, 10, {"OptimArgs": {"lr": 1e-3}})
    run_log.write(TRAIN)
    run_log.write(VAL)
    run_log.write({"step": 1, "prompt": "Why?", "answer": "So."}, file="samples.jsonl")
    run_log.close()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("report_to", [[], ["none"], ["wandb"], ["tensorboard", "wandb"]], ids=str)
def test_the_files_are_always_there(tmp_path, wandb, report_to):
    play(tmp_path, report_to)
    assert lines(tmp_path / "metrics.jsonl") == [TRAIN, VAL]
    assert lines(tmp_path / "samples.jsonl") == [{"step": 1, "prompt": "Why?", "answer": "So."}]
    assert (tmp_path / "tensorboard").exists() == ("tensorboard" in report_to)
    assert len(wandb.runs) == ("wandb" in report_to)


def test_wandb_gets_every_number_on_our_axis(tmp_path, wandb):
    (tmp_path / "my_run").mkdir()
    play(tmp_path / "my_run", ["wandb"])
    [run] = wandb.runs
    assert run.logged == [
        {"train/epoch": 0.5, "train/loss": 2.5, "train/lr": 1e-3, "step": 1},
        {"train/epoch": 0.5, "val/val_loss": 2.0, "step": 1},
    ]
    assert run.axes == [("step", None), ("*", "step")] and run.finished
    assert run.kwargs["name"] == "my_run" and run.kwargs["dir"] == str(tmp_path / "my_run")
    assert run.kwargs["config"] == {"OptimArgs": {"lr": 1e-3}} and run.kwargs["resume"] == "allow"


def test_a_continued_run_goes_on_at_wandb_and_a_fresh_one_is_another(tmp_path, wandb):
    play(tmp_path, ["wandb"])
    play(tmp_path, ["wandb"], resumed=0)
    play(tmp_path, ["wandb"])
    first, again, fresh = (run.kwargs["id"] for run in wandb.runs)
    assert first == again != fresh and first.isalnum()
    (tmp_path / "wandb_id").unlink()  # a run that was begun without wandb
    play(tmp_path, ["wandb"], resumed=0)
    assert wandb.runs[-1].kwargs["id"] not in (first, fresh)


def test_only_rank_0_tells(tmp_path, wandb):
    play(tmp_path / "other", ["tensorboard", "wandb"], rank=1)
    assert not (tmp_path / "other").exists() and not wandb.runs


def test_what_wandb_refuses_is_one_line(tmp_path, wandb):
    wandb.fails = wandb.Error("api_key not configured (no-tty)\nmore of it")
    with pytest.raises(ValueError) as error:
        play(tmp_path, ["wandb"])
    assert str(error.value).startswith("--report_to wandb: api_key not configured (no-tty); set WANDB_MODE=offline")
    assert "\n" not in str(error.value)


def test_tensorboard_reads_it_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    play(tmp_path, ["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/epoch", "train/loss", "train/lr", "val/val_loss"]
    [loss] = events.Scalars("train/loss")
    assert (loss.step, loss.value) == (1, 2.5)


def test_tensorboard_shows_each_step_once(tmp_path, monkeypatch):
    """Of a run that was continued, and of one that was begun anew in the directory of a longer one."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def shown(resumed: int | None, steps: range, loss: float) -> dict[int, float]:
        run_log = log.RunLog(tmp_path, 0, ["tensorboard"], resumed, 9)
        for step in steps:
            run_log.write({"step": step, "loss": loss})
        run_log.close()
        scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
        assert len({s.step for s in scalars}) == len(scalars)
        return {s.step: s.value for s in scalars}

    seconds = itertools.count(1_800_000_000)  # files are read in the order of the seconds in their names
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time.time", lambda: next(seconds))
    shown(None, range(6), 1.0)
    assert shown(3, range(4, 8), 2.0) == dict.fromkeys(range(4), 1.0) | dict.fromkeys(range(4, 8), 2.0)
    assert shown(None, range(4), 3.0) == dict.fromkeys(range(4), 3.0)


@pytest.mark.parametrize("name", log.REPORTERS)
def test_a_missing_package_is_said_before_anything_else(monkeypatch, name):
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(log.importlib.util, "find_spec", lambda package: None)
    for other in set(log.REPORTERS) - {name}:
        monkeypatch.setitem(sys.modules, other, ModuleType(other))
    given = ["--pretrained_path", "x", "--output_dir", "y", "--report_to"]
    with pytest.raises(ValueError, match=f"--report_to {name}: the {name} package is missing; pip install {name}"):
        parse([*given, ",".join(log.REPORTERS)], RunArgs)
    assert parse([*given, "none"], RunArgs)[0].report_to == ["none"]


def test_the_flag_is_a_list(wandb):
    given = ["--pretrained_path", "x", "--output_dir", "y"]
    assert parse([*given, "--report_to", "tensorboard,wandb"], RunArgs)[0].report_to == ["tensorboard", "wandb"]
    assert parse(given, RunArgs)[0].report_to == ["tensorboard"]
    assert RunArgs(pretrained_path="x", output_dir="y", report_to="none").report_to == ["none"]
    with pytest.raises(ValueError, match="choose one of none, tensorboard, wandb"):
        parse([*given, "--report_to", "tensorboard,mlflow"], RunArgs)


def test_a_full_disk_is_named(tmp_path):
    run_log = log.RunLog(tmp_path, 0, [], None, 2)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        run_log.write(TRAIN)
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")
