"""torchrun with a quiet end: `python -m accessory.launch --nproc_per_node 8 -m accessory.main_finetune --lr 2e-5 ...`

Takes torchrun's own flags and starts the same agent. It differs in five things:
  - a failed run ends with the one line of the rank that failed first, not with torchrun's traceback and table;
  - SIGTERM and Ctrl-C are passed on and waited for, so that a run can save (torchrun kills it after 30 s); a second ends it;
  - one-node runs take a free port by themselves, so two can share a machine;
  - OMP_NUM_THREADS is this machine's cores divided by the ranks (torchrun sets 1, which idles a CPU run);
  - TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, without which torch 2.13 cannot restart or grow an elastic job.
"""

import contextlib
import json
import logging
import os
import signal
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    """Runs torchrun's agent over `argv`. Returns the exit code: 0, or 1 after one line on stderr."""
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    args = get_args_parser().parse_args(argv)
    one_node = args.nnodes in ("1", "1:1")
    if one_node and not any(a.startswith(("--rdzv", "--master", "--standalone")) for a in argv):
        args.standalone = True
    if args.nproc_per_node.isdigit() and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores // int(args.nproc_per_node)))
    for name in [
        n for n in logging.root.manager.loggerDict if n.startswith("torch.distributed")
    ]:  # each has a level of its own
        logging.getLogger(name).setLevel(logging.CRITICAL)
    received: list[int] = []
    args.signals_to_handle = "SIGHUP,SIGQUIT"
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: pass_on(number, received))
    try:
        run(args)
    except ChildFailedError as error:
        if not received:
            print(f"\n{last_line(error)}", file=sys.stderr, flush=True)  # another rank may have left a progress bar
            return 1
    except SignalException as error:
        received.append(error.sigval)
    if received:
        print(
            f"stopped by {signal.Signals(received[0]).name}: the same command continues the run",
            file=sys.stderr,
            flush=True,
        )
        return 128 + received[0]
    return 0


def pass_on(number: int, received: list[int]) -> None:
    """SIGTERM to every worker (also for a Ctrl-C, which they got too: one each is enough); SIGKILL at the second signal."""
    received.append(number)
    for task in Path("/proc/self/task").glob("*/children"):
        for worker in task.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(worker), signal.SIGTERM if len(received) == 1 else signal.SIGKILL)


def last_line(error) -> str:
    """The message of the rank that failed first; for a rank that died without a word, how it died."""
    rank, failure = error.get_first_failure()
    message = failure.message
    if isinstance(message, dict):
        message = message.get("message", json.dumps(message))
    if isinstance(message, str) and message.startswith("error: "):
        return message
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = " (often: out of memory)" if name == "SIGKILL" else ""
        return f"error: rank {rank} was ended by {name}{hint}: see its output above; the last complete checkpoint is intact"
    return f"error: rank {rank} failed with exit code {failure.exitcode}: its traceback is above"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
