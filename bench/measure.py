"""Used inside every side, also in the peers' environments: stdlib and torch only.

    work = measure.begin()                                  WORK.json of argv[1]; threads set; the memory meter started
    timed = measure.timed(step, warmup=2, units=5, device)  step() once a unit -> seconds, cpu_seconds, peak_mb
    measure.report(loss=[..], tokens=n, **timed, more={})   the last line of stdout

CPU time is of the whole process with its threads, not of its children. Memory on the CPU is the resident set (VmHWM; ru_maxrss
would count the process that started this one), on a GPU what torch's allocator held. `python -m bench.measure WORK.json`
measures the limits: GEMM rate in fp32 and bf16 at "gemms", the rate of a copy, and of one into fresh memory.
Test: tests/unit/test_bench.py
"""

import gc
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any, Callable

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
GEMMS = [(1024, 1024, 1024)]  # where a row names none
COPY_BYTES = 256 * 2**20


def begin() -> dict[str, Any]:
    """WORK.json: data, settings, device, threads. Sets torch's threads."""
    work = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(work["threads"])
    return work


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def sync(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def peak_mb(device: str = "cpu") -> float:
    """The largest memory since the process began, or since `reset_peak`."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e6
    return _status_kb("VmHWM") * 1024 / 1e6


def now_mb(device: str = "cpu") -> float:
    return torch.cuda.memory_allocated() / 1e6 if device != "cpu" else _status_kb("VmRSS") * 1024 / 1e6


def _status_kb(key: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(key + ":"))


def reset_peak(device: str = "cpu") -> None:
    """From here on `peak_mb` is what is used from here on (where /proc may not be written: since the process began)."""
    gc.collect()
    if device != "cpu":
        return torch.cuda.reset_peak_memory_stats()
    try:
        CLEAR.write_text("5")
    except OSError:
        pass


class Laps:
    """Seconds and CPU seconds between calls of `lap`, for programs whose loop is not ours to call: the first call starts it."""

    def __init__(self, device: str = "cpu"):
        self.device, self.seconds, self.cpu, self.last = device, [], [], None

    def lap(self) -> None:
        sync(self.device)
        now = time.perf_counter(), cpu_seconds()
        if self.last is not None:
            self.seconds.append(now[0] - self.last[0])
            self.cpu.append(now[1] - self.last[1])
        self.last = now

    def result(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "cpu_seconds": self.cpu, "peak_mb": peak_mb(self.device)}


def timed(step: Callable[[], Any], warmup: int, units: int, device: str = "cpu") -> dict[str, Any]:
    """step() `warmup` times untimed, then `units` times: seconds, cpu_seconds, peak_mb (of the timed ones), as `report` wants."""
    for _ in range(warmup):
        step()
    sync(device)
    reset_peak(device)
    laps = Laps(device)
    laps.lap()
    for _ in range(units):
        step()
        laps.lap()
    return laps.result()


def report(
    *,
    loss: list[float],
    tokens: float,
    seconds: list[float],
    cpu_seconds: list[float],
    peak_mb: float,
    more: dict[str, float] | None = None,
) -> None:
    """Prints the result, the last line of a side."""
    sys.stderr.flush()
    result = {"loss": [float(x) for x in loss], "tokens": tokens, "seconds": seconds, "cpu_seconds": cpu_seconds}
    print("\n" + json.dumps(result | {"peak_mb": peak_mb, "more": more or {}}), flush=True)


# --- the machine's limits ---------------------------------------------------------------------------------------------


def gemm_rate(shapes: list[tuple[int, int, int]], dtype: torch.dtype, device: str = "cpu", clock=None) -> float:
    """GFLOP a second over products (m, k) x (k, n) of random numbers, one after the other; the best of three passes."""
    clock = clock or time.perf_counter
    pairs = [
        (torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)) for m, k, n in shapes
    ]
    flops, best = sum(2 * m * k * n for m, k, n in shapes), float("inf")
    repeat = min(200, max(1, int(2e10 / flops))) if device == "cpu" else 10
    for _ in range(4):
        sync(device)
        start = clock()
        for _ in range(repeat):
            for a, b in pairs:
                torch.mm(a, b.t())
        sync(device)
        best = min(best, clock() - start)
    return flops * repeat / best / 1e9


def copy_rate(device: str = "cpu", clock=None) -> float:
    """GB a second read and written by a copy."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _least(lambda: target.copy_(source), device, clock) / 1e9


def fresh_rate(clock=None) -> float:
    """GB a second of the host's memory that are asked for, written by a copy and kept, a GB in all and once, as weights are:
    what no program escapes that has to put several files together."""
    clock, source = clock or time.perf_counter, torch.ones(COPY_BYTES // 4)
    start = clock()
    kept = [source.clone() for _ in range(4)]
    return len(kept) * COPY_BYTES / (clock() - start) / 1e9


def _least(call: Callable[[], Any], device: str, clock=None) -> float:
    """Seconds of the shortest of five calls."""
    clock, best = clock or time.perf_counter, float("inf")
    for _ in range(5):
        sync(device)
        start = clock()
        call()
        sync(device)
        best = min(best, clock() - start)
    return best


def main() -> None:
    work = begin()
    device, shapes = work["device"], [tuple(s) for s in work["data"].get("gemms", GEMMS)]
    clock = cpu_seconds if device == "cpu" and work["threads"] == 1 else None
    rates = {k: gemm_rate(shapes, d, device, clock) for k, d in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    rates = {f"{k}_gflops": v for k, v in rates.items()} | {"copy_gb_per_s": copy_rate(device, clock)}
    print("\n" + json.dumps(rates | ({"fresh_gb_per_s": fresh_rate(clock)} if device == "cpu" else {})))


if __name__ == "__main__":
    main()
