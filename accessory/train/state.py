"""Where a run stands, as plain JSON, and the small clocks of the loop: late reading, randomness, signals."""

import dataclasses
import hashlib
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class TrainState:
    """Position of a run. With the weights and the optimizer's moments it is all that resuming needs."""

    step: int = 0  # optimizer steps done
    epoch: int = 0
    window: int = 0  # windows of this epoch done
    tokens: int = 0  # tokens seen, over all dp ranks
    supervised_tokens: int = 0
    skipped_steps: int = 0  # steps whose gradient was not finite
    best: float | None = None  # of --metric
    best_step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # the last validation
    loss_scale: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)  # what the order of samples depends on; checked on resume

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "TrainState":
        return cls(**content)


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
    """SIGTERM and SIGINT as a flag, looked at between steps: the run saves and leaves. A second SIGINT is immediate."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}

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
