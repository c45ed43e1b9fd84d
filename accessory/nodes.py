"""Several nodes: wrong flags are said before anyone waits for anyone, and every node ends with the reason of the one that failed.

    a node whose ranks failed:  its line -> the store of torchrun's agents, kept until the others have read it
    every other node:           looks there each second; gives its ranks GRACE seconds, then ends them -> the same line, and whose

Without it a node whose ranks wait for the first meeting waits for the process group's 30 minutes, and one that is in the middle of
a step ends with a traceback about a lost connection. Elastic jobs (--nnodes MIN:MAX) are left alone: there the others go on.
Test: tests/unit/test_nodes.py
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from argparse import Namespace
from typing import Any

GRACE = 10  # seconds for ranks to end by themselves: one may be publishing a checkpoint, or writing its traceback
WORD = 5  # seconds that a node whose ranks only lost a connection waits for the reason, and node 0 for its readers
SILENT = 15  # seconds of waiting for other nodes before that is said
EXIT = 30  # seconds that finished nodes wait for each other, not torch's 300: their ranks have met, whoever is missing was killed
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
RESOLVE = 60  # seconds that a host's name may take to become known, as in clusters that make nodes and names together
LOST = "; where that is about a connection or a peer, another node ended first: see its output. The last complete checkpoint is intact"
REASON, READ = "accessory/reason", "accessory/read"


def check(args: Namespace, given: list[str]) -> None:
    """torchrun's flags for several nodes, `given` as they were written. Raises ValueError for what would be waited for in vain."""
    try:
        least, _, most = args.nnodes.partition(":")
        least, most = int(least), int(most or least)
    except ValueError:
        least = most = 0
    if not 1 <= least <= most:
        raise ValueError(f"--nnodes {args.nnodes}: expected the number of nodes, or MIN:MAX for an elastic job")
    if most == 1 or args.standalone:
        return
    if args.rdzv_backend == "static":
        names = {word.partition("=")[0].replace("-", "_") for word in given}
        if least != most:
            raise ValueError(
                f"--nnodes {args.nnodes}: an elastic job wants --rdzv_backend c10d --rdzv_endpoint HOST:PORT, the same on every node, instead of --master_addr"
            )
        if (
            args.max_restarts
        ):  # torch's store keeps what the first attempt left there: they would wait for each other for ever
            raise ValueError(
                f"--max_restarts {args.max_restarts}: several nodes start again together only with --rdzv_backend c10d --rdzv_endpoint HOST:PORT, the same on every node, instead of --master_addr"
            )
        if not (names & {"__master_addr", "__rdzv_endpoint"} or "PET_MASTER_ADDR" in os.environ):
            raise ValueError(
                f"--nnodes {args.nnodes}: --master_addr is missing (MASTER_ADDR of exps/*.sh): name the host of node 0, the same on every node"
            )
        if not ("__node_rank" in names or "PET_NODE_RANK" in os.environ):
            raise ValueError(
                f"--nnodes {args.nnodes}: --node_rank is missing (NODE_RANK of exps/*.sh): 0 on the host of --master_addr, 1 to {most - 1} on the others"
            )
        if not 0 <= args.node_rank < most:
            raise ValueError(
                f"--node_rank {args.node_rank}: expected 0 to {most - 1}, there are {most} nodes (--nnodes)"
            )
    host, _, _ = args.rdzv_endpoint.rpartition(":") if args.rdzv_endpoint else (args.master_addr, "", "")
    resolve(host.strip("[]"), "--rdzv_endpoint" if args.rdzv_endpoint else "--master_addr")


def resolve(host: str, flag: str) -> None:
    """Waits until the host's name is known. torch would try for ten minutes, and speak of sockets."""
    end, told = time.monotonic() + RESOLVE, False
    while host:
        try:
            socket.getaddrinfo(host, None)
            return
        except socket.gaierror as error:
            if time.monotonic() > end:
                raise ValueError(
                    f"{flag} {host}: {error.strerror} on {socket.gethostname()}: give a name or address that every node can resolve"
                ) from None
        if not told:
            told = True
            say(f"{flag} {host}: not known here yet, trying for {RESOLVE} s")
        time.sleep(1)


