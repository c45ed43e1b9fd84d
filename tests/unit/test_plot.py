"""Curves of runs: what is read, the sketch cell by cell, pictures read back, and the tool as it is typed."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from accessory.plot import HEIGHT, LABEL, Run, binned, draw, panel, read_runs, sketch, smoothed, summary
from tests.helpers import ROOT
from tools import plot_run

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(directory: Path, steps: int = 20, scale: float = 1.0, validates: bool = True) -> Path:
    directory.mkdir(parents=True)
    with open(directory / "metrics.jsonl", "w") as out:
        for step in range(steps + 1):
            if step:
                line = {"step": step, "loss": scale * 4 / step, "lr": 1e-3 * (1 - step / steps), "grad_norm": 1.0}
                print(json.dumps(line | {"tokens_per_second": 20000.0 + step}), file=out)
            if validates and step % 5 == 0:
                print(json.dumps({"step": step, "val_loss": scale * abs(step - 10) / 10 + 1}), file=out)
    return directory


# --- reading ----------------------------------------------------------------------------------------------------------


def test_what_is_read(tmp_path):
    [run] = read_runs([str(write_run(tmp_path / "a"))])
    assert run.name == "a" and set(run.series) == {"loss", "val_loss", "lr", "tokens_per_second"}
    assert run.series["loss"] == [(step, 4 / step) for step in range(1, 21)]
    assert run.series["val_loss"] == [(0, 2.0), (5, 1.5), (10, 1.0), (15, 1.5), (20, 2.0)]
    assert read_runs([str(tmp_path / "a" / "metrics.jsonl")]) == [run]


def test_damage_is_passed_over_and_the_later_of_two_lines_counts(tmp_path):
    lines = [
        '{"step": 1, "loss": 3}',
        '{"step": 2, "loss": NaN}',
        '{"step": 3, "loss": "x"}',
        "[1]",
        "null",
        "\x00\xff",
    ]
    lines += ['{"loss": 1}', '{"step": "4", "loss": 1}', '{"step": true, "loss": 1}', '{"step": 5, "loss": true}']
    lines += [
        "[" * 100000,
        '{"step": 6, "loss": Infinity}',
        '{"step": 0, "loss": 9}',
        '{"step": 1, "loss": 2}',
        '{"step": 7, "lo',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_runs([str(tmp_path)])[0].series == {"loss": [(0, 9.0), (1, 2.0)]}


def test_what_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 1, "grad_norm": 2}\n')
    with pytest.raises(ValueError, match="nowhere: no metrics.jsonl there: give a run's directory"):
        read_runs([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="empty/metrics.jsonl: nothing to show yet"):
        read_runs([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="no run is named"):
        read_runs([])
    [run] = read_runs([str(write_run(tmp_path / "a"))])
    for name in ("a.gif", "a", "png"):
        with pytest.raises(ValueError, match=r"end it in .png or .svg"):
            draw([run], tmp_path / name)


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [str(write_run(tmp_path / x / "run")) for x in "ab"] + [str(write_run(tmp_path / "c"))]
    assert [run.name for run in read_runs(paths)] == [*paths[:2], "c"]


def test_smoothing_is_a_mean_of_what_came_before():
    series = [(10, 1.0), (20, 3.0), (30, 8.0), (40, 0.0)]
    assert smoothed(series, 1) == series
    assert smoothed(series, 2) == [(10, 1.0), (20, 2.0), (30, 5.5), (40, 4.0)]
    assert smoothed(series, 99) == [(10, 1.0), (20, 2.0), (30, 4.0), (40, 3.0)]


def test_summary(tmp_path):
    [run] = read_runs([str(write_run(tmp_path / "a"))])
    assert summary(run) == "step 20, loss 4 -> 0.2, val_loss 2, best 1 at step 10"
    assert summary(Run("x", {"lr": [(3, 0.1)]})) == "step 3"


# --- the sketch -------------------------------------------------------------------------------------------------------


def marks(lines: list[str]) -> dict[str, list[tuple[int, int]]]:
    """{mark: [(column, height from below)]} of a panel."""
    found: dict[str, list[tuple[int, int]]] = {}
    for row, line in enumerate(lines[:HEIGHT]):
        assert line[LABEL + 1] == "|"
        for column, mark in enumerate(line[LABEL + 2 :]):
            if mark != " ":
                found.setdefault(mark, []).append((column, HEIGHT - 1 - row))
    return {mark: sorted(cells) for mark, cells in found.items()}


def test_a_line_goes_from_corner_to_corner():
    lines = panel({0: [(step, float(step)) for step in range(HEIGHT)]}, HEIGHT)
    assert marks(lines) == {"*": [(i, i) for i in range(HEIGHT)]}
    assert lines[0].startswith("9 |".rjust(LABEL + 2)) and lines[HEIGHT - 1].startswith("0 |".rjust(LABEL + 2))
    assert lines[HEIGHT] == " " * (LABEL + 1) + "+" + "-" * HEIGHT


def test_two_runs_share_both_axes():
    lines = panel({0: [(0, 0.0), (50, 10.0)], 1: [(50, 5.0), (100, 20.0)]}, 41)
    assert marks(lines) == {"*": [(0, 0), (20, 4)], "o": [(20, 2), (40, 9)]}
    assert lines[-1].split() == ["0", "step", "100"]


def test_many_steps_in_a_column_are_their_mean():
    assert binned([(0, 1.0), (1, 3.0), (999, 5.0), (1000, 7.0)], 0, 1000, 11) == {0: 2.0, 10: 6.0}
    assert binned([(7, 1.0)], 7, 7, 11) == {0: 1.0}


def test_one_value_is_in_the_middle():
    lines = panel({0: [(3, 0.5)]}, 40)
    [(column, height)] = marks(lines)["*"]
    assert column == 0 and 0 < height < HEIGHT - 1 and [line for line in lines if "0.5 |" in line]
    assert lines[-1].strip() == "3"


def test_the_sketch_fits_its_width_and_names_all(tmp_path):
    runs = read_runs([str(write_run(tmp_path / "a")), str(write_run(tmp_path / "b", 30, 2.0, validates=False))])
    for width in (1, 60, 120):
        lines = sketch(runs, width)
        assert max(map(len, lines[:-2])) == max(width, 40) and all(line.isascii() for line in lines)
        assert [line for line in lines if line in ("loss", "validation loss", "learning rate", "tokens / second")] == [
            "loss",
            "validation loss",
            "learning rate",
            "tokens / second",
        ]
        assert lines[-2].startswith("* a: step 20") and lines[-1].startswith("o b: step 30")
    only = sketch([Run("x", {"lr": [(1, 0.1), (2, 0.2)]})], 60)
    assert "loss" not in only and only[0] == "learning rate"
    noisy = Run("x", {"loss": [(1, 0.0), (2, 4.0)], "val_loss": [(1, 0.0), (2, 4.0)]})
    ends = [line.split()[0] for line in sketch([noisy], 60, smooth=2) if line.endswith("*")]
    assert ends == ["2", "0", "4", "0"], "the validation loss is shown as it is"


# --- the picture ------------------------------------------------------------------------------------------------------


def texts(svg: Path) -> list[str]:
    return [e.text for e in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    names = ["plain", "_hidden", "a$b$_{c", "<&> Größe"]
    runs = read_runs([str(write_run(tmp_path / name, 10 + i)) for i, name in enumerate(names)])
    draw(runs, tmp_path / "out.PNG")
    assert (tmp_path / "out.PNG").read_bytes().startswith(PNG)
    draw(runs, tmp_path / "out.svg", smooth=3)
    found = [text.strip() for text in texts(tmp_path / "out.svg")]
    assert all(word in found for word in [*names, "loss", "validation loss", "learning rate", "tokens / second"])
    assert "no data" not in found
    once = (tmp_path / "out.svg").read_bytes()
    draw(runs, tmp_path / "out.svg", smooth=3)
    assert (tmp_path / "out.svg").read_bytes() == once
    draw([Run("x", {"loss": [(1, 2.0)]})], tmp_path / "few.svg")
    assert texts(tmp_path / "few.svg").count("no data") == 3
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_every_value_is_on_the_curve(tmp_path, monkeypatch):
    """What matplotlib is given is what was logged: the picture's axes are asked."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    kept, original = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), original(self, *a, **k)))
    runs = read_runs([str(write_run(tmp_path / "a")), str(write_run(tmp_path / "b", 30, 2.0))])
    draw(runs, tmp_path / "out.png")
    for axes, name in zip(kept[0].axes, ("loss", "val_loss", "lr", "tokens_per_second")):
        curves = [line.get_xydata().tolist() for line in axes.lines if len(line.get_xydata())]
        assert curves == [[list(point) for point in run.series[name]] for run in runs]


