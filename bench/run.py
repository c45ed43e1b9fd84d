"""Runs rows of the benchmark: python -m bench.run ROW... [--device cuda] [--rounds 1] [--threads 2] [--only SIDE,..]

    prepare(row) -> round 1: A B C, limits | round 2: A B C, limits | ..     each letter a process of its own, one at a time
                 -> losses agree? -> ratios of neighbours, their medians -> table (stdout), ROW-cpu-2.json, ROW-cpu-2.png
                    (with --only: ROW-cpu-2-only.json, so that a result of all sides stays)

Without a ROW it lists the rows with their goals. Ours runs in this interpreter, peers in those of `python -m bench.peers`. A side
that fails is an error row with its last words, and never a win for anybody; so is a peer's in bf16 on a CPU without instructions for
it (ours takes such products in fp32: accessory/parallel/products.py). --threads 1 compares CPU time, which neighbours on
the machine disturb least; more threads compare wall time. What is compared with what: bench/rows; how: bench/verdict.py.
"""

import argparse
import contextlib
import importlib
import json
import os
import pkgutil
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import peers, rows, verdict
from bench.rows import OURS, Absent, Row, Side

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600  # seconds of one process
GIVEN = dict(os.environ)  # before accessory is imported, whose own settings are no peer's


def all_rows() -> dict[str, Row]:
    """By name, every module of bench/rows."""
    found = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(rows.__path__)):
        loaded = importlib.import_module(f"bench.rows.{module}")
        found |= {row.name: row for row in getattr(loaded, "ROWS", None) or [loaded.ROW]}
    return found


def environment(side_env: str, threads: int, scratch: Path) -> dict[str, str]:
    """A side's environment: this checkout on the path, its threads, a compile cache that the rounds share, nobody asked."""
    fixed = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": str(scratch / "hf"),
        "TQDM_DISABLE": "1",
    }
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor" / side_env)}
    count = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    heap = {}
    if side_env == OURS:  # as accessory.launch starts a run; imported now, not before GIVEN is what was given
        from accessory import launch

        heap = launch.heap(GIVEN)
    return GIVEN | fixed | cache | count | heap | {"PYTHONPATH": str(ROOT)}


def run_process(
    python: Path | str, program: list[str], env: dict[str, str], timeout: float = TIMEOUT
) -> dict[str, Any]:
    """The JSON object that the process printed last, with the seconds it lived; {"error": its last words} where it failed."""
    start = time.perf_counter()
    with subprocess.Popen(
        [str(python), *program], cwd=ROOT, env=env, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):  # its own session: ranks and workers that it started go too
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return {"error": f"not finished after {timeout:g} s"}
    if process.returncode:
        said = [line.strip() for line in err.splitlines() if line.strip()]
        return {"error": last_words(process.returncode, said), "stderr": said[-30:]}
    try:
        result = json.loads([line for line in out.splitlines() if line.strip()][-1])
        assert isinstance(result, dict), result
    except (IndexError, ValueError, AssertionError):
        return {"error": "the last line it printed is no JSON object"}
    return result | {"process_seconds": time.perf_counter() - start}


def last_words(code: int, said: list[str]) -> str:
    """Of a process that failed. What it said last is the reason only if it ended itself."""
    if code >= 0:
        return said[-1] if said else f"ended with {code}"
    name = signal.Signals(-code).name
    return f"ended by {name}" + ": out of memory, perhaps" * (name == "SIGKILL") + f" ({said[-1]})" * bool(said)


def unreported(result: dict[str, Any]) -> str | None:
    """What of a side's result is not there, or not in the form of bench/rows."""
    for key in ("loss", "seconds", "cpu_seconds", "tokens", "peak_mb", "more"):
        values = result.get(key)
        values = list(values.values()) if isinstance(values, dict) and key == "more" else values
        values = [values] if key in ("tokens", "peak_mb") else values
        if not isinstance(values, list) or not all(isinstance(x, (int, float)) for x in values):
            return key
    timed = result["seconds"] and result["cpu_seconds"] and min(*result["seconds"], *result["cpu_seconds"]) > 0
    return None if timed and result["tokens"] > 0 else "any timed unit"


