"""A run's directory: one run's at a time, the same on every node, and the checkpoint in it that is continued.

    claim -> find_start ... claim_shared, before weights are read

Test: tests/unit/test_stop.py, tests/dist/test_directory.py
"""

import contextlib
import fcntl
import os
import socket
import time
import uuid
from pathlib import Path
from typing import IO

from accessory import log
from accessory.checkpoint import resume
from accessory.parallel import groups
from accessory.train.start import RunArgs

SEEN_WITHIN = (
    30  # seconds in which a node sees what another wrote: network file systems keep what was not there in mind
)
LOCK = ".lock"  # in a run's directory
_claimed: dict[Path, IO] = {}  # by this process, until it ends


def claim(directory: Path, make: bool = False) -> None:
    """Takes a run's directory for this process: two runs in it would delete each other's checkpoints. Rank 0 only.

    Raises ValueError where another process has it, or where it cannot be made."""
    try:
        if make:
            directory.mkdir(parents=True, exist_ok=True)
        elif not directory.is_dir():
            return
    except OSError as error:
        raise ValueError(f"--output_dir {directory}: {error.strerror}: choose one that can be written to") from None
    if directory.resolve() in _claimed:
        return
    try:
        lock = open(directory / LOCK, "a")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"--output_dir {directory}: another run is writing there: wait for it to end, or choose another directory"
        ) from None
    except OSError:  # a file system without locks; one that cannot be written says so soon enough
        return
    _claimed[directory.resolve()] = lock


def claim_shared(directory: Path) -> None:
    """Makes the run's directory and takes it, and sees that it is one on all nodes. Every rank calls it: before weights are read, not
    at the first save, of which each node would have its own ranks' files on its disk, and none a whole checkpoint."""

    def ours() -> None:
        claim(directory, make=True)
        for left in directory.glob(".seen-*"):  # by a run that was killed just here
            left.unlink()

    groups.from_first_rank(ours)
    seen, wrong = directory / groups.broadcast_object(f".seen-{uuid.uuid4().hex[:8]}"), None
    try:
        if groups.rank() == 0:
            seen.touch()
    except OSError as error:
        wrong = unwritable(directory, error)
    groups.together(wrong)
    try:
        if groups.rank() > 0:
            wait_for(seen)
            mine = seen.with_name(f"{seen.name}-{groups.rank()}")
            mine.touch()
            mine.unlink()
    except FileNotFoundError:
        wrong = ValueError(
            f"--output_dir {directory}: on {socket.gethostname()} it is not the directory that rank 0 writes to: name one on storage that the nodes share, every rank writes its part of a checkpoint there"
        )
    except OSError as error:
        wrong = unwritable(directory, error)
    try:
        groups.together(wrong)
    finally:
        if groups.rank() == 0:
            seen.unlink(missing_ok=True)


def unwritable(directory: Path, error: OSError) -> ValueError:
    return ValueError(
        f"--output_dir {directory}: {error.strerror} on {socket.gethostname()}: choose one that can be written to from every node"
    )


def wait_for(path: Path) -> None:
    """Until it is there; FileNotFoundError where it does not come. What another node has made may be seen some seconds later."""
    end = time.monotonic() + SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > end:
            raise FileNotFoundError(path)
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # asks the server anew
        time.sleep(0.2)


def find_start(run: RunArgs, directory: Path) -> Path | None:
    """The checkpoint to continue from, None to start. Raises ValueError when output_dir holds a run that nobody asked about,
    or another process writes there."""
    groups.from_first_rank(lambda: claim(directory))
    if run.resume is not None and not run.overwrite_output_dir:
        found, passed_over = groups.from_first_rank(lambda: resume.find(directory, run.resume))  # it hashes every file
        for wrong in passed_over:
            log.say(f"--resume auto: passed over a damaged checkpoint: {wrong}", groups.rank())
        return None if found is None else seen_here(found, directory)
    groups.from_first_rank(lambda: check_unused(run, directory))
    return None


def check_unused(run: RunArgs, directory: Path) -> None:
    if run.overwrite_output_dir or not (resume.steps(directory) or (directory / "metrics.jsonl").exists()):
        return
    raise ValueError(
        f"--output_dir {directory} already holds a run: continue it with --resume auto, choose another, or start anew with --overwrite_output_dir true"
    )


def seen_here(found: Path, directory: Path) -> Path:
    """The checkpoint that rank 0 found, as this rank names it: its --output_dir may have another name. Every rank calls it."""
    inside = groups.broadcast_object(found.parent == directory.resolve())
    here, wrong = directory.resolve() / found.name if inside else found, None
    try:
        wait_for(here / resume.MANIFEST)
    except FileNotFoundError:
        wrong = ValueError(
            f"{here} is not there on {socket.gethostname()}, where rank 0 goes on from it: the nodes must share --output_dir, and what --resume names"
        )
    groups.together(wrong)
    return here
