"""What a row of the benchmark is made of. A module of this package describes one workload, or a few of one kind, and imports
nothing heavy at its top:

    ROW = Row("head_loss", "head and loss, forward and backward", sides=[Side(..), ..], goals=[Goal(..)], prepare=prepare)

(or ROWS = [Row(..), Row(..)]). bench/run.py runs it; bench/verdict.py judges. Sides that are ours have env OURS.

What a side prints as its last line, one JSON object:
    loss         the first steps' losses, for the agreement check ([] in a row that has none on any side)
    tokens       useful tokens (or whatever is counted) of one timed unit
    seconds, cpu_seconds   of each timed unit
    peak_mb      largest memory while units were timed (bench/measure.py)
    more         numbers by name; a goal may name one
"""

from dataclasses import dataclass, field, replace
from typing import Any, Callable

OURS = "ours"
ANY, ITSELF = (
    "any peer",
    "itself",
)  # for Goal.peer: the fastest of all that are not ours; no other side, the figure alone
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}  # largest difference of a loss between sides that did the same


class Absent(Exception):
    """Raised by `prepare` where something that the row needs is not on this machine: the row is passed over."""


def wants_gpu(device: str) -> None:
    """Raises Absent on a CPU."""
    if device == "cpu":
        raise Absent("a GPU: --device cuda")


@dataclass(frozen=True)
class Side:
    """One program with one set of settings. Sides of one `peer` are its grid: the fastest of them stands for it."""

    name: str  # no spaces or commas: --only NAME
    env: str  # OURS, or a peer of bench/peers
    program: str  # bench/sides/PROGRAM.py
    settings: dict[str, Any] = field(default_factory=dict)
    peer: str = ""  # what goals call it; "": the name
    precision: str = "fp32"  # its losses are held against the first own side of the same precision, with its TOLERANCE

    def __post_init__(self) -> None:
        assert self.precision in TOLERANCE and not set(self.name) & set(" ,"), self
        object.__setattr__(self, "peer", self.peer or self.name)


@dataclass(frozen=True)
class Goal:
    """ours / peer of a metric: at_least or at_most so much; of ITSELF the metric, not a ratio.

    metric: "speed" (tokens a second), "seconds" (of a unit), "peak_mb", "of_gemm" (the share of the GEMM rate of the same run),
    or a name in `more`. Time is CPU time in a run with --threads 1 on the CPU, wall time otherwise. `peer` and `ours` name
    sides by their `peer`."""

    peer: str
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    ours: str = OURS

    def __post_init__(self) -> None:
        assert (self.at_least is None) != (self.at_most is None), self

    def met(self, ratio: float) -> bool:
        return ratio >= self.at_least if self.at_least is not None else ratio <= self.at_most

    def __str__(self) -> str:
        wants = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        return f"{self.ours}{'' if self.peer == ITSELF else f' / {self.peer}'}, {self.metric} {wants}"


@dataclass(frozen=True)
class Row:
    """`prepare(directory, device)` makes what all sides read and returns it as plain JSON (WORK.json's "data"); two keys of it
    are read by run.py: "gemms", (m, k, n) of products whose rate is the limit, and "flops_per_token"."""

    name: str
    what: str
    sides: list[Side]
    goals: list[Goal]
    prepare: Callable[[Any, str], dict[str, Any]]
    gpu_goals: list[Goal] | None = None  # in the place of the others on a GPU

    def __post_init__(self) -> None:
        groups = {s.peer for s in self.sides} | {ANY, ITSELF}
        assert len({s.name for s in self.sides}) == len(self.sides), self.name
        for goal in [*self.goals, *(self.gpu_goals or [])]:
            assert {goal.peer, goal.ours} <= groups, f"{self.name}: {goal}: sides are {sorted(groups)}"

    def on(self, device: str) -> "Row":
        """With the goals that hold there."""
        return self if device == "cpu" or self.gpu_goals is None else replace(self, goals=self.gpu_goals)
