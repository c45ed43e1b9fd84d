"""Where a run's time goes: a line at the end of every run, and --profile_steps for every kernel of a few steps.

    Phases    data | forward | backward | communication | optimizer | other     ... and evaluation, saving, profile
              marks between them: the clock on the CPU, events on a GPU, read when they are long past: no step waits
    Profile   output/<exp>/profile/  trace_rank0.json.gz  memory_rank0.pickle (GPU only)

Forward and backward hold what FSDP and the model-parallel layers exchange meanwhile, as far as computing did not hide it;
communication is what the loop itself sums over ranks, and waits for there. A trace tells them apart.
Test: tests/unit/test_profile.py
"""

import contextlib
import errno
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

from accessory import log
from accessory.flags import parse_steps
from accessory.parallel import groups

PHASES = ("data", "forward", "backward", "communication", "optimizer", "evaluation", "saving", "profile", "other")
EMPTY = 200  # bytes: no trace packs as small as this


class Phases:
    """Seconds by phase. What lies between two marks belongs to the second one's phase: nothing is left out or counted twice."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.steps = device.type == "cuda", 0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.unread: deque[tuple[str, Any, Any]] = deque()
        self.last = self._now()

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, phase: str) -> None:
        """What was done since the last mark was this."""
        now = self._now()
        if self.on_gpu:
            self.unread.append((phase, self.last, now))
        else:
            self.seconds[phase] += now - self.last
        self.last = now

    def step(self) -> None:
        """A step is done. Reads the events that the GPU has passed."""
        self.steps += 1
        while self.unread and self.unread[0][2].query():
            phase, start, end = self.unread.popleft()
            self.seconds[phase] += start.elapsed_time(end) / 1000

    def record(self) -> dict[str, Any]:
        """The whole, at the end: {"steps", "seconds": {phase: seconds}}. Waits for the GPU."""
        if self.unread:
            self.unread[-1][2].synchronize()
        self.steps -= 1
        self.step()
        return {"steps": self.steps, "seconds": {name: round(s, 4) for name, s in self.seconds.items()}}


def time_line(record: dict[str, Any], ranks: int) -> str:
    """What `Phases.record` says, in words."""
    seconds = record["seconds"]
    total = max(sum(seconds.values()), 1e-9)
    parts = ", ".join(f"{name} {s:.2f} s ({s / total:.1%})" for name, s in seconds.items() if s >= 0.0005 * total)
    note = "; what layers and FSDP exchange is within forward and backward" if ranks > 1 else ""
    return f"time: {total:.1f} s for {record['steps']} step(s): {parts}{note}"


def check_steps(text: str | None, max_steps: int) -> None:
    """Raises ValueError when the run has no such steps."""
    if text is not None and parse_steps(text)[1] > max_steps:
        raise ValueError(f"--profile_steps {text}: the run has {max_steps} step(s): name some of them")


def profile_of(text: str | None, directory: Path, step: int, rank: int) -> "Profile | None":
    """What records the steps `text` of a run that stands at `step`; None where there are none."""
    if text is None:
        return None
    first, last = parse_steps(text)
    if step >= last:
        log.say(f"--profile_steps {text}: the run is already at step {step}, nothing is recorded", rank)
        return None
    return Profile(directory / "profile", first, last, rank)


def _on_gpu() -> bool:
    return groups.device().type == "cuda"


class Profile:
    """torch.profiler over the steps first to last, both included, into `directory`: one set of files a rank."""

    def __init__(self, directory: Path, first: int, last: int, rank: int):
        self.directory, self.first, self.last, self.rank = directory, first, last, rank
        self.profiler: torch.profiler.profile | None = None
        self.range: torch.profiler.record_function | None = None
        self.started_at = 0

    def after(self, step: int) -> None:
        """Step `step` is done; also called once before the run's first."""
        if self.range is not None:
            self.range.__exit__(None, None, None)
            self.range = None
        if self.profiler is not None and step >= self.last:
            self.stop(step)
        if self.profiler is None and self.first <= step + 1 <= self.last:
            self._start(step + 1)
        if self.profiler is not None:
            self.range = torch.profiler.record_function(f"step {step + 1}")
            self.range.__enter__()

    def _start(self, step: int) -> None:
        from torch.profiler import ProfilerActivity as Activity

        kinds = [Activity.CPU] + [Activity.CUDA] * _on_gpu()
        if _on_gpu():
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        self.started_at = step
        self.profiler = torch.profiler.profile(activities=kinds, profile_memory=True)
        self.profiler.start()

    def stop(self, step: int) -> None:
        """Writes what there is, where the profiler is at work; at the end of a run, says where it never was."""
        if self.profiler is None:
            if not self.started_at:
                steps = f"--profile_steps {self.first}:{self.last}"
                log.say(f"{steps}: the run ended at step {step}, nothing is recorded", self.rank)
            return
        if self.range is not None:
            self.range.__exit__(None, None, None)
            self.range = None
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        try:
            memory = self._write(profiler)
        except OSError as error:  # a full disk, mostly: the run is worth more than a look at it
            log.say(f"profile of steps {self.started_at} to {step}: {self.directory}: not written: {error.strerror}")
            return
        log.say(
            f"profile of steps {self.started_at} to {step}: {self.directory}: open trace_rank*.json.gz at https://ui.perfetto.dev or "
            f"chrome://tracing; {memory}",
            self.rank,
        )

    def _write(self, profiler: torch.profiler.profile) -> str:
        """Says where the memory's snapshot is. Raises OSError, and leaves no file that is written in part."""
        trace, memory = (
            self.directory / f"{n}_rank{self.rank}.{end}" for n, end in (("trace", "json.gz"), ("memory", "pickle"))
        )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(trace))
            # torch writes it to the temporary directory first, and is silent if it cannot
            if trace.stat().st_size < EMPTY:
                raise OSError(errno.ENOSPC, f"it did not fit into {tempfile.gettempdir()}, where torch writes it first")
            if not _on_gpu():
                return "a snapshot of memory is for GPUs only"
            torch.cuda.memory._dump_snapshot(str(memory))
            return f"{memory.name} at https://pytorch.org/memory_viz"
        except OSError:
            for file in (trace, memory):
                with contextlib.suppress(OSError):
                    file.unlink()
            raise
        finally:
            if _on_gpu():
                torch.cuda.memory._record_memory_history(enabled=None)