def test_a_failure_leaves_the_old_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    (tmp_path / "out.png").write_text("old")

    def fails(self, file, **more):
        Path(file).write_text("half")
        raise OSError("disk")

    monkeypatch.setattr(Figure, "savefig", fails)
    with pytest.raises(OSError):
        draw([Run("x", {"loss": [(1, 2.0)]})], tmp_path / "out.png")
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"] and (tmp_path / "out.png").read_text() == "old"


# --- the tool ---------------------------------------------------------------------------------------------------------


def typed(*words: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "plot_run.py"), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_the_tool_as_it_is_typed(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")  # stands for its absence
    without = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = typed(f"{a},{b}", COLUMNS="70", **without)
    assert (done.returncode, done.stderr) == (0, "") and "* a: step 20" in done.stdout and "o b: " in done.stdout
    done = typed(str(a), "--out", str(tmp_path / "x.png"), **without)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "pictures need matplotlib: pip install" in done.stderr and not (tmp_path / "x.png").exists()
    assert "RUN is a run's directory" in typed("--help").stdout


def test_the_tool(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plot_run.main(runs=str(write_run(tmp_path / "a")), out=str(tmp_path / "a.png"), smooth=4)
    assert capsys.readouterr().out.splitlines()[-1] == f"drawn: {tmp_path / 'a.png'}"
    with pytest.raises(ValueError, match="--smooth 0"):
        plot_run.main(runs=str(tmp_path / "a"), smooth=0)
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
