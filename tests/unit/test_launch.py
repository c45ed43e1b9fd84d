"""accessory.launch, over workers without torch: how a run ends, of several ranks under torchrun's agent and of one without it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from accessory import launch as launcher
from tests.helpers import ROOT

WORKER = """
import os, signal, sys, time
from accessory import config
rank, world, kind = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), sys.argv[1]
last = rank == world - 1
if kind == "one wrong beside a bar" and rank == 0:
    os.write(2, b"\\rtokenise:   0%|          | 0/30")
open(f"{sys.argv[2]}/pid-{rank}", "w").write(str(os.getpid()))
open(f"{sys.argv[2]}/heap-{rank}", "w").write(os.environ.get("GLIBC_TUNABLES", ""))
os.write(1, f"rank {rank} of {world} threads {os.environ['OMP_NUM_THREADS']}\\n".encode())  # in one piece
while not all(os.path.exists(f"{sys.argv[2]}/pid-{r}") for r in range(world)):
    time.sleep(0.01)
def work():
    if kind == "both wrong" or kind.startswith("one wrong") and last:
        raise ValueError("--lr -1: expected a rate above 0")
    if kind == "bug" and rank == 0:
        raise KeyError("ours")
    if kind == "killed" and last:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind.startswith("stopped"):
        def leave(*_):
            open(f"{sys.argv[2]}/saved-{rank}", "w").close()
            sys.exit(0) if world > 1 else config.leave_unfinished()
        signal.signal(signal.SIGTERM, leave)
        open(f"{sys.argv[2]}/ready-{rank}", "w").close()
    if kind != "fine":
        time.sleep(60)
try:
    work()
except ValueError as error:
    config.fail(error)
"""
LAUNCH = """
import sys
from accessory import launch
launch.OURS = "worker"
code = launch.main(sys.argv[1:])
print("agent" if "torch" in sys.modules else "no agent")
sys.exit(code)
"""


def launch(tmp_path: Path, kind: str, world: int) -> subprocess.Popen:
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    argv = ["--nproc_per_node", str(world), "-m", "worker", kind, str(tmp_path)]
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *argv],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def alive(tmp_path: Path, world: int) -> list[int]:
    """Ranks whose process is still there."""
    pids = [int(p.read_text()) for p in sorted(tmp_path.glob("pid-*"))]
    assert len(pids) == world
    return [rank for rank, pid in enumerate(pids) if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "kind, code, last, traceback",
    [
        ("fine", 0, None, False),
        ("both wrong", 1, r"error: --lr -1: expected a rate above 0", False),
        ("one wrong", 1, r"error: --lr -1: expected a rate above 0", False),
        ("one wrong beside a bar", 1, r"error: --lr -1: expected a rate above 0", False),
        ("bug", 1, r"error: rank 0 failed with exit code 1: its traceback is above", True),
        ("killed", 1, r"error: rank LAST was ended by SIGKILL \(often: out of memory\): .*", False),
    ],
)
def test_a_run_ends_with_one_line(
    tmp_path: Path, kind: str, code: int, last: str | None, traceback: bool, world: int
) -> None:
    process, start = launch(tmp_path, kind, world), time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and alive(tmp_path, world) == [], err
    assert time.monotonic() - start < 50
    threads = max(1, len(os.sched_getaffinity(0)) // world)
    told = [f"rank {r} of {world} threads {threads}" for r in range(world)]
    assert sorted(out.splitlines()) == sorted([*told, "agent" if world > 1 else "no agent"])
    lines = [line for line in err.splitlines() if line and "|" not in line]  # the message begins a line of its own
    assert ("Traceback" in err) == traceback
    if traceback:
        assert lines[-2] == "KeyError: 'ours'"
    else:
        assert len(lines) == (1 if last else 0), err
    assert last is None or re.fullmatch(last.replace("LAST", str(world - 1)), lines[-1]), err


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_workers(tmp_path: Path, world: int, number: signal.Signals) -> None:
    process = launch(tmp_path, "stopped", world)
    wait_for(tmp_path, "ready-*", world)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert len(list(tmp_path.glob("saved-*"))) == world and alive(tmp_path, world) == []
    assert process.returncode == 128 + number
    assert err.splitlines() == [f"stopped by {number.name}: the same command continues the run"]


def test_a_single_rank_that_is_stopped_by_itself_is_not_taken_for_finished(tmp_path: Path) -> None:
    process = launch(tmp_path, "stopped", 1)
    wait_for(tmp_path, "ready-*", 1)
    os.kill(int((tmp_path / "pid-0").read_text()), signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert err.splitlines() == ["stopped by SIGTERM: the same command continues the run"]


def wait_for(tmp_path: Path, pattern: str, count: int) -> None:
    for _ in range(600):
        if len(list(tmp_path.glob(pattern))) == count:
            return
        time.sleep(0.1)


def test_the_heap_gets_huge_pages_where_nothing_else_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pages, version = tmp_path / "enabled", ["glibc 2.36"]
    pages.write_text("always [madvise] never\n")
    monkeypatch.setattr(launcher, "HUGE_PAGES", pages)
    monkeypatch.setattr(os, "confstr", lambda name: version[0])
    pages_alone = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "THP_MEM_ALLOC_ENABLE": "0"}
    kept = ":glibc.malloc.mmap_threshold=134217728:glibc.malloc.trim_threshold=1073741824"
    ours = pages_alone | {"GLIBC_TUNABLES": pages_alone["GLIBC_TUNABLES"] + kept}
    for told in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        assert launcher.heap({told: "1048576"}) == pages_alone
    assert (
        launcher.heap({}) == launcher.heap({"THP_MEM_ALLOC_ENABLE": "1"}) == ours
    )  # 1: what importing accessory has set
    assert launcher.heap({"THP_MEM_ALLOC_ENABLE": "0"}) == launcher.heap({"GLIBC_TUNABLES": "x"}) == {}
    for version[0] in ("glibc 2.34", "musl 1.2", None):
        assert launcher.heap({}) == {}
    version[0] = "glibc 3.0"
    assert launcher.heap({}) == ours
    pages.write_text("always madvise [never]\n")
    assert launcher.heap({}) == {}
    pages.unlink()
    assert launcher.heap({}) == {}


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_have_them(tmp_path: Path, world: int) -> None:
    process = launch(tmp_path, "fine", world)
    assert process.wait(60) == 0, process.communicate()
    process.communicate()
    expected = launcher.heap(os.environ).get("GLIBC_TUNABLES", os.environ.get("GLIBC_TUNABLES", ""))
    assert [(tmp_path / f"heap-{rank}").read_text() for rank in range(world)] == [expected] * world