def not_met(args: Namespace, error: Exception) -> str:
    """The line for agents that did not find each other."""
    reason, where = f"{error}".strip().partition("\n")[0], place(args)
    if "EADDRINUSE" in reason:
        return f"error: {where}: the port is in use on {socket.gethostname()}, by another job or a second node with this --node_rank: choose another --master_port (MASTER_PORT), the same on every node"
    return f"error: {where}: not all of {args.nnodes} nodes met there ({reason}): start every node with the same address, port and --nnodes, each with a --node_rank of its own, and see that the port can be reached from all"


def place(args: Namespace) -> str:
    return (
        f"--rdzv_endpoint {args.rdzv_endpoint}"
        if args.rdzv_endpoint
        else f"--master_addr {args.master_addr} --master_port {args.master_port}"
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Nodes:
    """What this node's agent and the others' tell each other. One for each launcher."""

    def __init__(self, args: Namespace):
        self.args, self.reason, self.over = args, None, threading.Event()
        self.store: Any = None
        self.node, self.count, self.read = 0, 1, False

    def meet(self, rendezvous: Any, agent: Any, group: Any) -> None:
        """`rendezvous(agent, group)`, torchrun's own; says that it waits where that takes long."""
        waiting = threading.Timer(SILENT, self.say_waiting)
        waiting.daemon = True
        waiting.start()
        # torch waits where no handler of Python's is called, and there is nothing to be saved: a signal ends it
        handlers = {number: signal.signal(number, signal.SIG_DFL) for number in STOPS}
        try:
            rendezvous(agent, group)
        finally:
            waiting.cancel()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        agent._exit_barrier_timeout = EXIT
        self.node, self.count = group.group_rank, group.group_world_size
        if self.store is None and self.count > 1 and ":" not in self.args.nnodes:
            self.store = agent._store.clone()  # a connection of its own: the agent's may be busy waiting
            threading.Thread(target=self.watch, daemon=True).start()

    def say_waiting(self) -> None:
        say(
            f"waiting for the others of {self.args.nnodes} nodes at {place(self.args)}; all have to be started with these"
        )

    def watch(self) -> None:
        """Ends this node's ranks where another's have failed."""
        while not self.over.wait(1):
            if (reason := self.look()) is not None:
                self.reason = reason  # now: the node that tells it waits for its readers no longer than WORD
                break
        else:
            return
        if self.over.wait(GRACE):
            return
        os.kill(os.getpid(), signal.SIGHUP)  # the agent ends its ranks
        if not self.over.wait(2 * GRACE):  # it waits inside torch, where no signal is heard
            for task in os.listdir("/proc/self/task"):
                with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/children") as children:
                    for child in children.read().split():
                        os.kill(int(child), signal.SIGKILL)
            say(f"\n{reason}")
            os._exit(1)

    def look(self) -> str | None:
        """The reason that some node has told. None where there is none, or nobody to ask any more."""
        with contextlib.suppress(RuntimeError):
            if self.store.check([REASON]):
                told = json.loads(self.store.get(REASON))
                self.confirm()
                if told["node"] != self.node:
                    return f"error: on node {told['node']} ({told['host']}): {told['line'].removeprefix('error: ')}"
        return None

    def confirm(self) -> None:
        if not self.read:
            self.read = True
            self.store.add(READ, 1)

    def agree(self, line: str, certain: bool) -> str:
        """The line that this node, whose ranks have failed, ends with. `certain`: it is a reason, not a lost connection, which
        is what ranks of other nodes see of one that failed."""
        self.over.set()
        if self.store is None:
            return line
        told, end = self.reason, time.monotonic() + WORD
        while not certain and told is None and time.monotonic() < end:
            told = self.look()
            time.sleep(0.1)
        with contextlib.suppress(RuntimeError):
            mine = {"node": self.node, "host": socket.gethostname(), "line": line}
            if told is None:
                self.store.compare_set(REASON, "", json.dumps(mine))  # the first one's stays
            self.confirm()
            end = time.monotonic() + WORD
            while self.node == 0 and self.store.add(READ, 0) < self.count and time.monotonic() < end:
                time.sleep(0.1)  # the store ends with this process
        return told or line + ("" if certain else LOST)
