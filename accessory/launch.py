"""torchrun with a quiet end: `python -m accessory.launch --nproc_per_node 8 -m accessory.main_finetune --lr 2e-5 ...`

Takes torchrun's own flags and starts the same agent. It differs in eight things:
  - a failed run ends with the one line of the rank that failed first, not with torchrun's traceback and table;
  - on several nodes every node ends with that line, and soon (nodes.py);
  - SIGTERM, SIGUSR1 (SLURM's --signal) and Ctrl-C are passed on and waited for, so that a run can save (torchrun kills it after
    30 s); a second ends it. Where one node is told, all save, and none ends as finished;
  - one-node runs take a free port by themselves, so two can share a machine;
  - OMP_NUM_THREADS is this machine's cores divided by the ranks (torchrun sets 1, which idles a CPU run);
  - glibc asks Linux for huge pages for its whole heap and keeps what a step frees, for speed and memory on a CPU (`heap`);
  - TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, without which torch 2.13 cannot restart or grow an elastic job;
  - a single rank of one of our programs has no agent, which would import torch first: it starts seconds earlier.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accessory import nodes

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ALONE, OURS = ["--nproc_per_node", "1", "-m"], "accessory.main_"
STOPPED = 128 + signal.SIGTERM  # what a program without an agent ends with where it was stopped and has saved
AT_ONCE = 1.0  # seconds in which a second signal is the first once more: srun and SLURM's daemon both send theirs
_told = 0.0  # when the first came


def main(argv: list[str]) -> int:
    """Runs torchrun's agent over `argv`. Returns the exit code: 0, or 1 after one line on stderr."""
    received: list[int] = []
    for number in nodes.STOPS:
        signal.signal(number, lambda number, frame: pass_on(number, received))
    os.environ.update(heap(os.environ))
    alone = argv[:3] == ALONE and "".join(argv[3:4]).startswith(OURS)
    alone = alone and not any(name.startswith("PET_") for name in os.environ)  # torchrun's flags too
    error = run_alone(argv[2:], received) if alone else run_agent(argv, received)
    if received:
        name = signal.Signals(received[0]).name
        print(f"stopped by {name}: the same command continues the run", file=sys.stderr, flush=True)
        return 128 + received[0]
    if error:
        print(f"\n{error}", file=sys.stderr, flush=True)  # a rank may have left a progress bar
        return 1
    return 0


def run_agent(argv: list[str], received: list[int]) -> str | None:
    """torchrun. Returns the line that a failed run ends with."""
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    loud = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = loud or "FATAL"  # of the agent, as its loggers below; torch reads it once
    from torch.distributed import DistError
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import get_args_parser, run

    if loud is None:  # the ranks say theirs
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    args = get_args_parser().parse_args(argv)
    one_node = args.nnodes in ("1", "1:1")
    if one_node and not any(a.startswith(("--rdzv", "--master", "--standalone")) for a in argv):
        args.standalone = True
    try:
        nodes.check(args, argv[: len(argv) - len(args.training_script_args)])
    except ValueError as error:
        return f"error: {error}"
    if args.nproc_per_node.isdigit():
        share_cores(int(args.nproc_per_node))
    for name in [
        n for n in logging.root.manager.loggerDict if n.startswith("torch.distributed")
    ]:  # each has a level of its own
        logging.getLogger(name).setLevel(logging.CRITICAL)
    args.signals_to_handle = "SIGHUP,SIGQUIT"
    others, theirs = nodes.Nodes(args), LocalElasticAgent._rendezvous

    def rendezvous(agent: LocalElasticAgent, group: Any) -> None:
        if received:  # or ranks that a signal ended would be started again
            raise SignalException("told to stop", received[0])
        others.meet(theirs, agent, group)

    LocalElasticAgent._rendezvous = rendezvous
    with tempfile.TemporaryDirectory(prefix="accessory-") as directory:
        os.environ["ACCESSORY_UNFINISHED"] = unfinished = str(Path(directory, "unfinished"))
        try:
            run(args)
            if os.path.exists(unfinished) and not received:  # another node, or a rank, was told
                received.append(signal.SIGTERM)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if received:
                return others.agree(f"error: stopped by {signal.Signals(received[0]).name}", certain=True)
            line = last_line(rank, failure.message, failure.exitcode)
            aborted = failure.exitcode == -signal.SIGABRT  # by NCCL's watchdog
            return others.agree(line, certain=not aborted and "its traceback is above" not in line)
        except SignalException as error:
            if others.reason is None and not received:
                received.append(error.sigval)
            return others.agree(f"error: stopped by {signal.Signals(error.sigval).name}", certain=True)
        except ValueError as error:  # of its flags
            return f"error: {error}"
        except (DistError, RendezvousError) as error:
            return others.reason or nodes.not_met(args, error)
        finally:
            others.over.set()
    return None


