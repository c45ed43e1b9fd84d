"""--as_test, the best N checkpoints and early stopping by the command line, one process each."""

import json
import os
import signal
import sys
import time

from accessory.checkpoint import resume
from tests.e2e.launches import FINETUNE, Launch, as_flags
from tests.helpers import ROOT, write_tiny_checkpoint, write_tiny_data

WANDB = """
import json, pathlib
class Error(Exception): ...
class Run:
    def __init__(self, path): self.path = path
    def log(self, record): print(json.dumps(record), file=self.path.open("a"))
    def define_metric(self, *args, **kwargs): ...
    def finish(self): self.log({"finished": True})
def init(dir, id, config, **more):
    path = pathlib.Path(dir) / f"fake-{id}"
    print(json.dumps({"lr": config["OptimArgs"]["lr"]}), file=path.open("a"))
    return Run(path)
"""


def test_as_test_leaves_the_run_alone_and_then_the_run_keeps_its_best(tmp_path):
    """One process each: --as_test in its own directory; the run with three best, ended by its patience; found finished."""
    checkpoint, data = write_tiny_checkpoint(tmp_path / "tiny"), write_tiny_data(tmp_path / "data", 24)
    flags = {"pretrained_path": checkpoint, "data_config": data, "precision": "fp32", "max_seq_len": 256, "lr": 3e-2}
    flags |= {
        "report_to": "wandb",
        "resume": "auto",
        "output_dir": tmp_path / "out",
        "accum_iter": 3,
        "warmup_steps": 0,
    }
    flags |= {"sample_prompts": "What colour is grass?", "lr_scheduler": "constant"}
    flags |= {"max_steps": 60, "eval_steps": 1, "save_steps": 7, "early_stop_patience": 3, "keep_best_n": 3}
    flags |= {"save_total_limit": 1}

    def command(*more: str, well: bool = True) -> str:
        (tmp_path / "wandb.py").write_text(WANDB)
        path = f"{tmp_path}{os.pathsep}{ROOT}"
        done = Launch(
            [sys.executable, *FINETUNE, *as_flags(flags), *more], tmp_path / "run.log", PYTHONPATH=path
        ).wait()
        assert (done.code == 0) == well, done.output
        return done.output

    test, run_directory = tmp_path / "out" / "as_test", tmp_path / "out"
    wrong = command("--as_test", "--profile_steps", "50:61", well=False)
    assert "error: --profile_steps 50:61: the run has 60 step(s)" in wrong and not run_directory.exists()
    for _ in range(2):  # again: anew
        output = command("--as_test", "--lora_rank", "2")
        assert "as_test: one step, validation and a checkpoint went well" in output, output
        assert [p.name for p in run_directory.iterdir()] == ["as_test"]
        assert [step for step, _ in resume.steps(test)] == [1] and resume.problem(test / "latest", hashes=True) is None
    lines = [json.loads(line) for line in (test / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1]
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 1]
    assert len((test / "samples.jsonl").read_text().splitlines()) == 2

    assert "ended early: val_loss has not improved for 3 validation(s)" in command()
    lines = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    [told] = run_directory.glob("fake-*")
    first, *told = [json.loads(line) for line in told.read_text().splitlines()]
    assert first == {"lr": 3e-2} and told.pop() == {"finished": True}
    assert {line["step"]: line["val/val_loss"] for line in told if "val/val_loss" in line} == losses
    assert len(told) == len(lines)
    last, best = max(losses), sorted(losses.keys() - {0}, key=lambda step: (losses[step], step))[:3]
    assert last == min(losses, key=lambda step: (losses[step], step)) + 3 < 60
    assert [step for step, _ in resume.steps(run_directory)] == sorted({*best, last})
    assert all(resume.problem(path, hashes=True) is None for _, path in resume.steps(run_directory))
    before = (run_directory / "metrics.jsonl").read_bytes()
    output = command()
    assert "finished: " in output and (run_directory / "metrics.jsonl").read_bytes() == before
    assert "weights loaded" not in output and "weights drawn" not in output  # nothing is loaded to say so


def test_a_single_process_that_was_stopped_does_not_end_as_finished(tmp_path):
    """`main_finetune && merge_lora` would merge half a run; a job that ends with 0 is not started again."""
    checkpoint, data = write_tiny_checkpoint(tmp_path / "tiny"), write_tiny_data(tmp_path / "data", 24)
    flags = {"pretrained_path": checkpoint, "data_config": data, "precision": "fp32", "max_seq_len": 256}
    flags |= {"output_dir": tmp_path / "out", "max_steps": 100000, "save_steps": 5, "save_total_limit": 1}
    flags |= {"report_to": "none"}
    launch = Launch([sys.executable, *FINETUNE, *as_flags(flags)], tmp_path / "run.log")
    deadline = time.monotonic() + 120
    while not resume.steps(tmp_path / "out") and time.monotonic() < deadline:
        time.sleep(0.1)
    launch.process.terminate()
    done = launch.wait()
    assert "of 100000, saved; the same command continues" in done.output, done.output
    assert done.code == 128 + signal.SIGTERM
