"""Where a run stands, as plain JSON, and the small parts of the loop: late reading, a step's line, randomness, signals.

    validation -> state.note: best of all | best N of the checkpoints (never retired) | validations without improvement

Test: tests/unit/test_stop.py
"""

import dataclasses
import hashlib
import math
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accessory import log

MAX_SKIPPED_IN_A_ROW = 20


@dataclass
class TrainState:
    """Position of a run. With the weights and the optimizer's moments it is all that resuming needs."""

    step: int = 0  # optimizer steps done
    epoch: int = 0
    window: int = 0  # windows of this epoch done
    tokens: int = 0  # tokens seen, over all dp ranks
    supervised_tokens: int = 0
    skipped_steps: int = 0  # steps whose gradient was not finite
    best: float | None = None  # of --metric, larger is better: a loss with a minus
    best_step: int | None = None
    metric: str | None = None  # what best, ranked and stale speak of
    ranked: list[list] = field(default_factory=list)  # [value, step] of the best checkpoints, best first; never step 0
    stale: int = 0  # validations in a row that were no better than the best
    metrics: dict[str, float] = field(default_factory=dict)  # the last validation
    validated_at: int | None = None  # its step
    loss_scale: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)  # what the order of samples depends on; checked on resume

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "TrainState":
        """Also of a state that was saved when only the one best step was written down: its checkpoint stays the best."""
        state = cls(**content)
        if "ranked" not in content:
            state.ranked = [[state.best, state.best_step]] if state.best_step else []
            state.validated_at = state.step if state.metrics else None
        return state

    @property
    def best_steps(self) -> list[int]:
        """The best checkpoints, best first; of equal ones the earlier."""
        return [step for _, step in self.ranked]

    def advance(self, tokens: int, supervised: int, windows: int) -> None:
        """One step further, over so many tokens; `windows`: of an epoch."""
        self.step += 1
        self.window += 1
        self.tokens += tokens
        self.supervised_tokens += supervised
        if self.window == windows:
            self.epoch, self.window = self.epoch + 1, 0

    def judge_by(self, metric: str) -> None:
        """By another metric than before, nothing is known of what was better."""
        if self.metric not in (None, metric):
            self.forget_best()
        self.metric = metric

    def forget_best(self) -> None:
        """The values to come cannot be compared with those that were."""
        self.best, self.best_step, self.ranked, self.stale = None, None, [], 0

    def note(self, metrics: dict[str, float], keep: int) -> None:
        """A validation at this step. What is equal to the best is no improvement, and NaN never is one; step 0 is a best
        to be beaten, and no checkpoint. `keep`: how many best checkpoints are ranked."""
        assert self.metric is not None, "judge_by comes first"
        self.metrics, self.validated_at = metrics, self.step
        value = metrics[self.metric] if self.metric == "val_accuracy" else -metrics[self.metric]
        self.stale += self.step > 0
        if math.isnan(value):
            return
        if self.best is None or value > self.best:
            self.best, self.best_step, self.stale = value, self.step, 0
        if self.step:
            self.ranked = sorted([*self.ranked, [value, self.step]], key=lambda r: (-r[0], r[1]))[:keep]


def reseed(seed: int, step: int, dp_rank: int) -> None:
    """Randomness of one optimizer step, from (seed, step, dp rank) and never the mp rank.

    Replicated activations get equal dropout masks, nothing needs saving, and a resumed run draws what an unbroken one would."""
    digest = hashlib.sha256(f"{seed} {step} {dp_rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Late:
    """A small device tensor on its way to the host: started after one step, read after the next, so nothing waits."""

    def __init__(self, tensor: Tensor):
        self.event = None
        if tensor.is_cuda:
            self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.host.copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host = tensor.clone()

    def read(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()


class StopSignal:
    """SIGTERM, SIGINT and SIGUSR1 (SLURM's --signal reaches every process) as a flag, looked at between steps: the run saves and
    leaves. A second SIGINT is immediate."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Stopwatch:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        return seconds


class StepLines:
    """metrics.jsonl's lines of the steps, and the bar; each written when its figures have come from the device."""

    def __init__(self, run_log: log.RunLog, state: TrainState, logging_steps: int, max_steps: int):
        self.run_log, self.state, self.every, self.max_steps = run_log, state, logging_steps, max_steps
        self.clock, self.tokens, self.seconds = Stopwatch(), 0, 0.0  # since the last line

    def lap(self) -> float:
        """Seconds since the last call: what a line's speed counts is between two of them."""
        return self.clock.lap()

    def write(self, late: Late, record: dict[str, Any]) -> None:
        """A finished step's line. `late`: loss, gradient norm, steps skipped in all and in a row. Raises ValueError where the run
        no longer learns."""
        loss, norm, skipped, row = late.read()
        self.state.skipped_steps = int(skipped)
        step = record["step"]
        if row >= MAX_SKIPPED_IN_A_ROW:
            raise ValueError(
                f"step {step}: the gradient was not finite for {int(row)} steps in a row; lower --lr, or train in bf16 or fp32 (--precision)"
            )
        self.tokens += record.pop("window_tokens")
        self.seconds += record.pop("seconds")
        if step % self.every and step != self.max_steps:
            return
        speed, memory = self.tokens / max(self.seconds, 1e-9), log.peak_memory_gb()
        self.tokens, self.seconds = 0, 0.0
        record |= {"loss": loss, "grad_norm": norm, "tokens_per_second": round(speed, 2)}
        record |= {"memory_gb": round(memory, 3), "skipped_steps": int(skipped)}
        self.run_log.write(record)
        shown = {"loss": f"{loss:.4f}", "lr": f"{record['lr']:.2e}", "tokens/s": f"{speed:.0f}", "GB": f"{memory:.1f}"}
        self.run_log.step(step, shown)
