"""Which checkpoints are kept, when a run ends early, and that both are the same whether or not the run was interrupted.

The loop is the real one, over a model of two numbers, with validations that are given: `fit` plays a run of many steps in
a second, on disk as a run leaves it (state.json through JSON, real retention). By the command line: tests/e2e/test_stop.py."""

import dataclasses
import fcntl
import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from accessory.checkpoint import resume
from accessory.data.blocks import PretrainDataArgs
from accessory.data.sft import Example
from accessory.model import ModelArgs, Transformer, shard_dim
from accessory.model.lora import TuningArgs, partial_grad
from accessory.parallel import groups
from accessory.parallel.grads import GradientRules
from accessory.train import loop, objectives, optim, run
from accessory.train.directory import LOCK, claim, find_start
from accessory.train.start import (
    RunArgs,
    changed_flags,
    model_terms,
    state_at,
    with_saved_batch,
)
from accessory.train.state import TrainState

NAN = float("nan")
LOSSES = [6, 5, 4, 4.5, 3, 3, 3.5, 3.2, 3.1, 2, 2.5, 2.6, 2.7]  # of validations 0, 1, ...; best at 1, 2, 4, 9


class NoTransformer(nn.Module):
    """Something that fit can train: its loss is the sum of its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, batch: Any) -> tuple:
        return self.weight.square().sum(), torch.tensor(1.0), {"correct": torch.tensor(0.0)}


class Play:
    """Plays runs in one directory. `validated` and `sampled`: the steps at which they were."""

    def __init__(self, directory: Path, losses: list[float], **flags: Any):
        groups.ensure()
        self.directory, self.losses, self.flags = directory, losses, {"max_steps": 100, "eval_steps": 2} | flags
        self.validated: list[int] = []
        self.sampled: list[int] = []
        self.lines: list[dict] = []

    def newest(self) -> TrainState:
        found = resume.steps(self.directory)
        return TrainState.from_json(json.loads((found[-1][1] / "state.json").read_text())) if found else TrainState()

    def kept(self) -> list[int]:
        return [step for step, _ in resume.steps(self.directory)]

    def go(self, best: int = 0, keep_last: int | None = 1, sigterm_at: int = 10**9, **flags: Any) -> TrainState:
        """From the newest checkpoint on, until it ends or SIGTERM comes within step `sigterm_at`."""
        model, state = NoTransformer(), self.newest()
        optimizer = optim.adamw(model, optim.OptimArgs())
        args = loop.LoopArgs(**{"batch_size": 1} | self.flags | flags)

        def evaluate() -> dict[str, float]:
            self.validated.append(state.step)
            value = self.losses[state.step // int(args.eval_steps)]
            return {"val_loss": value, "val_perplexity": math.exp(value), "val_accuracy": 1 / value}

        def save(state: TrainState) -> None:
            path = self.directory / f"step_{state.step:08d}"
            path.mkdir(exist_ok=True)
            (path / "state.json").write_text(json.dumps(state.to_json()))
            manifest = {"files": {}}
            (path / "manifest.json").write_text(json.dumps(manifest | {"sha256": resume.digest(manifest)}))
            resume.retire(self.directory, keep_last, state.best_steps)

        def objective(model: nn.Module, batch: Any) -> tuple:
            if state.step + 1 == sigterm_at:
                signal.raise_signal(signal.SIGTERM)
            return model(batch)

        log = SimpleNamespace(start_bar=lambda step: None, step=lambda *_: None, write=self.lines.append)
        return loop.fit(
            model, optimizer, GradientRules(model, 1, lambda n: None, lambda n: False, lambda n: False), objective,
            [Example(np.arange(3, dtype=np.int32), 1)] * 100, state, args, optim.OptimArgs(), precision="fp32",
            data_parallel="fsdp", num_workers=0, run_log=log, evaluate=evaluate, sample=self.sampled.append,  # type: ignore[arg-type]
            save_best=best, save=save,
        )  # fmt: skip


# --- early stopping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience, ends", [(1, 3), (2, 6), (3, 7), (4, 8), (5, 24)])
def test_stops_exactly_so_many_validations_after_the_best(tmp_path, patience, ends):
    """Bests at 1, 2, 4 and 9. An equal value is no improvement: the second 3 counts."""
    play = Play(tmp_path, LOSSES, max_steps=24, early_stop_patience=patience)
    state = play.go()
    if patience == 5:  # 5, 6, 7 and 8 are four, 10, 11 and 12 three
        assert state.step == 24 and loop.LoopArgs(early_stop_patience=5).ends_early(state) is None
        return
    assert state.step == 2 * ends and play.validated == list(range(0, 2 * ends + 1, 2))
    best = {3: 2, 6: 4, 7: 4, 8: 4}[ends]
    assert state.best_step == 2 * best and ends == best + patience
    assert play.kept() == [2 * ends] and play.newest() == state  # the end is saved, with its reason in it
    assert f"--early_stop_patience {patience}" in loop.LoopArgs(early_stop_patience=patience).ends_early(state)
    assert play.sampled[-1] == 2 * ends


def test_nothing_but_nan_runs_out_of_patience(tmp_path):
    state = Play(tmp_path, [NAN, NAN, 5, 4, NAN, NAN, NAN], early_stop_patience=2).go(best=2)
    assert (state.step, state.best, state.best_step, state.best_steps) == (10, -4, 6, [6, 4])
    (tmp_path / "other").mkdir()
    state = Play(tmp_path / "other", [NAN] * 9, early_stop_patience=1).go()
    assert (state.step, state.best) == (2, None), "not before the first step"


def test_accuracy_is_better_when_it_is_larger(tmp_path):
    state = Play(tmp_path, [4, 3, 2, 3, 3], early_stop_patience=2, metric="val_accuracy").go(best=2)
    assert (state.step, state.best, state.best_steps) == (8, 0.5, [4, 2])


def test_stops_at_a_perplexity(tmp_path):
    play = Play(tmp_path, LOSSES, stop_perplexity=math.exp(3))
    assert play.go().step == 8 and play.kept() == [8]
    (tmp_path / "low").mkdir()
    low = Play(tmp_path / "low", [0.5] * 9, stop_perplexity=2)
    assert low.go().step == 2 and low.validated == [0, 2], "the untouched model's validation does not end the run"


def test_a_run_that_ended_early_is_finished_until_the_flag_changes(tmp_path):
    play = Play(tmp_path, LOSSES, max_steps=24, early_stop_patience=2)
    state = play.go()
    args = loop.LoopArgs(early_stop_patience=2)
    assert "another value" in run.over(state, 24, args) and run.over(state, 24, loop.LoopArgs()) is None
    assert run.over(TrainState(step=24), 24, args) == "a larger --max_steps or --epochs goes on"
    steps = len(play.lines)
    assert play.go().step == 12 and len(play.lines) == steps, "nothing was done again"
    assert play.go(early_stop_patience=3).step == 14


@pytest.mark.parametrize("at", range(1, 17))
@pytest.mark.parametrize("metric", ["val_loss", "val_accuracy"])
def test_an_interruption_changes_nothing(tmp_path, at, metric):
    """SIGTERM within any step, also one with a validation, which is then made up for: the same validations, the same end."""
    flags = {"early_stop_patience": 4, "max_steps": 24, "save_steps": 3, "metric": metric}
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    unbroken, broken = Play(tmp_path / "a", LOSSES, **flags), Play(tmp_path / "b", LOSSES, **flags)
    expected = unbroken.go(best=2, keep_last=2)
    assert broken.go(best=2, keep_last=2, sigterm_at=at).step == at
    assert broken.validated == [v for v in unbroken.validated if v < at]
    state = broken.go(best=2, keep_last=2)
    assert state == expected and state.step == 16
    assert broken.validated == unbroken.validated and broken.sampled == unbroken.sampled
    assert set(expected.best_steps) == {8, 10} <= set(unbroken.kept()) & set(broken.kept())


# --- the best N -------------------------------------------------------------------------------------------------------


def ranked(values: list[float], keep: int, start: int = 1) -> list[int]:
    state = TrainState()
    state.judge_by("val_loss")
    for step, value in enumerate(values, start):
        state.step = step
        state.note({"val_loss": value}, keep)
    assert [v for v, _ in state.ranked] == sorted((v for v, _ in state.ranked), reverse=True)
    return state.best_steps


@pytest.mark.parametrize(
    "values, keep, expected",
    [
        ([5, 4, 3, 2], 2, [4, 3]),
        ([2, 3, 4, 5], 2, [1, 2]),
        ([3, 3, 3, 3], 2, [1, 2]),  # of equal ones the earlier
        ([3, 2, 3, 2, 1], 3, [5, 2, 4]),
        ([4, 3, 4, 3, 4], 3, [2, 4, 1]),
        ([NAN, 5, NAN], 2, [2]),
        ([math.inf, 5], 2, [2, 1]),
        ([1, 2], 5, [1, 2]),
        ([1, 2], 0, []),
    ],
    ids=str,
)
def test_the_best_are_ranked(values, keep, expected):
    assert ranked(values, keep) == expected


def test_ranks_are_those_of_sorting_all():
    values = np.random.default_rng(0).integers(0, 6, 60).tolist()
    for keep in (1, 2, 5, 20):
        assert ranked(values, keep) == [i + 1 for i in sorted(range(60), key=lambda i: (values[i], i))[:keep]]


@pytest.mark.parametrize("best, expected", [(1, [18, 24]), (2, [18, 20, 24]), (3, [18, 20, 22, 24]), (5, None)])
def test_the_best_are_saved_and_kept(tmp_path, best, expected):
    """With one newest kept. Step 0 is no checkpoint and takes no place, even where the untouched model is best."""
    play = Play(tmp_path, [1, *LOSSES[1:]], max_steps=24, save_steps=24)
    state = play.go(best=best)
    assert state.best_step == 0 and play.kept() == (expected or [8, 18, 20, 22, 24])
    assert play.kept() == sorted({*state.best_steps, 24})


def test_nothing_is_saved_as_best_where_that_is_off(tmp_path):
    play = Play(tmp_path, LOSSES, max_steps=24, save_steps=10)
    assert play.go(best=0, keep_last=None).ranked == [] and play.kept() == [10, 20, 24]


def test_another_metric_begins_anew(tmp_path):
    play = Play(tmp_path, LOSSES, max_steps=24, early_stop_patience=2)
    assert play.go().step == 12
    state = play.go(metric="val_accuracy", early_stop_patience=2)
    assert state.metric == "val_accuracy" and state.step == 22 and state.best_step == 18, "6 is the first that it saw"


def test_an_older_state_keeps_its_best():
    fields = {"step": 20, "metrics": {"val_loss": 3.0, "val_perplexity": 20.1, "val_accuracy": 0.1}}
    state = TrainState.from_json(fields | {"best": -2.0, "best_step": 10})
    assert (state.best, state.best_step, state.best_steps, state.validated_at) == (-2.0, 10, [10], 20)
    state.judge_by("val_loss")
    state.step = 30
    state.note({"val_loss": 2.5}, 1)
    assert (state.best_steps, state.stale) == ([10], 1)
    assert TrainState.from_json(fields | {"best": -2.0, "best_step": 0}).best_steps == []
    assert TrainState.from_json({"step": 3}).validated_at is None


# --- flags ------------------------------------------------------------------------------------------------------------


def test_samples_at_their_own_steps(tmp_path):
    play = Play(tmp_path, LOSSES, max_steps=10, eval_steps=4, sample_steps=3)
    play.go()
    assert play.sampled == [0, 3, 6, 9, 10] and play.validated == [0, 4, 8, 10]
    (tmp_path / "b").mkdir()
    play = Play(tmp_path / "b", LOSSES, max_steps=10, eval_steps=4, sample_steps=0.5)
    play.go()
    assert play.sampled == [0, 5, 10]
    (tmp_path / "c").mkdir()
    play = Play(tmp_path / "c", LOSSES, sample_steps=4, early_stop_patience=1)
    assert play.go().step == 6 and play.sampled == [0, 4, 6], "at an early end too"


@pytest.mark.parametrize(
    "section, flags, words",
    [
        (loop.LoopArgs, {"early_stop_patience": 0}, "--early_stop_patience 0"),
        (loop.LoopArgs, {"stop_perplexity": 0.5}, "--stop_perplexity 0.5"),
        (loop.LoopArgs, {"sample_steps": -1}, "--sample_steps"),
        (RunArgs, {"keep_best_n": 0}, "--keep_best_n 0: at least 1, or --keep_best false"),
        (RunArgs, {"report_to": ["none", "wandb"]}, "--report_to none,wandb: none stands alone"),
    ],
    ids=str,
)
def test_refusals(section, flags, words):
    given = {"pretrained_path": "x", "output_dir": "y"} if section is RunArgs else {}
    with pytest.raises(ValueError) as error:
        section(**given | flags)
    assert words in str(error.value)


def test_an_end_by_validation_needs_one():
    for flags in ({"early_stop_patience": 2}, {"stop_perplexity": 3.5}):
        name = next(iter(flags))
        with pytest.raises(ValueError, match=f"--{name}.*no validation data"):
            run.check_judged(loop.LoopArgs(**flags), None)
        run.check_judged(loop.LoopArgs(**flags), [1])


def test_as_test_is_one_step_of_at_most_two_micro_batches():
    assert loop.LoopArgs(as_test=True, max_steps=50, epochs=9).total_steps(7) == 1
    for flags, expected in (({"accum_iter": 64}, 16), ({}, 8), ({"global_batch_size": 6}, 6)):
        assert loop.LoopArgs(as_test=True, batch_size=4, **flags).sequences_per_step(2) == expected


def test_validation_of_a_few_batches():
    """Of the whole set, and of its first two batches, against the loss of those examples one by one."""
    groups.ensure()
    args = ModelArgs.from_dict({"dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 11, "hidden_dim": 16})
    model = Transformer(args).init_weights()
    assert shard_dim("norm.weight") is None and not partial_grad("norm.weight")
    rng = np.random.default_rng(0)
    data = [Example(rng.integers(0, 11, 4 + i).astype(np.int32), 1 + i % 3) for i in range(7)]

    def expected(count: int) -> float:
        loss = tokens = 0.0
        for e in data[:count]:
            logits = model(torch.from_numpy(e.ids.astype(np.int64))[None])[0].float()
            picked = torch.log_softmax(logits[:-1], -1)[range(len(e.ids) - 1), e.ids[1:].astype(np.int64)]
            picked = picked[max(e.prompt_len, 1) - 1 :]
            loss, tokens = loss - picked.sum().item(), tokens + len(picked)
        return loss / tokens

    for most, count in ((None, 7), (2, 4), (100, 7)):
        found = loop.evaluate(model, objectives.next_token, data, 2, False, most)
        assert abs(found["val_loss"] - expected(count)) < 1e-5
        assert abs(found["val_perplexity"] - math.exp(expected(count))) < 1e-2
    nothing = loop.evaluate(model, objectives.next_token, [Example(np.zeros(1, np.int32), 0)], 2, False)
    assert all(math.isnan(value) for value in nothing.values()), (
        "one block of one token held out: no loss of 0, the best of all"
    )


def test_which_flags_of_the_data_changed(tmp_path) -> None:
    then = PretrainDataArgs(corpus=["a", "b=0.5"], block_size=64)
    (tmp_path / "config.json").write_text(json.dumps({"PretrainDataArgs": dataclasses.asdict(then)}))
    now = dataclasses.replace(then, block_size=32, drop_last=True, num_workers=4)
    assert changed_flags(tmp_path, now) == "--block_size 64 then, 32 now; --drop_last False then, True now"
    assert changed_flags(tmp_path, then) == "its files or the tokenizer, not its flags"
    for content in ("", "[]", "{}", '{"PretrainDataArgs": 3}'):
        (tmp_path / "config.json").write_text(content)
        assert "config.json does not tell" in changed_flags(tmp_path, now)
    assert "config.json does not tell" in changed_flags(tmp_path / "nowhere", now)


def test_the_command_that_comes_next_can_be_pasted(capsys) -> None:
    from accessory.train.run import say_end
    from accessory.train.state import TrainState

    say_end(TrainState(step=3), 3, Path("/runs/my model"), adapter=True)
    assert "--adapters '/runs/my model/latest' --dst" in "".join(capsys.readouterr())


def saved_position(directory: Path, **other: Any) -> dict[str, Any]:
    """A checkpoint's state in `directory`, after a validation; its position, with what is `other` now."""
    args = ModelArgs.from_dict({"dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 11, "rope_theta": 500000.0})
    position = {"fingerprint": "f", "seed": 0, "sequences_per_step": 8, "quant": None, "optim_states": "fp32"}
    position |= {"model": model_terms(args, TuningArgs(lora_rank=8)), "validation": "v", "dp": 1}
    state = TrainState(step=5, best=-2.0, best_step=5, metric="val_loss", ranked=[[-2.0, 5]], stale=1, data=position)
    (directory / "resume").mkdir(exist_ok=True)
    content = state.to_json() | {"format_version": resume.FORMAT_VERSION, "adam_step": 5.0}
    (directory / "resume" / "state.json").write_text(json.dumps(content))
    (directory / "manifest.json").write_text(json.dumps({"mp": 1, "dp": 2}))
    return position | other


def test_a_run_goes_on_with_the_model_that_it_had(tmp_path) -> None:
    """What no tensor's name or shape tells: the scale of the adapters, the base of the rotary embedding."""
    model = saved_position(tmp_path)["model"]
    for change, words in (
        ({"lora_alpha": 32.0}, "the model's lora_alpha changed (8.0 then, 32.0 now)"),
        ({"use_rslora": True}, "the model's use_rslora changed (False then, True now)"),
        ({"rope_theta": 10000.0}, "the model's rope_theta changed (500000.0 then, 10000.0 now)"),
        ({"rope_scaling": {"factor": 8.0}}, "the model's rope_scaling changed (None then, {'factor': 8.0} now)"),
    ):
        with pytest.raises(ValueError) as error:
            state_at(tmp_path, saved_position(tmp_path, model=model | change), None)
        assert words in str(error.value)
    assert state_at(tmp_path, saved_position(tmp_path), None).best_steps == [5]


def test_another_validation_set_begins_anew(tmp_path, capfd) -> None:
    state = state_at(tmp_path, saved_position(tmp_path, validation="w"), None)
    assert (state.best, state.best_step, state.ranked, state.stale) == (None, None, [], 0)
    assert "the validation data changed" in capfd.readouterr().out


def test_a_directory_is_one_runs(tmp_path) -> None:
    """A second process is refused, whatever it was asked to do there; the first may ask again, and its end is enough."""
    groups.ensure()
    directory = tmp_path / "run"
    for flags in ({}, {"resume": "auto"}, {"overwrite_output_dir": True}):
        directory.mkdir(exist_ok=True)
        with open(directory / LOCK, "a") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(ValueError, match=f"--output_dir {directory}: another run is writing there: wait"):
                find_start(RunArgs(pretrained_path="x", output_dir=str(directory), **flags), directory)
    claim(directory)
    claim(directory)
    with open(directory / LOCK) as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--output_dir .*file/run: Not a directory: choose one that can be written to"):
        claim(tmp_path / "file" / "run", make=True)
    claim(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_prompts_are_an_instruction_or_a_file_that_is_there(tmp_path) -> None:
    (tmp_path / "p.txt").write_text("One?\n\nTwo?\n")
    assert run.read_prompts(str(tmp_path / "p.txt")) == ["One?", "Two?"]
    for words in ("Hello", "What is in prompts.txt?", "24/7"):
        assert run.read_prompts(words) == [words]
    for path in (str(tmp_path / "q"), "prompts.txt", "./prompts"):
        with pytest.raises(ValueError, match="--sample_prompts .*: no such file"):
            run.read_prompts(path)


def test_the_same_command_goes_on_twice_on_another_number_of_ranks(tmp_path, monkeypatch) -> None:
    """Begun on one data-parallel rank with 8 sequences a step, saved on two: the flags still mean 8, on two ranks and on four."""
    position = saved_position(tmp_path)
    same, other = loop.LoopArgs(batch_size=8), loop.LoopArgs(batch_size=8, global_batch_size=16)
    for now in (2, 4, 1):
        monkeypatch.setattr(groups, "dp_size", lambda now=now: now)
        assert with_saved_batch(same, tmp_path).sequences_per_step(now) == 8
        assert with_saved_batch(other, tmp_path) is other
        assert state_at(tmp_path, position | {"dp": now}, None).step == 5
        carried = position | {"dp": now}
        state_at(tmp_path, carried, None)
        assert carried["dp"] == 1
    state = json.loads((tmp_path / "resume" / "state.json").read_text())
    state["data"]["dp"] = 2  # begun and saved on two: flags that ask for another batch there are for state_at to refuse
    (tmp_path / "resume" / "state.json").write_text(json.dumps(state))
    monkeypatch.setattr(groups, "dp_size", lambda: 2)
    assert with_saved_batch(same, tmp_path) is same
