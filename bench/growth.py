"""The curves of the benchmark's row `growth` beside their formulae:  python -m bench.growth bench/results/growth-cpu-1.json

    python -m bench.run growth --threads 1 -> growth-cpu-1.json -> a Markdown table a curve, growth-cpu-1-curves.png beside it

Speed: the share of this machine's GEMM rate (fp32, measured in the same run) that a step's arithmetic took. Memory: measured
over the formula's. Bytes: sent over the formula's. The formulae are in bench/sides/grow.py and ranks.py.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

Point = dict[str, float]
TITLES = {"length": "sequence length", "vocabulary": "vocabulary", "lora": "LoRA rank"}
RANKS = {"mp": "model-parallel ranks", "dp": "data-parallel ranks"}
RANKS |= {f"{curve}_lora": f"{name}, LoRA" for curve, name in RANKS.items()}


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
        point |= {"x": side["settings"]["x"], "length": side["settings"]["length"]}
        if "sent_mb" in point:
            point |= {k: 1e6 * middle[f"{k}_mb"] * point["x"] / found[0]["tokens"] for k in ("sent", "formula")}
        curves.setdefault(side["settings"]["curve"], []).append(point)
    return curves


def tables(curves: dict[str, list[Point]], gflops: float) -> list[str]:
    lines = []
    for curve, found in curves.items():
        sent = "sent_mb" in found[0]
        lines += ["", f"**{(TITLES | RANKS)[curve]}**", ""]
        lines += (
            ["| | tokens a sequence | tokens/s | bytes a token, all ranks | formula | sent / formula |"]
            if sent
            else ["| | tokens/s | of GEMM | extra MB | formula | measured / formula |"]
        )
        lines.append("|---" * 6 + "|")
        for p in found:
            if sent:
                cells = [f"{p['sent']:,.0f}", f"{p['formula']:,.0f}", f"{p['sent'] / p['formula']:.4f}"]
            else:
                share = p["speed"] * p["mflops"] / 1e3 / gflops
                cells = [f"{share:.0%}", f"{p['extra_mb']:.0f}", f"{p['formula_mb']:.0f}"]
                cells.append(f"{p['extra_mb'] / p['formula_mb']:.2f}")
            first = [f"{p['x']:,}", f"{p['length']:,}"] if sent else [f"{p['x']:,}"]
            lines.append("| " + " | ".join([*first, f"{p['speed']:,.0f}", *cells]) + " |")
    return lines


def draw(curves: dict[str, list[Point]], gflops: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [c for c in TITLES | RANKS if c in curves]
    figure, axes = plt.subplots(2, len(shown), figsize=(4 * len(shown), 6), squeeze=False)
    for column, curve in enumerate(shown):
        found = [p for p in curves[curve] if curve in TITLES or p["length"] == curves[curve][-1]["length"]]
        rows: tuple = (
            ("tokens a second", "speed", None, ""),
            ("bytes a token, all ranks", "sent", "formula", "formula"),
        )
        if curve in TITLES:
            for p in found:
                p["limit"] = gflops * 1e3 / p["mflops"]
            rows = (
                ("tokens a second", "speed", "limit", "GEMM rate / arithmetic"),
                ("MB of a step", "extra_mb", "formula_mb", "formula"),
            )
        for axis, (label, key, formula, name) in zip(axes[:, column], rows):
            axis.plot([p["x"] for p in found], [p[key] for p in found], "o-", label="measured")
            if formula:
                axis.plot([p["x"] for p in found], [p[formula] for p in found], "--", label=name)
            axis.set(xscale="log", yscale="log", xlabel=(TITLES | RANKS)[curve], ylabel=label)
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    path = parser.parse_args().result
    try:
        result = json.loads(path.read_text())
        curves, gflops = points(result), result["limits"]["fp32_gflops"]
    except OSError as error:
        parser.error(f"{path}: {error.strerror}")
    except (ValueError, KeyError, TypeError):
        parser.error(f"{path}: no result of the row growth with its limits")
    print("\n".join(tables(curves, gflops)[1:]))
    picture = path.with_name(f"{path.stem}-curves.png")
    try:
        draw(curves, gflops, picture)
        print(f"\n{picture}")
    except ImportError:
        print("\nno picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
