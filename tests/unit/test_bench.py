"""The benchmark's frame without its peers: arithmetic on made-up results, and toy sides that really run."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from bench import measure, peers, run, verdict, workload
from bench.rows import ANY, ITSELF, OURS, Absent, Goal, Row, Side, loading
from bench.sides import batches


def result(seconds, tokens=100.0, loss=(2.0, 1.9), peak=50.0, **more):
    times = [seconds] * 3
    return {"loss": list(loss), "tokens": tokens, "seconds": times, "cpu_seconds": times, "peak_mb": peak, "more": more}


def toy_row(*sides, goals=(), prepare=lambda directory, device: {}):
    return Row("toy", "a toy", list(sides), list(goals), prepare)


MINE, SLOW, FAST = (
    Side("mine", OURS, "x", peer=OURS),
    Side("slow", "hf", "x", peer="peer"),
    Side("fast", "hf", "x", peer="peer"),
)


# --- verdict ----------------------------------------------------------------------------------------------------------


def test_ratio_is_the_median_of_neighbours_not_the_ratio_of_medians():
    """Round by round 2, 3 and 4 times as fast, while the machine itself changes speed tenfold."""
    row = toy_row(MINE, FAST, goals=[Goal("peer", "speed", at_least=2.9)])
    rounds = [{"mine": result(s), "fast": result(s * factor)} for s, factor in ((1.0, 2.0), (10.0, 3.0), (0.1, 4.0))]
    [entry] = verdict.judge(row, rounds, "seconds")
    assert entry["ratio"] == pytest.approx(3.0) and entry["each"] == pytest.approx([2, 3, 4]) and entry["met"] is True
    assert (
        verdict.judge(toy_row(MINE, FAST, goals=[Goal("peer", "speed", at_least=3.1)]), rounds, "seconds")[0]["met"]
        is False
    )


def test_the_fastest_of_a_peers_grid_stands_for_it():
    row = toy_row(MINE, SLOW, FAST, goals=[Goal("peer", "speed", at_least=1.0), Goal("peer", "peak_mb", at_most=0.8)])
    rounds = [{"mine": result(1.0), "slow": result(4.0, peak=10.0), "fast": result(0.5, peak=100.0)}] * 3
    speed, memory = verdict.judge(row, rounds, "seconds")
    assert speed["peer"] == "fast" and speed["ratio"] == pytest.approx(0.5) and speed["met"] is False
    assert memory["peer"] == "fast" and memory["ratio"] == pytest.approx(0.5) and memory["met"] is True


def test_speed_counts_tokens_and_seconds_do_not():
    rounds = [{"mine": result(1.0, tokens=200.0, extra=3.0), "fast": result(1.0, tokens=100.0, extra=2.0)}]
    assert verdict.ratios(rounds, MINE, FAST, "speed", "seconds") == [2.0]
    assert verdict.ratios(rounds, MINE, FAST, "seconds", "seconds") == [1.0]
    assert verdict.ratios(rounds, MINE, FAST, "extra", "seconds") == [1.5]


def test_a_failing_side_never_wins_and_leaves_the_goal_open():
    row = toy_row(MINE, SLOW, FAST, goals=[Goal("peer", "speed", at_least=1.0)])
    failed = [{"mine": result(1.0), "slow": result(4.0), "fast": {"error": "RuntimeError: no"}}]
    assert verdict.judge(row, failed, "seconds")[0]["peer"] == "slow"
    none = [{"mine": result(1.0), "slow": {"error": "x"}, "fast": {"error": "x"}}]
    assert verdict.judge(row, none, "seconds")[0]["met"] is None
    ours = [{"mine": {"error": "x"}, "slow": result(1.0), "fast": result(1.0)}]
    assert verdict.judge(row, ours, "seconds")[0]["met"] is None
    assert any("failed: RuntimeError: no" in line for line in verdict.table(row, failed, "seconds"))


@pytest.mark.parametrize("wrong", [(2.0, 1.95), (math.nan, 1.9), ()])
def test_another_loss_is_another_result(wrong):
    row = toy_row(MINE, SLOW, FAST, goals=[Goal("peer", "speed", at_least=1.0)])
    rounds = [{"mine": result(1.0), "slow": result(2.0, loss=(2.0009, 1.8995)), "fast": result(0.1, loss=wrong)}]
    assert verdict.disagreement(row, rounds, FAST) and verdict.disagreement(row, rounds, SLOW) is None
    assert verdict.judge(row, rounds, "seconds")[0]["peer"] == "slow"
    assert any("fast" in line and "other result" in line for line in verdict.table(row, rounds, "seconds"))


def test_our_own_loss_that_is_no_number_is_no_win():
    """Nothing is far from a NaN: every peer would agree with it."""
    row = toy_row(MINE, FAST, goals=[Goal("peer", "speed", at_least=1.0)])
    rounds = [{"mine": result(1.0, loss=(2.0, math.nan)), "fast": result(2.0)}]
    assert verdict.judge(row, rounds, "seconds")[0]["met"] is None
    assert any("mine" in line and "step 2 is nan" in line for line in verdict.table(row, rounds, "seconds"))


def test_a_side_that_tells_fewer_losses_is_not_compared_by_them():
    row = toy_row(MINE, FAST, goals=[Goal("peer", "speed", at_least=1.0)])
    rounds = [{"mine": result(1.0), "fast": result(2.0, loss=(2.0,))}]
    assert verdict.disagreement(row, rounds, FAST) == "losses of 1 step(s), mine has 2"


def test_sides_of_a_row_without_goals_are_not_compared():
    rounds = [{"mine": result(1.0), "fast": result(2.0, loss=(3.0, 2.9))}]
    assert verdict.disagreement(toy_row(MINE, FAST), rounds, FAST) is None


def test_a_figure_of_zero_leaves_its_goal_open_and_the_rest_is_judged():
    row = toy_row(MINE, FAST, goals=[Goal("peer", "extra", at_most=0.5), Goal("peer", "speed", at_least=1.0)])
    extra, speed = verdict.judge(row, [{"mine": result(1.0, extra=1.0), "fast": result(2.0, extra=0.0)}], "seconds")
    assert extra["met"] is None and extra["why"] == "extra of fast is 0" and speed["met"] is True


def test_each_precision_is_held_against_its_own():
    half, theirs = Side("mine16", OURS, "x", peer=OURS, precision="bf16"), Side("theirs16", "hf", "x", precision="bf16")
    goals = [Goal("theirs16", "speed", at_least=1.0)]
    row = toy_row(MINE, half, theirs, goals=goals)
    rounds = [
        {"mine": result(1.0), "mine16": result(1.0, loss=(2.015, 1.9)), "theirs16": result(1.0, loss=(2.03, 1.9))}
    ]
    assert verdict.disagreement(row, rounds, theirs) is None  # 0.015 from ours in bf16, 0.03 from ours in fp32
    assert verdict.disagreement(toy_row(MINE, theirs, goals=goals), rounds, theirs)


def test_a_goal_beside_any_peer_is_beside_the_fastest():
    other = Side("other", "litgpt", "x")
    row = toy_row(MINE, SLOW, other, goals=[Goal(ANY, "speed", at_least=1.15)])
    [entry] = verdict.judge(row, [{"mine": result(1.0), "slow": result(4.0), "other": result(1.1)}], "seconds")
    assert entry["peer"] == "other" and entry["ratio"] == pytest.approx(1.1) and entry["met"] is False
    [entry] = verdict.judge(row, [{"mine": result(1.0), "slow": {"error": "no"}, "other": {"error": "no"}}], "seconds")
    assert entry["met"] is None  # nobody finished: no win


def test_a_goal_may_be_a_figure_itself():
    goals = [Goal(ITSELF, "of_gemm", at_least=0.75), Goal(ITSELF, "speed", at_least=1500)]
    row, rounds = (
        toy_row(MINE, FAST, goals=goals),
        [{"mine": result(s, tokens=2000.0), "fast": {"error": "no"}} for s in (1, 2, 4)],
    )
    verdict.add_shares(
        row, rounds, "seconds", {"fp32_gflops": 100.0, "bf16_gflops": 1e9}, 1e8 * 0.8
    )  # of 16 bit it is none
    share, speed = verdict.judge(row, rounds, "seconds")
    assert share["each"] == pytest.approx([1.6, 0.8, 0.4]) and share["met"] is True
    assert speed["ratio"] == pytest.approx(1000) and speed["met"] is False
    lines = "\n".join(verdict.table(row, rounds, "seconds"))
    assert "| ours, of_gemm >= 0.75 | 0.80 (mine) | 0.40 to 1.60 | met |" in lines and "| 80% |" in lines
    assert "| ours, speed >= 1500 | 1,000 (mine) | 500.00 to 2,000 | missed |" in lines
    verdict.add_shares(row, rounds, "seconds", {"error": "no limits"}, 1.0)
    assert verdict.judge(toy_row(MINE, goals=goals[:1]), [{"mine": result(1.0)}], "seconds")[0]["met"] is None


def test_a_gpu_has_goals_of_its_own():
    row = Row(
        "toy",
        "a toy",
        [MINE, FAST],
        [Goal("peer", "speed", at_least=1.0)],
        lambda *_: {},
        [Goal(ANY, "speed", at_least=1.5)],
    )
    assert row.on("cpu") is row and [str(g) for g in row.on("cuda").goals] == ["ours / any peer, speed >= 1.5"]
    assert toy_row(MINE).on("cuda").goals == []
    told = run.listing(run.all_rows())
    assert "on a GPU: ours, of_gemm >= 0.75" in told


def test_a_goal_names_sides_that_are_there():
    with pytest.raises(AssertionError, match="nobody"):
        toy_row(MINE, goals=[Goal("nobody", "speed", at_least=1.0)])


# --- processes --------------------------------------------------------------------------------------------------------

TOY = """
    from bench import measure
    work = measure.begin()
    state = bytearray(work["settings"].get("mb", 0) * 1000000)
    if work["settings"].get("fails"):
        raise RuntimeError("this one cannot")
    timed = measure.timed(lambda: sum(range(300000)), warmup=1, units=3)
    measure.report(loss=[work["data"]["loss"]], tokens=10, more={"threads": work["threads"]}, **timed)