def run_side(side: Side, data: dict[str, Any], device: str, threads: int, scratch: Path) -> dict[str, Any]:
    python = Path(sys.executable) if side.env == OURS else peers.python_of(side.env)
    if side.env != OURS and side.precision == "bf16" and device == "cpu" and not multiplies_bf16():
        return {"error": "left out: this CPU has no instructions for bf16, a step would take minutes"}
    if side.env != OURS and (lack := peers.lack(side.env)):
        return {"error": lack}
    work = {"data": data, "settings": side.settings, "device": device, "threads": threads}
    path = scratch / f"{side.name}.json"
    path.write_text(json.dumps(work))
    program = ROOT / "bench" / "sides" / f"{side.program}.py"
    result = run_process(python, [str(program), str(path)], environment(side.env, threads, scratch))
    if "error" not in result and (missing := unreported(result)):
        return {"error": f"it did not report {missing}"}
    return result


def multiplies_bf16() -> bool:
    import torch

    from accessory.parallel import products

    return products.CPU_MULTIPLIES[torch.bfloat16]


def run_limits(data: dict[str, Any], device: str, threads: int, scratch: Path) -> dict[str, Any]:
    path = scratch / "limits.json"
    path.write_text(json.dumps({"data": data, "settings": {}, "device": device, "threads": threads}))
    return run_process(sys.executable, ["-m", "bench.measure", str(path)], environment(OURS, threads, scratch))


def run_row(row: Row, sides: list[Side], device: str, threads: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """Everything that was printed, and the verdict, as plain JSON. Raises Absent, and OSError where something cannot be written."""
    try:
        data = row.prepare(scratch, device)
    except ValueError as error:  # a user's mistake, as the library tells it: a full disk
        raise OSError(str(error)) from error
    row, clock = row.on(device), "cpu_seconds" if device == "cpu" and threads == 1 else "seconds"
    printed: list[dict[str, Any]] = []
    limits: list[dict[str, Any]] = []
    for number in range(rounds):
        printed.append({})
        for side in sides:
            first = printed[0].get(side.name, {})
            failed = "error" in first  # it would only fail again
            result = first if failed else run_side(side, data, device, threads, scratch)
            printed[-1][side.name] = result
            told = result.get("error") or f"{verdict.seconds_of(result, clock):.3f} s a unit"
            print(f"{row.name} round {number + 1} {side.name}: {told}", file=sys.stderr, flush=True)
        limits.append(run_limits(data, device, threads, scratch))
    whole = [x for x in limits if "error" not in x]
    limit = {k: statistics.median(x[k] for x in whole) for k in whole[0]} if whole else limits[0]
    verdict.add_shares(row, printed, clock, limit, data.get("flops_per_token"))
    lines = verdict.table(row, printed, clock)
    only = "" if len(sides) == len(row.sides) else f" --only {','.join(s.name for s in sides)}"
    told = {
        "row": row.name, "what": row.what, "device": device, "threads": threads, "clock": clock, "machine": machine(),
        "command": f"python -m bench.run {row.name} --device {device} --threads {threads} --rounds {rounds}{only}",
        "limits": limit, "data": _small(data), "sides": [asdict(s) for s in sides], "rounds": printed,
        "goals": verdict.judge(row, printed, clock), "table": lines,
    }  # fmt: skip
    return without_places(told, scratch)


def machine() -> dict[str, Any]:
    import torch

    told = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        told = names[0] if names else told
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": told, "multiplies_bf16": multiplies_bf16(), "cores": os.cpu_count(), "gpu": gpu, "torch": torch.__version__, "python": platform.python_version(),
        "load": os.getloadavg(),
    }  # fmt: skip


def without_places(told: Any, scratch: Path) -> Any:
    """The same JSON with this machine's directories by other names: results are for others to read."""
    text = json.dumps(told)
    for name, place in (("SCRATCH", scratch), ("ENVS", peers.environments()), (".", ROOT), ("HOME", Path.home())):
        if place != Path(
            place.anchor
        ):  # a home directory of "/", as in containers, is in every path and every quotient
            text = text.replace(json.dumps(str(place))[1:-1], name)
    return json.loads(text)


