"""The curves of the benchmark's row `growth` beside their formulae:  python -m bench.growth bench/results/growth-cpu-1.json

    python -m bench.run growth --threads 1 -> growth-cpu-1.json -> a Markdown table a curve, growth-cpu-1-curves.png beside it

Speed: the share of this machine's GEMM rate (fp32, measured in the same run) that a step's arithmetic took. Memory: measured
over the formula's. Bytes: sent over the formula's. The formulae are in bench/sides/grow.py and two_ranks.py.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

Point = dict[str, float]
TITLES = {"length": "sequence length", "vocabulary": "vocabulary", "lora": "LoRA rank"}


def points(result: dict[str, Any]) -> dict[str, list[Point]]:
    """Medians over the rounds: {curve: [{x, speed, peak_mb, ..everything in `more`}]}; sides that failed are left out."""
    curves: dict[str, list[Point]] = {}
    for side in result["sides"]:
        found = [r[side["name"]] for r in result["rounds"]]
        if any("error" in f for f in found):
            continue
        middle = {key: statistics.median(f["more"][key] for f in found) for key in found[0]["more"]}
        speed = statistics.median(f["tokens"] / statistics.median(f[result["clock"]]) for f in found)
        point = middle | {"speed": speed, "peak_mb": statistics.median(f["peak_mb"] for f in found)}
        curves.setdefault(side["settings"]["curve"], []).append(point | {"x": side["settings"]["x"]})
    return curves


def tables(curves: dict[str, list[Point]], gflops: float) -> list[str]:
    lines = []
    for curve, found in curves.items():
        sent = "sent_mb" in found[0]
        lines += ["", f"**{TITLES.get(curve, curve)}**", ""]
        lines += (
            ["| tokens a sequence | tokens/s | sent MB | formula | sent / formula |"]
            if sent
            else ["| | tokens/s | of GEMM | extra MB | formula | measured / formula |"]
        )
        lines.append("|---" * (5 if sent else 6) + "|")
        for p in found:
            if sent:
                cells = [f"{p['sent_mb']:.2f}", f"{p['formula_mb']:.2f}", f"{p['sent_mb'] / p['formula_mb']:.4f}"]
            else:
                share = p["speed"] * p["mflops"] / 1e3 / gflops
                cells = [f"{share:.0%}", f"{p['extra_mb']:.0f}", f"{p['formula_mb']:.0f}"]
                cells.append(f"{p['extra_mb'] / p['formula_mb']:.2f}")
            lines.append("| " + " | ".join([f"{p['x']:,}", f"{p['speed']:,.0f}", *cells]) + " |")
    return lines


def draw(curves: dict[str, list[Point]], gflops: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [c for c in TITLES if c in curves]
    figure, axes = plt.subplots(2, len(shown), figsize=(4 * len(shown), 6), squeeze=False)
    for column, curve in enumerate(shown):
        x = [p["x"] for p in curves[curve]]
        rows = (
            ("tokens a second", "speed", [gflops * 1e3 / p["mflops"] for p in curves[curve]], "GEMM rate / arithmetic"),
            ("MB of a step", "extra_mb", [p["formula_mb"] for p in curves[curve]], "formula"),
        )
        for axis, (label, key, formula, name) in zip(axes[:, column], rows):
            axis.plot(x, [p[key] for p in curves[curve]], "o-", label="measured")
            axis.plot(x, formula, "--", label=name)
            axis.set(xscale="log", yscale="log", xlabel=TITLES[curve], ylabel=label)
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    path = parser.parse_args().result
    result = json.loads(path.read_text())
    curves, gflops = points(result), result["limits"]["fp32_gflops"]
    print("\n".join(tables(curves, gflops)[1:]))
    picture = path.with_name(f"{path.stem}-curves.png")
    try:
        draw(curves, gflops, picture)
        print(f"\n{picture}")
    except ImportError:
        print("\nno picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
