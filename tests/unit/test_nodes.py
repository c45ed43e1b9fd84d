"""Two nodes, as two launchers on this machine over workers without torch: how each ends when one does. And flags for several nodes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed.run import get_args_parser

from accessory import nodes
from tests.helpers import ROOT

WORKER = """
import os, signal, sys, time
from accessory import config
rank, kind, directory = int(os.environ["RANK"]), sys.argv[1], sys.argv[2]
def wait_for(name):
    while not os.path.exists(f"{directory}/{name}"):
        time.sleep(0.02)
def leave(*_):
    open(f"{directory}/told", "w").close()
def main():
    signal.signal(signal.SIGTERM, leave)
    open(f"{directory}/pid-{rank}", "w").write(str(os.getpid()))
    wait_for(f"pid-{1 - rank}")
    if kind == "wrong" and rank == 1:
        raise ValueError("--lr -1: expected a rate above 0")
    if kind == "killed":
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("connection closed by peer")
    if kind == "wrong":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)  # as a rank that waits for another
    wait_for("told")  # all save when one is told
    config.leave_unfinished()
config.run(main, argv=[])
"""
LAUNCH = """
import sys
from accessory import launch, nodes
nodes.GRACE, nodes.SILENT = 1, 4
sys.exit(launch.main(sys.argv[1:]))
"""


def two_nodes(tmp_path: Path, kind: str, started: int = 2) -> list[subprocess.Popen]:
    (tmp_path / "worker.py").write_text(WORKER)
    free = socket.socket()
    free.bind(("127.0.0.1", 0))
    where = ["--master_addr", "127.0.0.1", "--master_port", str(free.getsockname()[1])]
    free.close()
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE")}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", LAUNCH, "--nnodes", "2", "--node_rank", str(node), *where, "--nproc_per_node", "1"]
            + ["-m", "worker", kind, str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(started)
    ]


def pids(tmp_path: Path) -> list[int]:
    for _ in range(600):
        files = [tmp_path / f"pid-{rank}" for rank in range(2)]
        if all(f.exists() and f.read_text() for f in files):
            return [int(f.read_text()) for f in files]
        time.sleep(0.1)
    raise AssertionError("the ranks did not begin")


def last_lines(launchers: list[subprocess.Popen]) -> list[str]:
    return [launcher.communicate(timeout=60)[1].splitlines()[-1] for launcher in launchers]


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("wrong", "--lr -1: expected a rate above 0"),
        ("killed", r"rank 1 was ended by SIGKILL \(often: out of memory\): .*"),
    ],
)
def test_every_node_ends_with_the_reason_of_the_one_that_failed(tmp_path: Path, kind: str, reason: str) -> None:
    launchers = two_nodes(tmp_path, kind)
    first, second = last_lines(launchers)
    assert re.fullmatch(f"error: on node 1 .*: {reason}", first)
    assert re.fullmatch(f"error: {reason}", second)
    assert [launcher.returncode for launcher in launchers] == [1, 1]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids(tmp_path))


def test_where_one_node_is_told_to_stop_none_ends_as_finished(tmp_path: Path) -> None:
    launchers = two_nodes(tmp_path, "stopped")
    pids(tmp_path)
    launchers[1].send_signal(signal.SIGUSR1)
    launchers[1].send_signal(signal.SIGTERM)  # srun and SLURM's daemon both send theirs
    first, second = last_lines(launchers)
    assert first == "stopped by SIGTERM: the same command continues the run"
    assert second == "stopped by SIGUSR1: the same command continues the run"
    assert [launcher.returncode for launcher in launchers] == [128 + signal.SIGTERM, 128 + signal.SIGUSR1]


def test_ranks_stop_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    launchers = two_nodes(tmp_path, "stopped")
    ranks = pids(tmp_path)
    launchers[0].kill()  # whose store is gone with it
    launchers[0].communicate()
    launchers[1].communicate(timeout=60)
    assert (tmp_path / "told").exists() and launchers[1].returncode == 128 + signal.SIGTERM
    ended = {psutil.STATUS_ZOMBIE, "gone"}  # who was its parent reaps no more
    for _ in range(100):
        if all((psutil.Process(p).status() if psutil.pid_exists(p) else "gone") in ended for p in ranks):
            return
        time.sleep(0.1)
    raise AssertionError("a rank is left over")


def test_a_node_that_waits_for_the_others_says_so_and_can_be_stopped(tmp_path: Path) -> None:
    """torch waits for ten minutes, in which no handler of Python's is called."""
    [launcher] = two_nodes(tmp_path, "stopped", started=1)
    assert launcher.stderr.readline().startswith("waiting for the others of 2 nodes at --master_addr 127.0.0.1")
    launcher.terminate()
    assert launcher.wait(10) == -signal.SIGTERM


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--nnodes two", "--nnodes two: expected the number of nodes, or MIN:MAX"),
        ("--nnodes 0", "--nnodes 0: expected the number of nodes"),
        ("--nnodes 2", "--nnodes 2: --master_addr is missing"),
        ("--nnodes 2 --node_rank 1", "--nnodes 2: --master_addr is missing"),
        ("--nnodes 2 --master_addr localhost", "--nnodes 2: --node_rank is missing"),
        ("--nnodes 2 --master_addr localhost --node_rank 2", "--node_rank 2: expected 0 to 1, there are 2 nodes"),
        ("--nnodes 1:2 --master_addr localhost", "--nnodes 1:2: an elastic job wants --rdzv_backend c10d"),
        ("--nnodes 2 --master_addr localhost --max_restarts 1", "--max_restarts 1: several nodes start again together"),
        ("--nnodes 2 --master-addr no-such-host.invalid --node-rank=0", "--master_addr no-such-host.invalid: "),
        ("--nnodes 1:2 --rdzv_backend c10d --rdzv_endpoint no-such-host.invalid:1", "--rdzv_endpoint no-such-host.inv"),
        ("--nnodes 2 --master_addr localhost --node_rank 1", None),
        ("--nnodes 2 --master_addr ::1 --node-rank 1", None),
        ("--nnodes 1:2 --rdzv_backend c10d --rdzv_endpoint localhost:29400", None),
        ("--nnodes 1", None),
    ],
)
def test_flags_that_would_be_waited_with_in_vain(monkeypatch, flags: str, said: str | None) -> None:
    monkeypatch.setattr(nodes, "RESOLVE", 0)
    given = flags.split()
    args = get_args_parser().parse_args([*given, "worker.py", "--node_rank", "1"])
    if said is None:
        nodes.check(args, given)
    else:
        with pytest.raises(ValueError, match=re.escape(said)):
            nodes.check(args, given)


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        flags = ["--nnodes", "2", "--node_rank", "0", "--master_addr", "127.0.0.1"]
        flags += ["--master_port", str(taken.getsockname()[1]), "-m", "worker"]
        done = subprocess.run(
            [sys.executable, "-c", LAUNCH, *flags],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
    line = done.stderr.splitlines()[-1]
    assert (
        done.returncode == 1 and line.startswith("error: --master_addr 127.0.0.1 --master_port ") and "in use" in line
    )
