"""A run that is stopped, however, and continued by the same command ends where an unbroken one ends, to the last bit.

    LoRA, mp 2 x dp 2      unbroken ----------------------------------------------------------> step 15
                           SIGKILL to all | SIGKILL to all, beyond the next epoch's edge | ---> step 15
    full tuning, dp 2      unbroken ----------------------------------------------------------> step 12
                           SIGTERM | SIGKILL to one rank | SIGKILL within a save | -----------> step 12

Compared: adapter or weights by sha256, optimizer moments tensor by tensor, the position, and every line of metrics.jsonl.
"""

import hashlib
import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from accessory.checkpoint import resume
from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.pieces import StateFiles, with_moments
from accessory.data.loader import train_windows, windows_per_epoch
from accessory.data.sft import DataArgs, load_sft
from accessory.tokenizer import Tokenizer
from tests.e2e.launches import PATIENCE, Done, Launch, as_flags, launch_line
from tests.helpers import write_tiny_checkpoint, write_tiny_data

EXAMPLES, SEED = 16, 3
GONE_WITHIN = 30  # seconds: for a save that SIGTERM asks for, too
OF_THE_CLOCK = {"tokens_per_second", "memory_gb"}


def interrupted(launch: Launch, when: Callable[[], Any], how: Callable[[Launch], Any]) -> Done:
    """Waits until `when()` is true, then does `how(launch)` and waits for the end."""
    deadline = time.monotonic() + PATIENCE
    try:
        while not when():
            assert launch.process.poll() is None, f"it ended before it could be interrupted:\n{launch.printed()}"
            assert time.monotonic() < deadline, launch.printed()
            time.sleep(0.002)
        how(launch)
        done = launch.wait(GONE_WITHIN)
        assert not launch.alive(), done.output
        return done
    finally:
        launch.kill()


def lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, without what the clock and the machine decide. A torn last line is left out."""
    file, found = run / "metrics.jsonl", []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append({k: v for k, v in json.loads(line).items() if k not in OF_THE_CLOCK})
        except json.JSONDecodeError:
            break
    return found


def logged_step(run: Path) -> int:
    return max((line["step"] for line in lines(run)), default=0)


def state(step: Path) -> dict[str, Any]:
    return json.loads((step / "resume" / "state.json").read_text())


def tensors(step: Path) -> dict[str, str]:
    """sha256 of every trained parameter and moment in resume/, put together."""
    files, found = StateFiles(step / "resume"), {}
    for name in files.names():
        for key in with_moments(name):
            whole = torch.empty(files.shape(name))
            files.fill(key, tuple((0, n) for n in files.shape(name)), whole)
            found[key] = hashlib.sha256(whole.numpy().tobytes()).hexdigest()
    return found


def same_checkpoint(one: Path, other: Path, weights: list[str]) -> None:
    assert resume.problem(one, hashes=True) is None and resume.problem(other, hashes=True) is None
    files = [json.loads((step / "manifest.json").read_text())["files"] for step in (one, other)]
    assert all(files[0][name]["sha256"] == files[1][name]["sha256"] for name in weights)
    assert tensors(one) == tensors(other)
    assert state(one) == state(other)


def every_sample_once(
    checkpoint: Path, data: Path, run: Path, batch_size: int, accum_iter: int, dp: int, steps: int
) -> None:
    """The position of every checkpoint is that of its step; an epoch has each sample once; what was counted was that."""
    train_set, _ = load_sft(
        DataArgs(data_config=str(data), max_seq_len=256, num_workers=0), Tokenizer.open(checkpoint), SEED
    )
    windows = windows_per_epoch(len(train_set), batch_size * accum_iter * dp)
    assert windows > 1 and len(train_set) % (batch_size * accum_iter * dp), (
        "the last window of an epoch is to be a short one"
    )

    def rest_of_epoch(epoch: int, start: int) -> list[list[int]]:
        ranks = [
            list(
                train_windows(
                    train_set,
                    batch_size=batch_size,
                    sequences_per_step=batch_size * accum_iter * dp,
                    dp_rank=r,
                    dp_size=dp,
                    seed=SEED,
                    epoch=epoch,
                    start_window=start,
                )
            )
            for r in range(dp)
        ]
        return [sorted(i for window in of_ranks for i in window.sample_ids) for of_ranks in zip(*ranks, strict=True)]

    seen = [ids for epoch in range(-(-steps // windows)) for ids in rest_of_epoch(epoch, 0)]
    for epoch in range(steps // windows):
        assert sorted(sum(seen[epoch * windows : (epoch + 1) * windows], [])) == list(range(len(train_set)))
    counted = [line["tokens"] for line in lines(run) if "loss" in line]
    assert counted == [sum(len(train_set[i].ids) for ids in seen[: n + 1] for i in ids) for n in range(steps)]
    for step, path in resume.steps(run):
        at = state(path)
        assert (at["step"], at["epoch"], at["window"]) == (step, *divmod(step, windows))
        following = rest_of_epoch(at["epoch"], at["window"])
        assert following == seen[step : step + len(following)] or step >= steps - windows


# --- LoRA with dropout, mp 2 x dp 2 -----------------------------------------------------------------------------------


def test_lora_killed_twice_ends_as_the_unbroken_run(tmp_path):
    checkpoint, data, steps = (
        write_tiny_checkpoint(tmp_path / "tiny", shards=2),
        write_tiny_data(tmp_path / "data", EXAMPLES),
        15,
    )
    flags = {
        "pretrained_path": checkpoint,
        "data_config": data,
        "resume": "auto",
        "model_parallel_size": 2,
        "precision": "fp32",
    }
    flags |= {
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "batch_size": 1,
        "accum_iter": 3,
        "max_steps": steps,
        "max_seq_len": 256,
        "lr": 5e-3,
    }
    flags |= {"save_steps": 4, "eval_steps": 7, "keep_best": "false", "seed": SEED, "report_to": "none"}

    def start(name: str, attempt: int = 0) -> Launch:
        return Launch(
            launch_line(*as_flags(flags | {"output_dir": tmp_path / name}), ranks=4), tmp_path / f"{name}{attempt}.log"
        )

    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    done = start("unbroken").wait()
    assert done.code == 0, done.output

    draw = random.Random()
    first, second, pauses = (
        draw.choice((4, 5, 6)),
        draw.choice((8, 9, 10)),
        (draw.uniform(0, 0.03), draw.uniform(0, 0.03)),
    )
    print(
        f"killed after line {first} + {pauses[0]:.3f} s, and after line {second} + {pauses[1]:.3f} s"
    )  # shown when it fails

    def kill(pause: float) -> Callable[[Launch], None]:
        return lambda launch: (time.sleep(pause), launch.kill())

    saved = resume.steps(broken)
    for attempt, (line, pause) in enumerate(zip((first, second), pauses)):
        # the first save is written while training goes on, and may be published after the line
        when = lambda line=line: logged_step(broken) >= line and resume.steps(broken)  # noqa: E731
        done = interrupted(start("broken", attempt), when, kill(pause))
        assert done.code == -signal.SIGKILL
        saved = resume.steps(broken)
        assert saved and saved[-1][0] < steps, f"not interrupted: {saved}"
        assert all(resume.problem(path, hashes=True) is None for _, path in saved)
    done = start("broken", 2).wait()
    assert done.code == 0 and f"continuing from {saved[-1][1]}, step {saved[-1][0]}" in done.output, done.output

    assert [step for step, _ in resume.steps(broken)] == [step for step, _ in resume.steps(unbroken)] == [4, 8, 12, 15]
    for (_, one), (_, other) in zip(resume.steps(unbroken), resume.steps(broken)):
        same_checkpoint(one, other, ["adapter.safetensors"])
    assert [line["step"] for line in lines(broken) if "loss" in line] == list(range(1, steps + 1))
    assert lines(broken) == lines(unbroken)
    every_sample_once(checkpoint, data, broken, 1, 3, 2, steps)


# --- full tuning through the script, dp 2 -----------------------------------------------------------------------------


def test_full_tuning_stopped_and_killed_in_every_way_ends_as_the_unbroken_run(tmp_path):
    checkpoint, data, steps = write_tiny_checkpoint(tmp_path / "tiny"), write_tiny_data(tmp_path / "data", EXAMPLES), 12
    settings = {
        "pretrained_path": checkpoint,
        "data_config": data,
        "nproc_per_node": 2,
        "model_parallel": 1,
        "precision": "fp32",
    }
    settings |= {
        "batch_size": 2,
        "accum_iter": 3,
        "max_steps": steps,
        "max_seq_len": 256,
        "lr": 1e-3,
        "seed": SEED,
        "save_total_limit": 100,
    }

    def start(name: str, attempt: int, save_steps: int) -> Launch:
        variables = settings | {"output_dir": tmp_path / name, "save_steps": save_steps, "eval_steps": 5}
        command = ["bash", "exps/finetune_7b.sh", "--keep_best", "false", "--report_to", "none"]
        return Launch(command, tmp_path / f"{name}{attempt}.log", **variables)

    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    done = start("unbroken", 0, 100).wait()
    assert done.code == 0, done.output

    # SIGTERM: saves where it is, says how to go on, 143
    done = interrupted(
        start("broken", 0, 100), lambda: logged_step(broken) >= 2, lambda launch: launch.process.terminate()
    )
    assert done.code == 128 + signal.SIGTERM, done.output
    assert done.last == "stopped by SIGTERM: the same command continues the run", done.output
    assert "Traceback" not in done.output and "error: " not in done.output
    [(stopped, path)] = resume.steps(broken)
    assert 2 <= stopped < steps and resume.problem(path, hashes=True) is None
    assert f"stopped at step {stopped} of {steps}, saved; the same command continues" in done.output

    # SIGKILL to one rank, as the kernel does without memory: the launcher ends the other and says which it was
    def kill_rank_1(launch: Launch) -> None:
        ranks = psutil.Process(launch.process.pid).children(recursive=True)
        next(p for p in ranks if p.environ().get("RANK") == "1").kill()

    done = interrupted(start("broken", 1, 100), lambda: logged_step(broken) > stopped, kill_rank_1)
    assert done.code == 1, done.output
    last = done.output.rstrip("\n").split("\n")[-1]
    assert last.startswith("error: rank 1 was ended by SIGKILL") and "intact" in last, done.output
    assert resume.steps(broken) == [(stopped, path)]

    # SIGKILL to all within a save: what was there stays, what was half written is not taken for a checkpoint
    for attempt in range(2, 6):
        done = interrupted(start("broken", attempt, 1), lambda: list(broken.glob("step_*.tmp-*")), Launch.kill)
        if torn := list(broken.glob("step_*.tmp-*")):
            break
    assert torn, "no kill came within a save"
    saved = resume.steps(broken)
    assert saved[0] == (stopped, path) and all(resume.problem(p, hashes=True) is None for _, p in saved)
    found, passed_over = resume.find(broken, "auto")
    assert found == saved[-1][1] and passed_over == []

    done = start("broken", 9, 100).wait()
    assert done.code == 0 and f"continuing from {saved[-1][1]}" in done.output, done.output
    assert not list(broken.glob("step_*.tmp-*")) and not list(broken.glob(".trash-*"))
    same_checkpoint(unbroken / "latest", broken / "latest", ["consolidated.00-of-01.model.pth"])
    assert [line["step"] for line in lines(broken) if "loss" in line] == list(range(1, steps + 1))
    assert [line for line in lines(broken) if "loss" in line] == [line for line in lines(unbroken) if "loss" in line]
    every_sample_once(checkpoint, data, broken, 2, 3, 2, steps)


# --- another layout ---------------------------------------------------------------------------------------------------


def test_a_run_begun_on_four_ranks_goes_on_with_one_and_with_two(tmp_path):
    checkpoint, data = write_tiny_checkpoint(tmp_path / "tiny"), write_tiny_data(tmp_path / "data", EXAMPLES)
    flags = {"pretrained_path": checkpoint, "data_config": data, "resume": "auto", "precision": "fp32", "seed": SEED}
    flags |= {"batch_size": 1, "max_seq_len": 256, "lr": 1e-3, "lr_scheduler": "constant", "report_to": "none"}

    def part(name: str, mp: int, ranks: int, steps: int, accum_iter: int = 1) -> Done:
        given = {"output_dir": tmp_path / name, "model_parallel_size": mp, "max_steps": steps, "accum_iter": accum_iter}
        log = tmp_path / f"{name}{steps}.log"
        done = Launch(launch_line(*as_flags(flags | given), ranks=ranks), log).wait()
        assert done.code == 0, done.output
        return done

    part("unbroken", 2, 2, 12, accum_iter=4)
    part("elastic", 1, 4, 5)
    for steps in (7, 9):  # the same command twice
        output = part("elastic", 1, 1, steps).output
        assert "1 data-parallel rank(s), 4 when it was begun: the same 4 sequences a step" in output
    done = part("elastic", 2, 2, 12, accum_iter=4)
    assert f"continuing from {tmp_path / 'elastic' / 'step_00000009'}, step 9" in done.output, done.output
    one, other = ([line for line in lines(tmp_path / name) if "loss" in line] for name in ("unbroken", "elastic"))
    assert [line["tokens"] for line in one] == [line["tokens"] for line in other] and len(one) == 12
    for a, b in zip(one, other):
        assert (
            abs(a["loss"] - b["loss"]) <= 1e-5 * a["loss"]
            and abs(a["grad_norm"] - b["grad_norm"]) <= 1e-4 * a["grad_norm"]
        )
    weights = [open_checkpoint(tmp_path / name / "latest").source for name in ("unbroken", "elastic")]
    for name in weights[0].names():
        torch.testing.assert_close(weights[0].read(name), weights[1].read(name), rtol=0, atol=1e-4)  # lr 1e-3, 12 steps
