"""One environment for each peer, apart from ours and from each other: python -m bench.peers NAME... | all

    bench/peers/NAME.txt -> $BENCH_ENVS/NAME/bin/python          BENCH_ENVS: ~/.cache/accessory-bench unless it is set

torch goes in first and alone, at the version that constraints.txt names, and the peer's packages may not change it: every side
of a row runs on the same torch. An environment that was made of the same file is kept. pip's own variables choose the index.
A peer that cannot be installed stays absent; its sides are then error rows. Test: tests/unit/test_bench.py
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "bench" / "peers"
STAMP = "made-of.txt"


def environments() -> Path:
    return Path(os.environ.get("BENCH_ENVS") or Path.home() / ".cache" / "accessory-bench")


def python_of(peer: str) -> Path:
    """The peer's interpreter, if it has one: see `lack`."""
    return environments() / peer / "bin" / "python"


def lack(peer: str) -> str | None:
    """Why the peer's environment cannot be used, or None: it is not there, `make` did not come to its end, or its file says
    something else now."""
    stamp = environments() / peer / STAMP
    if not stamp.exists() or not python_of(peer).exists():
        return f"no environment {peer}: python -m bench.peers {peer}"
    if stamp.read_text() != wanted(peer):
        return f"environment {peer} is of another bench/peers/{peer}.txt or torch: python -m bench.peers {peer}"
    return None


def known() -> list[str]:
    return sorted(path.stem for path in PEERS.glob("*.txt"))


def torch_pin() -> str:
    """`torch==..` of constraints.txt."""
    return next(line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith("torch=="))


def wanted(peer: str) -> str:
    """What the environment is made of: the file with those it includes, and torch."""
    lines = [torch_pin()]
    for line in (PEERS / f"{peer}.txt").read_text().splitlines():
        lines += wanted(line.split()[1].removesuffix(".txt")).splitlines() if line.startswith("-r ") else [line]
    return "\n".join(dict.fromkeys(lines)) + "\n"


def make(peer: str) -> Path:
    """Builds the environment; it counts once the stamp is written, last, and what was begun does not stay.

    Raises OSError and subprocess.CalledProcessError, with pip's last words on stderr."""
    home = environments() / peer
    if lack(peer) is None:
        return python_of(peer)
    if home.exists():
        shutil.rmtree(home)
    try:
        venv.create(home, with_pip=True)
        pins = home / "constraints.txt"
        pins.write_text(torch_pin() + "\n")
        pip = [python_of(peer), "-m", "pip", "--no-input", "install", "--quiet", "--no-cache-dir"]
        subprocess.run([*pip, torch_pin()], check=True)
        subprocess.run([*pip, "-c", pins, "-r", PEERS / f"{peer}.txt"], check=True)
        (home / STAMP).write_text(wanted(peer))
    except BaseException:  # a signal too
        shutil.rmtree(home, ignore_errors=True)
        raise
    return python_of(peer)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all, or some of: {', '.join(known())}")
    names = parser.parse_args().names
    names = known() if names == ["all"] else names
    if wrong := [n for n in names if n not in known()]:
        print(f"{wrong[0]}: no such peer; there are {', '.join(known())}", file=sys.stderr)
        return 2
    failed = []
    for name in names:
        print(f"{name}: {environments() / name}", flush=True)
        try:
            make(name)
        except subprocess.CalledProcessError as error:
            failed.append(name)
            print(f"{name}: pip ended with {error.returncode}, its words are above", file=sys.stderr)
        except OSError as error:
            failed.append(name)
            print(f"{name}: {error.filename}: {error.strerror}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    for asked in (signal.SIGINT, signal.SIGTERM):  # as an exception: pip goes too, and what it had begun
        signal.signal(asked, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