"""


@pytest.fixture
def sides(tmp_path, monkeypatch):
    """A checkout of its own whose only side program is TOY."""
    (tmp_path / "bench" / "sides").mkdir(parents=True)
    (tmp_path / "bench" / "sides" / "toy.py").write_text(textwrap.dedent(TOY))
    real, kept = run.environment, run.ROOT
    monkeypatch.setattr(run, "environment", lambda *a: real(*a) | {"PYTHONPATH": str(kept)})
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "run_limits", lambda *a: {"fp32_gflops": 1.0})
    return tmp_path


def test_toy_sides_run_and_a_failure_is_an_error_row(sides):
    mine, big = Side("mine", OURS, "toy", peer=OURS), Side("big", OURS, "toy", {"mb": 300})
    bad, absent = Side("bad", OURS, "toy", {"fails": True}), Side("absent", "no-such-peer", "toy")
    row = toy_row(mine, big, bad, absent, goals=[Goal("big", "peak_mb", at_most=0.9), Goal("bad", "speed", at_least=0.1)],
                  prepare=lambda directory, device: {"loss": 1.5, "where": str(directory)})  # fmt: skip
    (sides / "scratch").mkdir()
    told = run.run_row(row, row.sides, "cpu", 1, 1, sides / "scratch")
    [printed] = told["rounds"]
    assert printed["bad"]["error"] == "RuntimeError: this one cannot"
    assert "python -m bench.peers no-such-peer" in printed["absent"]["error"]
    mine_, big_ = printed["mine"], printed["big"]
    assert mine_["loss"] == [1.5] and mine_["more"]["threads"] == 1 and len(mine_["seconds"]) == 3
    assert 250 < big_["peak_mb"] - mine_["peak_mb"] < 350  # a resident set, of this process and not of its parent
    assert all(0 < c <= 3 * s + 0.05 for c, s in zip(mine_["cpu_seconds"], mine_["seconds"]))
    memory, speed = told["goals"]
    assert memory["met"] is True and speed["met"] is None and told["clock"] == "cpu_seconds"
    assert told["data"]["where"] == "SCRATCH" and str(sides) not in json.dumps(told)


def test_what_is_no_result_is_an_error():
    def told(code):
        return run.run_process(sys.executable, ["-c", code], {}, timeout=20)

    assert told("print('hello')")["error"] == "the last line it printed is no JSON object"
    assert told("import sys; sys.exit('first\\nlast words')")["error"] == "last words"
    assert told("print('x'); print('{\"a\": 1}')")["a"] == 1
    assert told("import sys; sys.stdout.buffer.write(b'\\xff\\n'); print('{\"a\": 1}')")["a"] == 1
    killed = told("import os, sys; print('a warning', file=sys.stderr); os.kill(os.getpid(), 9)")["error"]
    assert killed == "ended by SIGKILL: out of memory, perhaps (a warning)"
    assert "0.2 s" in run.run_process(sys.executable, ["-c", "import time; time.sleep(9)"], {}, timeout=0.2)["error"]


@pytest.mark.parametrize(
    "wrong, named",
    [({"seconds": "fast"}, "seconds"), ({"seconds": [0.0]}, "any timed unit"), ({"tokens": 0}, "any timed unit"),
     ({"loss": [None]}, "loss"), ({"more": {"a": "b"}}, "more"), ({"peak_mb": None}, "peak_mb")],
)  # fmt: skip
def test_a_result_in_another_form_is_an_error(wrong, named):
    assert run.unreported(result(1.0, extra=2.0)) is None
    assert run.unreported(result(1.0) | wrong) == named


LEFT_BEHIND = """
    import subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=sys.argv[1] == "far")
    print(child.pid, flush=True)
    open(sys.argv[2], "w").write(str(child.pid))
    time.sleep(60)