def run_alone(command: list[str], received: list[int]) -> str | None:
    """`python *command` as the only rank, which needs no store and no port to meet others. Returns as run_agent."""
    share_cores(1)
    with tempfile.TemporaryDirectory(prefix="accessory-") as directory:
        file = Path(directory, "error.json")
        process = subprocess.Popen(
            [sys.executable, "-u", *command], env=os.environ | {"TORCHELASTIC_ERROR_FILE": str(file)}
        )
        if received:  # before there was a process to pass it on to
            process.terminate()
        code = process.wait()
        if code == STOPPED and not received:
            received.append(signal.SIGTERM)
        message = json.loads(file.read_text())["message"] if file.exists() else None
    return last_line(0, message, code) if code else None


def share_cores(ranks: int) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores // ranks))


def heap(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that glibc (2.35 on) takes huge pages for the heap by and keeps freed memory, and torch takes no such pages of
    its own: it would begin each large tensor at one, between which holes remain. They count only where a process begins, so `import
    accessory` has to leave it to torch. docs/LOG.md, "Holes in the heap", ".. memory that is kept". Empty where the environment tells
    either something else, or Linux gives no such pages.
    """
    told = "GLIBC_TUNABLES" in environment or environment.get("THP_MEM_ALLOC_ENABLE", "1") != "1"
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        given = "[never]" not in HUGE_PAGES.read_text()
    except (OSError, ValueError):  # another system
        return {}
    if told or not given or name != "glibc" or [int(n) for n in version.split(".")[:2]] < [2, 35]:
        return {}
    malloc = {"hugetlb": 1}
    if not environment.keys() & {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}:
        # what one step frees, the next one takes: blocks up to a chunk of the loss (parallel/loss.py), which glibc would map anew
        # each time, and the heap's end, which it would give back
        malloc |= {"mmap_threshold": 2**27, "trim_threshold": 2**30}
    tunables = ":".join(f"glibc.malloc.{name}={n}" for name, n in malloc.items())
    return {"GLIBC_TUNABLES": tunables, "THP_MEM_ALLOC_ENABLE": "0"}


def pass_on(number: int, received: list[int]) -> None:
    """SIGTERM to every worker (also for a Ctrl-C, which they got too: one each is enough); SIGKILL at the second signal."""
    global _told
    if received and time.monotonic() - _told < AT_ONCE:
        return
    received.append(number)
    _told = time.monotonic()
    for task in Path("/proc/self/task").glob("*/children"):
        for worker in task.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(worker), signal.SIGTERM if len(received) == 1 else signal.SIGKILL)


def last_line(rank: int, message: Any, code: int) -> str:
    """What the rank that failed first said; for a rank that died without a word, how it died."""
    if isinstance(message, dict):
        message = message.get("message", json.dumps(message))
    if isinstance(message, str) and message.startswith("error: "):
        return message
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (often: out of memory)" if name == "SIGKILL" else ""
        return f"error: rank {rank} was ended by {name}{hint}: see its output above; the last complete checkpoint is intact"
    return f"error: rank {rank} failed with exit code {code}: its traceback is above"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
