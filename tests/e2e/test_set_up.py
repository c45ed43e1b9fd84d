"""Set-up on machines that lack something: one clear last line, exit code not 0, nothing that a later run takes for complete.

Each case is a bare copy of the files that set-up reads, and a PATH with nothing on it but a few tools and a stand-in for what
is missing. No torch is installed here: `bash tests/run.sh` in a fresh clone is the test of that."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = "bash cat cksum df awk printenv grep flock tail rm mkdir dirname uname sed".split()
REAL = getattr(sys, "_base_executable", sys.executable)
OLD = 'case "$*" in "-c import sys") ;; -V) echo "Python 3.9.2";; *) exit 1;; esac'
NO_INDEX = {
    "PIP_CONFIG_FILE": "/dev/null",
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_RETRIES": "0",
    "PIP_NO_CACHE_DIR": "1",
}


@pytest.fixture
def clone(tmp_path):
    """A directory with what set-up reads, and bin/ as its PATH."""
    for name in ("setup.py", "constraints.txt", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "exps").mkdir()
    shutil.copy(ROOT / "exps" / "setup_env.sh", tmp_path / "exps")
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        if found := shutil.which(tool):
            (tmp_path / "bin" / tool).symlink_to(found)
    return tmp_path


def stand_in(path: Path, script: str) -> None:
    """An executable shell script; `REAL` in it is this interpreter's base."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/bash\n" + script.replace("REAL", REAL) + "\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def set_up(clone: Path, command: str = "bash exps/setup_env.sh run", **env: str) -> subprocess.CompletedProcess:
    env = {"PATH": str(clone / "bin"), "HOME": str(clone), "LANG": "C.UTF-8", **env}
    return subprocess.run(["/bin/bash", "-c", command], cwd=clone, env=env, capture_output=True, text=True, timeout=120)


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """Failed, and the last line says why and what to do."""
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("set-up: ") and all(word in last for word in words), done.stderr
    assert "Traceback" not in last


def stamps(clone: Path) -> list[Path]:
    return list(clone.glob(".venv/.accessory-*"))


def test_old_python_is_refused_by_name(clone):
    stand_in(clone / "bin" / "python3", OLD)
    refused(set_up(clone), "python3 is Python 3.9.2", "3.11 or newer", "apt install")


def test_no_python_at_all(clone):
    refused(set_up(clone), "no Python on PATH", "3.11 or newer")


def test_newer_python_is_found_behind_an_old_one(clone):
    """python3 is 3.9, python3.13 does not run (a shim), python3.12 is right: it is taken, and then misses the venv module."""
    stand_in(clone / "bin" / "python3", OLD)
    stand_in(clone / "bin" / "python3.13", "exit 127")
    stand_in(clone / "bin" / "python3.12", 'case "$*" in *ensurepip*) exit 1;; esac; exec REAL "$@"')
    refused(set_up(clone), "python3.12 has no venv module", "python3-venv")


def test_no_space(clone):
    stand_in(clone / "bin" / "python3", 'exec REAL "$@"')
    (clone / "bin" / "df").unlink()
    stand_in(clone / "bin" / "df", 'echo Filesystem; echo "disk 100000 88000 12000 88% /"')
    refused(set_up(clone), "11 MB are free", "needed", "larger disk")
    assert not (clone / ".venv").exists()


def test_no_network_and_a_half_made_venv(clone):
    """What an interrupted run left (a broken .venv/, another set-up's stamp) is made anew, not believed."""
    stand_in(clone / "bin" / "python3", 'exec REAL "$@"')
    stand_in(clone / ".venv" / "bin" / "python", "exit 1")
    (clone / ".venv" / ".accessory-run").write_text("0 0\nPython 3.11.0\n")
    done = set_up(clone, **NO_INDEX)
    refused(done, "pip cannot get packages", "PIP_INDEX_URL", "network")
    assert "to download" in done.stderr and stamps(clone) == []
    refused(set_up(clone, **NO_INDEX), "pip cannot get packages")  # nor believed the second time


def test_full_disk_while_installing(clone):
    stand_in(clone / "bin" / "python3", 'exec REAL "$@"')
    pip = 'case "$*" in *"pip --version"*) exit 0;; *install*) echo "ERROR: [Errno 28] No space left on device" >&2; exit 1;; esac; exec REAL "$@"'
    stand_in(clone / ".venv" / "bin" / "python", pip)
    refused(set_up(clone), "the disk is full", "TMPDIR")
    assert stamps(clone) == []