"""


def test_what_a_side_started_does_not_hold_up_the_end_of_its_time(tmp_path):
    """A child in another session is out of reach and has the pipe still open."""
    program = ["-c", textwrap.dedent(LEFT_BEHIND), "far", str(tmp_path / "pid")]
    start = time.perf_counter()
    assert "not finished" in run.run_process(sys.executable, program, {}, timeout=2)["error"]
    assert time.perf_counter() - start < 20
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


STOPPED = """
    import runpy, sys
    from pathlib import Path
    from bench import rows
    def prepare(directory, device):
        from bench import run
        run.run_process(sys.executable, ["-c", {program!r}, "near", {pid!r}], {{}})
    found = rows.Row("toy", "a toy", [rows.Side("mine", rows.OURS, "x")], [], prepare)
    import bench.rows.optimizer
    bench.rows.optimizer.ROW = found
    sys.argv = ["run", "toy", "--out", {out!r}]
    runpy.run_module("bench.run", run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_benchmark_takes_everything_with_it(tmp_path, number):
    pid, out = tmp_path / "pid", tmp_path / "out"
    code = textwrap.dedent(STOPPED).format(program=textwrap.dedent(LEFT_BEHIND), pid=str(pid), out=str(out))
    env = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=run.ROOT, env=env, text=True, stderr=subprocess.PIPE
    ) as process:
        while not (pid.exists() and pid.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + number and said.strip().startswith("stopped: ") and "Traceback" not in said
    deadline = time.monotonic() + 10  # the system takes a moment
    while alive(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(pid.read_text())) and not list(tmp_path.glob("bench-*"))


def alive(pid: int) -> bool:
    """A process that only waits to be asked for its code is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- measuring --------------------------------------------------------------------------------------------------------


MEMORY = """
    import json
    from bench import measure

    block = bytearray(200_000_000)
    high = measure.peak_mb()
    del block
    measure.reset_peak()
    low, reset = measure.now_mb(), measure.peak_mb()
    block = bytearray(100_000_000)
    print(json.dumps([high, low, reset, measure.peak_mb(), measure.now_mb()]))
"""


def test_peak_falls_after_a_reset_and_sees_what_is_used():
    # in a process of its own: what earlier tests left to be freed, or their threads, moves this one's memory by tens of MB
    told = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY)],
        cwd=run.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    high, low, reset, peak, now = json.loads(told.stdout)
    assert high - low > 150
    if reset > high - 100:
        pytest.skip("the peak of a process cannot be reset here")
    assert 50 < peak - (now - 100) < 160


def test_cpu_time_counts_work_and_not_waiting():
    asleep = measure.timed(lambda: time.sleep(0.05), warmup=0, units=2)
    busy = measure.timed(lambda: sum(range(2_000_000)), warmup=0, units=2)
    assert all(s >= 0.05 and c < 0.03 for s, c in zip(asleep["seconds"], asleep["cpu_seconds"]))
    assert all(c > 0.005 for c in busy["cpu_seconds"])


def test_limits_are_rates():
    """By a clock that is a second further whenever it is read."""
    seconds = itertools.count()
    rate = measure.gemm_rate([(64, 64, 64), (64, 32, 64)], torch.float32, clock=lambda: next(seconds))
    assert rate == pytest.approx(200 * 2 * 64 * 64 * (64 + 32) / 1e9)
    assert measure.copy_rate(clock=lambda: next(seconds)) == pytest.approx(2 * measure.COPY_BYTES / 1e9)
    assert measure.fresh_rate(clock=lambda: next(seconds)) == pytest.approx(4 * measure.COPY_BYTES / 1e9)


# --- rows, data, peers ------------------------------------------------------------------------------------------------


def test_every_row_can_be_listed_and_its_programs_are_there():
    for row in run.all_rows().values():
        for side in row.sides:
            assert (run.ROOT / "bench" / "sides" / f"{side.program}.py").is_file(), (row.name, side.program)
            assert side.env == OURS or side.env in peers.known(), (row.name, side.env)
    assert "full_ft: " in run.listing(run.all_rows())


def test_batches_are_the_same_examples_padded_or_counted(tmp_path):
    lengths = [(2, 3), (1, 4), (3, 5), (2, 2), (4, 4), (1, 1)]
    data = {
        "examples": workload.examples(tmp_path, lengths, 50), "batch_size": 2, "windows_per_unit": 1, "warmup": 1, "units": 2,
    }  # fmt: skip
    assert batches.tokens_per_unit(data) == (8 + 4 + 8 + 2) / 2
    first, second, third = batches.windows(data)
    tokens, labels, mask = batches.padded(second, 0, None, "cpu")
    assert tokens.shape == (2, 8) and mask.sum() == 12 and (labels != -100).sum() == 5 + 2 == batches.targets(second)
    assert (labels[0, :3] == -100).all() and (labels[0, 3:] == tokens[0, 3:]).all() and (labels[1, 4:] == -100).all()
    assert batches.padded(first, 0, None, "cpu")[2] is None and batches.padded(first, 0, 9, "cpu")[0].shape == (2, 9)
    losses = []
    unit = batches.unit_of(data, lambda window: torch.tensor(float(len(window))), losses)
    unit()
    assert losses == [torch.tensor(2.0)] and len(third) == 2


def test_flops_are_six_or_four_times_the_weights():
    sizes = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "hidden_dim": 11008, "vocab_size": 32000}
    assert workload.flops_per_token(sizes, 0) == pytest.approx(6 * 6.607e9, rel=1e-3)
    assert workload.flops_per_token(sizes, 0, backward=1) == pytest.approx(4 * 6.607e9, rel=1e-3)
    attention = workload.flops_per_token(sizes, 2048) - workload.flops_per_token(sizes, 0)
    assert attention == 3 * 2 * 2048 * 4096 * 32


def test_an_absent_model_passes_the_row_over(monkeypatch, tmp_path, capsys):
    def prepare(directory, device):
        raise Absent("nothing here")

    monkeypatch.setattr(run, "all_rows", lambda: {"toy": toy_row(MINE, prepare=prepare)})
    monkeypatch.setattr(sys, "argv", ["run", "toy", "--out", str(tmp_path)])
    assert run.main() == 0 and "toy: passed over: nothing here" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [("nosuch", "nosuch: no such row; there are toy"), ("toy --only mine,typo", "--only typo: no such side or peer; there are mine"),
     ("toy --rounds 0", "--rounds 0: it must be 1 or more"), ("toy --threads -1", "--threads -1: it must be 1 or more"),
     ("toy --out {file}", "--out {file}: File exists"), ("toy --device cuda", "--device cuda: torch finds no GPU on this machine")],
)  # fmt: skip
def test_what_cannot_be_done_is_told_before_anything_runs(monkeypatch, tmp_path, capsys, words, said):
    def prepare(directory, device):
        raise AssertionError("it was run")

    (tmp_path / "file").touch()
    monkeypatch.setattr(run, "all_rows", lambda: {"toy": toy_row(MINE, SLOW, prepare=prepare)})
    monkeypatch.setattr(run, "machine", lambda: {"gpu": None})
    places = {"file": tmp_path / "file"}
    monkeypatch.setattr(sys, "argv", ["run", "--out", str(tmp_path / "out"), *words.format(**places).split()])
    told = run.main(), capsys.readouterr().err.strip()
    assert told[0] == 2 and told[1].startswith(said.format(**places)) and len(told[1].splitlines()) == 1


@pytest.mark.parametrize("error", [ValueError("x: could not be written"), OSError("x: could not be written")])
def test_a_row_that_cannot_be_prepared_leaves_the_next_one_its_turn(monkeypatch, tmp_path, capsys, error):
    def prepare(directory, device):
        raise error

    def absent(directory, device):
        raise Absent("its turn")

    other = Row("other", "another", [MINE], [], absent)
    monkeypatch.setattr(run, "all_rows", lambda: {"toy": toy_row(MINE, prepare=prepare), "other": other})
    monkeypatch.setattr(sys, "argv", ["run", "toy", "other", "--out", str(tmp_path)])
    assert run.main() == 1
    told = capsys.readouterr()
    assert told.err.strip() == "toy: x: could not be written" and "other: passed over: its turn" in told.out


def test_a_tool_that_fails_while_a_row_is_prepared_is_heard():
    with pytest.raises(OSError, match="tools/reshard.py: --src is missing"):
        loading.run("reshard", dst="/nosuch")


def test_a_row_without_any_side_of_only_is_passed_over(monkeypatch, tmp_path, capsys):
    def prepare(directory, device):
        raise Absent("it was run")

    other = Row("other", "another", [FAST], [], prepare)
    monkeypatch.setattr(run, "all_rows", lambda: {"toy": toy_row(MINE, prepare=prepare), "other": other})
    monkeypatch.setattr(sys, "argv", ["run", "toy", "other", "--only", "fast", "--out", str(tmp_path)])
    assert run.main() == 0
    assert (
        "toy: passed over: it has none of the sides of --only\nother: passed over: it was run"
        in capsys.readouterr().out
    )


def test_a_home_directory_of_a_slash_is_no_name_for_every_slash(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    told = run.without_places({"table": "tokens/s", "file": "/scratch/x"}, Path("/scratch"))
    assert told == {"table": "tokens/s", "file": "SCRATCH/x"}


@pytest.fixture
def stored(monkeypatch, tmp_path):
    """What an earlier run left, and a function that runs the toy row with given results."""
    (tmp_path / "toy-cpu-2.json").write_text("earlier")
    (tmp_path / "toy-cpu-2.png").write_text("earlier")

    def start(printed, *words, sides=(MINE, FAST), limits=None):
        row = toy_row(*sides, goals=[Goal("peer", "speed", at_least=1.0)] * (len(sides) > 1))
        monkeypatch.setattr(run, "all_rows", lambda: {"toy": row})
        monkeypatch.setattr(run, "run_side", lambda side, *rest: printed[side.name])
        monkeypatch.setattr(run, "run_limits", lambda *a: limits or {"fp32_gflops": 1.0})
        monkeypatch.setattr(sys, "argv", ["run", "toy", "--out", str(tmp_path), *words])
        code = run.main()
        return code, (tmp_path / "toy-cpu-2.json").read_text()

    return start


def test_a_result_takes_the_place_of_the_earlier_one_picture_and_all(stored, tmp_path, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "matplotlib", None
    )  # without it there is no new picture: the old one is not this run's
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    code, text = stored({"mine": result(1.0), "fast": result(2.0)})
    assert code == 0 and json.loads(text)["goals"][0]["ratio"] == 2.0 and not (tmp_path / "toy-cpu-2.png").exists()


def test_where_nothing_finished_the_earlier_result_stays(stored, capsys):
    assert stored({"mine": {"error": "no"}, "fast": {"error": "no"}}) == (1, "earlier")
    told = capsys.readouterr()
    assert "toy: no side finished, nothing is written" in told.err and "failed: no" in told.out


def test_limits_that_were_not_measured_are_named(stored, capsys):
    stored({"mine": result(1.0), "fast": result(2.0)}, limits={"error": "no room"})
    assert "limits: not measured: no room" in capsys.readouterr().out


def test_a_result_of_some_sides_leaves_that_of_all(stored, tmp_path):
    assert stored({"mine": result(1.0)}, "--only", "mine") == (0, "earlier")
    assert json.loads((tmp_path / "toy-cpu-2-only.json").read_text())["command"].endswith("--only mine")


def test_a_full_disk_costs_neither_the_table_nor_the_earlier_result(stored, monkeypatch, capsys):
    real = Path.write_text

    def full(self, text):
        real(self, text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert stored({"mine": result(1.0), "fast": result(2.0)}) == (1, "earlier")
    told = capsys.readouterr()
    assert "| mine | 100 |" in told.out and "No space left on device: this result is only in the table" in told.err


def test_a_peers_environment_is_made_of_its_file_and_our_torch(monkeypatch, tmp_path):
    monkeypatch.setenv("BENCH_ENVS", str(tmp_path))
    assert peers.python_of("hf") == tmp_path / "hf" / "bin" / "python"
    assert peers.wanted("trl").splitlines()[0] == peers.torch_pin()
    assert "transformers==5.23.0" in peers.wanted("trl") and "trl==" in peers.wanted("trl")


def test_an_environment_counts_once_it_is_whole_and_of_this_file(monkeypatch, tmp_path):
    monkeypatch.setenv("BENCH_ENVS", str(tmp_path))
    assert peers.lack("hf") == "no environment hf: python -m bench.peers hf"
    peers.python_of("hf").parent.mkdir(parents=True)
    peers.python_of("hf").touch()
    assert peers.lack("hf") == "no environment hf: python -m bench.peers hf"  # pip is at work, or was killed
    (tmp_path / "hf" / peers.STAMP).write_text(peers.wanted("hf"))
    assert peers.lack("hf") is None
    (tmp_path / "hf" / peers.STAMP).write_text(peers.wanted("hf").replace("transformers==", "transformers==4"))
    assert "another bench/peers/hf.txt" in peers.lack("hf")
    printed = run.run_side(Side("hf", "hf", "x"), {}, "cpu", 1, tmp_path)
    assert printed == {"error": peers.lack("hf")}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(28, "No space left on device", "x")])
def test_an_environment_that_was_begun_does_not_stay(monkeypatch, tmp_path, error):
    def create(home, with_pip):
        home.mkdir()
        raise error

    monkeypatch.setenv("BENCH_ENVS", str(tmp_path))
    monkeypatch.setattr(peers.venv, "create", create)
    with pytest.raises(type(error)):
        peers.make("hf")
    assert not list(tmp_path.iterdir())


def test_peers_get_the_environment_that_was_given() -> None:
    """accessory's own settings, made when it is imported into this process, are no peer's."""
    code = "from pathlib import Path; import bench.run, accessory, os; assert 'THP_MEM_ALLOC_ENABLE' in os.environ; "
    code += "print('THP_MEM_ALLOC_ENABLE' in bench.run.environment('hf', 1, Path('.')))"
    given = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    told = subprocess.run(
        [sys.executable, "-c", code], env=given, cwd=run.ROOT, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == "False"