def _small(data: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in data.items() if not (isinstance(v, (list, dict)) and len(v) > 64)}


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of tokens a second, if matplotlib is there. An earlier run's picture does not stay beside this run's figures."""
    path.unlink(missing_ok=True)
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    finished = [
        (name, [verdict.value(r[name], "speed", result["clock"]) for r in result["rounds"]])
        for name in result["rounds"][0]
        if not any("error" in r[name] for r in result["rounds"])
    ]
    if not finished:
        return
    names, speeds = zip(*finished)
    figure, axes = plt.subplots(figsize=(7, 0.35 * len(names) + 1.2))
    middle = [statistics.median(s) for s in speeds]
    error = [[m - min(s) for m, s in zip(middle, speeds)], [max(s) - m for m, s in zip(middle, speeds)]]
    axes.barh(names, middle, xerr=error, color=["C1" if n.startswith(OURS) else "C0" for n in names])
    axes.invert_yaxis()
    axes.set_xlabel("tokens / " + ("CPU second" if result["clock"] == "cpu_seconds" else "second"))
    axes.set_title(f"{result['row']}, {result['device']}, {result['threads']} thread" + "s" * (result["threads"] > 1))
    figure.savefig(path, bbox_inches="tight", dpi=120)


def listing(found: dict[str, Row]) -> str:
    lines = []
    for row in found.values():
        lines += [f"{row.name}: {row.what}", *(f"    {goal}" for goal in row.goals)]
        lines += [f"    on a GPU: {goal}" for goal in row.gpu_goals or []]
    return "\n".join(lines)


def mistake(given: argparse.Namespace, only: set[str], found: dict[str, Row]) -> str | None:
    """What of the command line cannot be done: told before anything is run."""
    if wrong := [n for n in given.rows if n not in found]:
        return f"{wrong[0]}: no such row; there are {', '.join(found)}"
    names = dict.fromkeys(n for row in given.rows for s in found[row].sides for n in (s.name, s.peer))
    if wrong := sorted(only - set(names)):
        return f"--only {wrong[0]}: no such side or peer; there are {', '.join(names)}"
    for flag in ("rounds", "threads"):
        if getattr(given, flag) < 1:
            return f"--{flag} {getattr(given, flag)}: it must be 1 or more"
    if given.device == "cuda" and machine()["gpu"] is None:
        return "--device cuda: torch finds no GPU on this machine"
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=given.out).close()
    except OSError as error:
        return f"--out {given.out}: {error.strerror}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=1, help="3 for figures to publish")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="sides or peers by name, with commas")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    given, found = parser.parse_args(), all_rows()
    if not given.rows:
        print(listing(found))
        return 0
    only = {name.strip() for name in given.only.split(",") if name.strip()}
    if wrong := mistake(given, only, found):
        print(wrong, file=sys.stderr)
        return 2
    failed: list[str] = []
    for row in (found[n] for n in given.rows):
        sides = [s for s in row.sides if not only or {s.name, s.peer} & only]
        if not sides:
            print(f"{row.name}: passed over: it has none of the sides of --only")
            continue
        with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
            try:
                result = run_row(row, sides, given.device, given.threads, given.rounds, Path(scratch))
            except Absent as why:
                print(f"{row.name}: passed over: {why}")
                continue
            except OSError as error:
                failed.append(f"{row.name}: {error}")
                continue
        print(f"\n### {row.name}: {row.what}\n\n" + "\n".join(result["table"]), flush=True)
        rates = ", ".join(f"{k} {v:,.4g}" for k, v in result["limits"].items() if isinstance(v, float))
        print(f"\nlimits: {rates or 'not measured: ' + result['limits'].get('error', '')}", flush=True)
        name = f"{row.name}-{given.device}-{given.threads}" + "-only" * (len(sides) < len(row.sides))
        if not any("error" not in told for printed in result["rounds"] for told in printed.values()):
            failed.append(f"{row.name}: no side finished, nothing is written")
        else:
            failed += store(result, given.out / name)
    if failed:
        print("\n".join(["", *failed]), file=sys.stderr)
    return 1 if failed else 0


def store(result: dict[str, Any], name: Path) -> list[str]:
    """name.json, all of it or as it was before, and name.png; why not, in a line."""
    file, begun, picture = (name.with_name(name.name + end) for end in (".json", ".json.part", ".png"))
    try:
        begun.write_text(json.dumps(result, indent=1))
        begun.replace(file)
    except OSError as error:
        begun.unlink(missing_ok=True)
        return [f"{file}: {error.strerror}: this result is only in the table above"]
    try:
        plot(result, picture)
    except OSError as error:
        picture.unlink(missing_ok=True)
        return [f"{picture}: {error.strerror}"]
    return []


def leave(number: int, frame: Any) -> None:
    print("\nstopped: this row is not finished, results are as they were", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    for asked in (signal.SIGINT, signal.SIGTERM):  # as an exception, so that the side that runs and the scratch go too
        signal.signal(asked, leave)
    sys.exit(main())