@pytest.mark.parametrize("torch, setuptools", [("2.11.0+cu130", "<="), ("2.13.0+cpu", "==")])
def test_a_torch_that_is_there_is_kept_with_a_setuptools_that_it_takes(clone, torch, setuptools):
    """torch 2.11 wants setuptools < 82, and the pin of another could not be met. pip's words are told as what they are."""
    stand_in(clone / "bin" / "python3", 'exec REAL "$@"')
    conflict = "ERROR: ResolutionImpossible: see https://pip.pypa.io/topics/dependency-resolution"
    pip = f'case "$*" in *"pip --version"*) exit 0;; *install*) echo "{conflict}" >&2; exit 1;; esac; exec REAL "$@"'
    stand_in(clone / ".venv" / "bin" / "python", pip)
    there = clone / "packages"
    (there / "torch").mkdir(parents=True)
    (there / "torch" / "__init__.py").touch()
    (there / f"torch-{torch}.dist-info").mkdir()
    (there / f"torch-{torch}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n"
    )
    done = set_up(clone, PYTHONPATH=str(there))
    refused(done, "could not install the packages")
    assert conflict in done.stderr and f"torch {torch} is there and is kept" in done.stderr
    pins = (clone / ".venv" / "accessory-constraints.txt").read_text().splitlines()
    assert [p for p in pins if p.startswith("torch==")] == [f"torch=={torch}"]
    assert [p.rstrip(".0123456789") for p in pins if p.startswith("setuptools")] == [f"setuptools{setuptools}"]


def test_active_virtual_environment_too_old(clone):
    stand_in(clone / "mine" / "bin" / "python", OLD)
    refused(set_up(clone, VIRTUAL_ENV=str(clone / "mine")), "mine has Python 3.9.2", "deactivate")


def test_given_interpreter_is_used_as_it_is(clone):
    stand_in(clone / "bin" / "python3", "exit 9")
    done = set_up(clone, "source exps/setup_env.sh run; echo $python", python=sys.executable)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, sys.executable, "")
    assert not (clone / ".venv").exists()
    refused(set_up(clone, python="no-such-python"), "python=no-such-python")


def test_complete_set_up_is_reused_until_the_pins_change(clone):
    stand_in(clone / "bin" / "python3", 'exec REAL "$@"')
    stand_in(clone / ".venv" / "bin" / "python", 'case "$*" in *install*) exit 7;; esac; exec REAL "$@"')
    key = set_up(
        clone, "{ { cat constraints.txt setup.py exps/setup_env.sh; pwd; } | cksum; .venv/bin/python -V; }"
    ).stdout
    (clone / ".venv" / ".accessory-test").write_text(key)
    done = set_up(clone)
    assert (done.returncode, done.stderr) == (0, "")  # the tests' environment serves the scripts too
    with open(clone / "constraints.txt", "a") as pins:
        pins.write("numpy==2.4.7\n")
    assert set_up(clone).returncode != 0 and stamps(clone) == []


def test_smoke_keeps_what_the_environment_says(clone):
    command = 'a=${a:-1}; b=${b:-2}; source exps/setup_env.sh run; smoke a="one word" b=3; echo "$a|$b"'
    assert set_up(clone, command, python=sys.executable, b="7").stdout.strip() == "one word|7"


def test_every_requirement_is_pinned_and_no_index_is_named():
    pins = set(re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {name.lower() for name in pins}
    required = re.findall(
        r'"([A-Za-z][A-Za-z0-9_-]*)(?:[=>]=[0-9.]+)?"[,\]]', (ROOT / "setup.py").read_text().split("HF =")[1]
    )
    missing = {name.lower() for name in required} - pins - {"accessory", "apache-2", "hf", "gguf", "test"}
    assert not missing
    for path in [ROOT / "setup.py", ROOT / "constraints.txt", *(ROOT / "exps").glob("*.sh"), ROOT / "tests" / "run.sh"]:
        assert not re.search(r"https?://|--(extra-)?index-url", path.read_text()), path


@pytest.mark.parametrize("script", sorted(p.name for p in [*(ROOT / "exps").glob("*.sh"), ROOT / "tests" / "run.sh"]))
def test_script_parses_and_is_strict(script):
    path = ROOT / ("tests" if script == "run.sh" else "exps") / script
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    assert "set -euo pipefail" in path.read_text() and os.access(path, os.X_OK)
