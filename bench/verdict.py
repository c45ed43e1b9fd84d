"""From what the sides printed to ratios, goals and a table. Pure functions of plain data; nothing is run here.

A `result` is one process's JSON object, or {"error": ".."}; `rounds` = [{side name: result}, ..], one dict a round.
Of a peer's grid the fastest side that did the same work stands for it; a failed or a differing side never wins.
Test: tests/unit/test_bench.py
"""

import math
import statistics
from typing import Any

from bench.rows import ANY, ITSELF, OURS, TOLERANCE, Goal, Row, Side

Result = dict[str, Any]
Rounds = list[dict[str, Result]]


def seconds_of(result: Result, clock: str) -> float:
    """Of one unit: the median over the process's units."""
    return statistics.median(result[clock])


def value(result: Result, metric: str, clock: str) -> float:
    """`metric` (see Goal) of one process. Raises KeyError where it did not report it."""
    if metric == "seconds":
        return seconds_of(result, clock)
    if metric == "speed":
        return result["tokens"] / seconds_of(result, clock)
    return result["peak_mb"] if metric == "peak_mb" else result["more"][metric]


def good(rounds: Rounds, side: Side) -> list[Result]:
    """What the side printed, all rounds; [] if one of its processes failed or it was not run."""
    results = [r[side.name] for r in rounds if side.name in r]
    return [] if any("error" in r for r in results) else results


def disagreement(row: Row, rounds: Rounds, side: Side) -> str | None:
    """Why this side's result does not count, or None: a loss that is no number, or not ours. Held against the first own side of its
    precision whose losses are numbers, else the first such. The sides of a row without goals do different work."""
    for result in good(rounds, side):
        if wrong := _not_finite(result):
            return wrong
    own = [s for s in row.sides if s.env == OURS and good(rounds, s) and not any(map(_not_finite, good(rounds, s)))]
    reference = next((s for s in own if s.precision == side.precision), own[0] if own else None)
    if reference is None or reference is side or not good(rounds, side) or not row.goals:
        return None
    for ours, theirs in zip(good(rounds, reference), good(rounds, side)):
        a, b = ours["loss"], theirs["loss"]
        if a and not b:
            return "no losses"
        for step, (x, y) in enumerate(zip(a, b)):
            if abs(x - y) > TOLERANCE[side.precision]:
                return f"loss of step {step + 1} is {y:.4f}, {reference.name} has {x:.4f}"
        if len(a) != len(b):
            return f"losses of {len(b)} step(s), {reference.name} has {len(a)}"
    return None


def _not_finite(result: Result) -> str | None:
    wrong = (f"loss of step {i + 1} is {x}" for i, x in enumerate(result["loss"]) if not math.isfinite(x))
    return next(wrong, None)


def best(row: Row, rounds: Rounds, peer: str, clock: str) -> Side | None:
    """The fastest side of a peer that finished every round and did the same work."""
    named = [s for s in row.sides if (s.env != OURS if peer == ANY else s.peer == peer)]
    able = [s for s in named if good(rounds, s) and (disagreement(row, rounds, s)) is None]
    speed = {s.name: statistics.median(value(r, "speed", clock) for r in good(rounds, s)) for s in able}
    return max(able, key=lambda s: speed[s.name], default=None)


def add_shares(row: Row, rounds: Rounds, clock: str, limits: dict[str, float], flops: float | None) -> None:
    """more.of_gemm of every result: the share of the GEMM rate that its arithmetic took."""
    for side in row.sides:
        kinds = ("fp32", "bf16") if side.precision == "bf16" else ("fp32",)  # a product of 16 bit may be taken in fp32
        rate = max(limits.get(f"{kind}_gflops", 0) for kind in kinds)
        for result in good(rounds, side) if rate and flops else []:
            result["more"]["of_gemm"] = value(result, "speed", clock) * flops / rate / 1e9


