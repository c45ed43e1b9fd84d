"""Real command lines for the end-to-end tests, and what they leave: `python -m accessory.launch` and exps/*.sh.

Launch(command, log, **variables)   starts it; every process that descends from it carries a mark in its environment
    .wait()  -> Done                exit code, what was printed (stdout and stderr as one), seconds
    .kill()                         SIGKILL to all of them, as a machine that goes down
    .alive()                        which of them are still there
hashes(directory)                   {file: sha256}, links by where they point
"""

import os
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil

from accessory.checkpoint.formats_read import file_sha256
from tests.helpers import ROOT

FINETUNE = ["-m", "accessory.main_finetune"]
PATIENCE = 240  # seconds: a machine may be busy with other things
TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_ERROR_FILE"}


@dataclass
class Done:
    """How a command ended. `since_error`: seconds from the first rank's error to the launcher's end; None without error."""

    code: int
    output: str
    since_error: float | None

    @property
    def lines(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.strip()]

    @property
    def last(self) -> str:
        return self.lines[-1] if self.lines else ""


class Launch:
    """One started command. `variables` are environment variables; `directory` is where it starts."""

    def __init__(self, command: list[str], log: Path, directory: Path = ROOT, **variables: object):
        self.mark, self.log, self.temporary = uuid.uuid4().hex, log, log.with_suffix(".tmp")
        self.temporary.mkdir(parents=True, exist_ok=True)
        mine = {k: v for k, v in os.environ.items() if k not in TORCHRUN}
        mine |= {
            "PYTHONPATH": str(directory),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self.temporary),
            "python": sys.executable,
        }
        mine |= {"TEST_MARK": self.mark} | {k: str(v) for k, v in variables.items()}
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                command, cwd=directory, env=mine, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def wait(self, timeout: float = PATIENCE) -> Done:
        """Waits for the command itself; who remains after it is `alive()`. After `timeout` all are killed: code -9."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
        ended = time.time()
        errors = [file.stat().st_mtime for file in self.temporary.rglob("error.json")]
        return Done(self.process.returncode, self.printed(), ended - min(errors) if errors else None)

    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def alive(self) -> list[psutil.Process]:
        marked = [
            p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("TEST_MARK") == self.mark
        ]
        return [p for p in marked if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def kill(self) -> None:
        """The command first, so that it cannot look after its ranks, then they."""
        ranks = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        for process in [self.process, *ranks]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()
        while left := self.alive():
            for process in left:
                process.kill()
            psutil.wait_procs(left, 5)


def launch_line(*flags: str, ranks: int = 1) -> list[str]:
    return [sys.executable, "-m", "accessory.launch", "--nproc_per_node", str(ranks), *FINETUNE, *flags]


def as_flags(given: dict[str, object]) -> list[str]:
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def hashes(directory: Path) -> dict[str, str]:
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(directory))] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[str(path.relative_to(directory))] = file_sha256(path)
    return found
