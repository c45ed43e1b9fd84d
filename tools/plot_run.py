"""How runs went: loss, validation loss, learning rate and speed, as a sketch in the terminal or as a picture.

python tools/plot_run.py RUN[,RUN2] [--out curves.png|curves.svg] [--smooth 20]
"""

import shutil
import sys

from accessory.config import run_tool
from accessory.plot import draw, read_runs, sketch, summary


def main(*, runs: str, out: str | None = None, smooth: int = 1, width: int | None = None) -> None:
    """RUN is a run's directory or its metrics.jsonl; several with commas between are drawn over each other. The run may
    still be going on.

    --out      a .png or .svg file, written with matplotlib (an old one is replaced); none: a sketch, which needs no package
    --smooth   loss and speed as means of each value and those logged before it, so many in all (the values pale behind)
    --width    of the sketch, in characters; none: the terminal's"""
    if smooth < 1:
        raise ValueError(f"--smooth {smooth}: 1 or more")
    found = read_runs([path for path in runs.split(",") if path])
    if out is None:
        print("\n".join(sketch(found, width or shutil.get_terminal_size().columns, smooth)))
        return
    draw(found, out, smooth)
    print("\n".join(f"{run.name}: {summary(run)}" for run in found))
    print(f"drawn: {out}")


if __name__ == "__main__":
    words = sys.argv[1:]
    run_tool(main, [f"--runs={words[0]}", *words[1:]] if words and not words[0].startswith("-") else words)
