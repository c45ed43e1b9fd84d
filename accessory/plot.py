"""The course of one or several runs: read from metrics.jsonl, as a sketch in the terminal or as a picture.

    output/<exp>/metrics.jsonl -> Run: {panel: [(step, value)]} -> sketch: lines of plain ASCII, no package needed
                                                                -> draw: .png or .svg, with matplotlib

Nothing of a run is written to; it may still be going on. Test: tests/unit/test_plot.py
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

PANELS = {"loss": "loss", "val_loss": "validation loss", "lr": "learning rate", "tokens_per_second": "tokens / second"}
NOISY = ("loss", "tokens_per_second")  # what --smooth smooths
KINDS = (".png", ".svg")
MARKS = "*o+x#%@&"  # of the runs, in their order; the next run begins anew
HEIGHT, LEAST_WIDTH = 10, 40  # of a sketch's panel, in characters
LABEL = 10  # characters left of its axis

Series = list[tuple[int, float]]


@dataclass
class Run:
    name: str
    series: dict[str, Series]  # of PANELS, those that it has; steps rise


def read_runs(paths: list[str]) -> list[Run]:
    """Raises ValueError naming the path that is no run or has nothing to show. Equal names are told apart by their paths."""
    if not paths:
        raise ValueError("no run is named: give a run directory, or several with commas between")
    files = [Path(p) if Path(p).is_file() else Path(p) / "metrics.jsonl" for p in paths]
    names = [file.resolve().parent.name for file in files]
    return [Run(n if names.count(n) == 1 else p, read(p, f)) for n, p, f in zip(names, paths, files)]


def read(given: str, file: Path) -> dict[str, Series]:
    """The panels of one metrics.jsonl. A torn line and what is no finite number are passed over; of a step that is there
    twice the later counts."""
    if not file.is_file():
        raise ValueError(f"{given}: no metrics.jsonl there: give a run's directory (its --output_dir)")
    found: dict[str, dict[int, float]] = {name: {} for name in PANELS}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            continue
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            continue
        for name, points in found.items():
            value = record.get(name)
            if type(value) in (int, float) and math.isfinite(value):
                points[record["step"]] = float(value)
    series = {name: sorted(points.items()) for name, points in found.items() if points}
    if not series:
        raise ValueError(f"{file}: nothing to show yet: no line in it has a step and one of {', '.join(PANELS)}")
    return series


def smoothed(series: Series, count: int) -> Series:
    """Each value as the mean of it and of those before it, `count` in all: fewer at the beginning."""
    values = [value for _, value in series]
    means = [math.fsum(values[max(0, i + 1 - count) : i + 1]) / min(i + 1, count) for i in range(len(values))]
    return [(step, mean) for (step, _), mean in zip(series, means)]


# --- in the terminal --------------------------------------------------------------------------------------------------


def sketch(runs: list[Run], width: int, smooth: int = 1) -> list[str]:
    """Lines of at most `width` characters (or LEAST_WIDTH): a panel for each figure that some run has, and the legend."""
    lines = []
    for name, title in PANELS.items():
        count = smooth if name in NOISY else 1
        drawn = {i: smoothed(run.series[name], count) for i, run in enumerate(runs) if name in run.series}
        if drawn:
            lines += [title, *panel(drawn, max(LEAST_WIDTH, width) - LABEL - 2), ""]
    return lines + [f"{MARKS[i % len(MARKS)]} {run.name}: {summary(run)}" for i, run in enumerate(runs)]


def panel(drawn: dict[int, Series], columns: int) -> list[str]:
    """One diagram of {number of the run: series}. A column shows the mean of the steps that fall into it."""
    steps, values = zip(*[point for series in drawn.values() for point in series])
    first, last = min(steps), max(steps)
    cells = {i: binned(series, first, last, columns) for i, series in drawn.items()}
    means = [value for columns_ in cells.values() for value in columns_.values()]
    low, high = min(means), max(means)
    rows = [[" "] * columns for _ in range(HEIGHT)]
    for i, means_ in cells.items():
        for column, value in means_.items():
            at = (value - low) / (high - low) if high > low else 0.5
            rows[HEIGHT - 1 - round(at * (HEIGHT - 1))][column] = MARKS[i % len(MARKS)]
    labels = {0: high, HEIGHT - 1: low} if high > low else {HEIGHT - 1 - round(0.5 * (HEIGHT - 1)): low}
    body = [
        f"{number(labels[row]) if row in labels else '':>{LABEL}} |" + "".join(cells_).rstrip()
        for row, cells_ in enumerate(rows)
    ]
    axis = " " * (LABEL + 1) + "+" + "-" * columns
    ends = f"{first}" if first == last else f"{first}{f'step {last}':>{columns - len(str(first))}}"
    return [*body, axis, " " * (LABEL + 2) + ends]


def binned(series: Series, first: int, last: int, columns: int) -> dict[int, float]:
    """{column: mean of the values whose steps fall into it}; `first` is in the first column, `last` in the last."""
    found: dict[int, list[float]] = {}
    for step, value in series:
        column = round((step - first) / (last - first) * (columns - 1)) if last > first else 0
        found.setdefault(column, []).append(value)
    return {column: math.fsum(values) / len(values) for column, values in found.items()}


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def summary(run: Run) -> str:
    """A run in a few words: how far it is, and first, last and best losses."""
    parts = [f"step {max(series[-1][0] for series in run.series.values())}"]
    if "loss" in run.series:
        losses = run.series["loss"]
        parts.append(f"loss {number(losses[0][1])} -> {number(losses[-1][1])}")
    if "val_loss" in run.series:
        step, best = min(run.series["val_loss"], key=lambda point: (point[1], point[0]))
        parts.append(f"val_loss {number(run.series['val_loss'][-1][1])}, best {number(best)} at step {step}")
    return ", ".join(parts)


# --- as a picture -----------------------------------------------------------------------------------------------------


def draw(runs: list[Run], out: str | Path, smooth: int = 1) -> None:
    """Writes the picture, whole or not at all; the same runs give the same SVG. Raises ValueError for another kind than
    KINDS and where matplotlib is missing."""
    out = Path(out)
    if out.suffix.lower() not in KINDS:
        raise ValueError(f"--out {out}: end it in {' or '.join(KINDS)}")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            f"--out {out}: pictures need matplotlib: pip install -c constraints.txt matplotlib; without --out there is a sketch"
        ) from None
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "accessory"}):
        figure = Figure(figsize=(11, 7), layout="constrained")
        for axes, (name, title) in zip(figure.subplots(2, 2).flat, PANELS.items()):
            drawn = [(i, run.series.get(name, [])) for i, run in enumerate(runs)]
            _draw_panel(axes, drawn, title, smooth if name in NOISY else 1)
        handles = [figure.axes[0].plot([], [], color=f"C{i % 10}")[0] for i in range(len(runs))]
        figure.legend(handles, [_label(run.name) for run in runs], loc="outside lower center", ncols=min(4, len(runs)))
        kind = out.suffix.lower()[1:]
        try:
            figure.savefig(part, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
            os.replace(part, out)
        finally:
            part.unlink(missing_ok=True)


def _draw_panel(axes, drawn: list[tuple[int, Series]], title: str, smooth: int) -> None:
    for i, series in drawn:
        if not series:
            continue
        color, marker = f"C{i % 10}", "." if len(series) < 40 else None
        if smooth > 1:
            axes.plot(*zip(*series), color=color, alpha=0.25, linewidth=0.8)
        axes.plot(*zip(*smoothed(series, smooth)), color=color, marker=marker, linewidth=1.3)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if not any(series for _, series in drawn):
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color="gray")


def _label(name: str) -> str:
    """A run's name as plain text: matplotlib would set what is between $ as mathematics."""
    return name.replace("$", r"\$")