def ratios(rounds: Rounds, ours: Side, theirs: Side, metric: str, clock: str) -> list[float]:
    """ours / theirs, round by round: neighbours in time are compared."""
    pairs = [(r[ours.name], r[theirs.name]) for r in rounds if ours.name in r and theirs.name in r]
    return [value(a, metric, clock) / value(b, metric, clock) for a, b in pairs]


def judge(row: Row, rounds: Rounds, clock: str) -> list[dict[str, Any]]:
    """One entry a goal: the ratio (median of the rounds), whether it is met; met None: there was nothing to compare with."""
    return [_judged(row, rounds, goal, clock) for goal in row.goals]


def _judged(row: Row, rounds: Rounds, goal: Goal, clock: str) -> dict[str, Any]:
    ours = best(row, rounds, goal.ours, clock)
    theirs = ours if goal.peer == ITSELF else best(row, rounds, goal.peer, clock)
    entry: dict[str, Any] = {"goal": str(goal), "ours": ours and ours.name, "peer": theirs and theirs.name}
    if ours is None or theirs is None:
        missing = goal.ours if ours is None else goal.peer
        return entry | {"ratio": None, "met": None, "why": f"no result of {missing}"}
    try:
        if goal.peer == ITSELF:
            each = [value(r, goal.metric, clock) for r in good(rounds, ours)]
        else:
            each = ratios(rounds, ours, theirs, goal.metric, clock)
    except KeyError as error:
        return entry | {"ratio": None, "met": None, "why": f"{error} was not reported"}
    except ZeroDivisionError:
        return entry | {"ratio": None, "met": None, "why": f"{goal.metric} of {theirs.name} is 0"}
    ratio = statistics.median(each)
    return entry | {"ratio": ratio, "each": each, "met": goal.met(ratio)}


def table(row: Row, rounds: Rounds, clock: str) -> list[str]:
    """The row in Markdown, after `add_shares`: a line a side with its figures (medians of the rounds), then a line a goal."""
    unit = "CPU s" if clock == "cpu_seconds" else "s"
    lines = [f"| side | tokens/{unit} | ms a unit ({unit}) | of GEMM | peak MB | loss |", "|---|---|---|---|---|---|"]
    for side in row.sides:
        results = [r[side.name] for r in rounds if side.name in r]
        if not results:
            continue
        if error := next((r["error"] for r in results if "error" in r), None):
            lines.append(f"| {side.name} | failed: {_cell(error)} | | | | |")
            continue
        speed, seconds, peak = (
            statistics.median(value(r, m, clock) for r in results) for m in ("speed", "seconds", "peak_mb")
        )
        shares = [r["more"]["of_gemm"] for r in results if "of_gemm" in r["more"]]
        share = f"{statistics.median(shares):.0%}" if shares else ""
        loss = results[0]["loss"]
        what = disagreement(row, rounds, side)
        said = f"other result: {_cell(what)}" if what else f"{loss[0]:.4f}" if loss else ""
        lines.append(f"| {side.name} | {speed:,.4g} | {seconds * 1e3:,.4g} | {share} | {peak:,.0f} | {said} |")
    lines += ["", "| goal | measured | of the rounds | |", "|---|---|---|---|"]
    for entry in judge(row, rounds, clock):
        if entry["ratio"] is None:
            lines.append(f"| {entry['goal']} | {entry['why']} | | open |")
            continue
        ratio, least, most = (_figure(x) for x in (entry["ratio"], min(entry["each"]), max(entry["each"])))
        sides = entry["ours"] if entry["peer"] == entry["ours"] else f"{entry['ours']} / {entry['peer']}"
        met = "met" if entry["met"] else "missed"
        lines.append(f"| {entry['goal']} | {ratio} ({sides}) | {least} to {most} | {met} |")
    return lines


def _figure(x: float) -> str:
    return f"{x:.2f}" if x < 1000 else f"{x:,.0f}"


def _cell(text: str) -> str:
    return text.replace("|", "/")[:160]
