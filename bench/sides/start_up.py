"""How long a command takes before it does anything: started again and again, its own process each time.

settings: command (words; {python} is this environment's interpreter, {bin} its directory, data's keys by name), units. CPU time
is that of the command and its children. The command must end with 0.
"""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from bench import measure


def main() -> None:
    work = measure.begin()
    places = {"python": sys.executable, "bin": str(Path(sys.executable).parent)} | work["data"]
    words = [word.format(**places) for word in work["settings"]["command"]]
    seconds, cpu, peak = [], [], 0.0
    for unit in range(work["settings"]["units"] + 1):  # the first one reads the files from the disk
        start, used = time.perf_counter(), children()
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"})
        if done.returncode:
            sys.exit(f"{' '.join(words[-2:])}: {(done.stderr or done.stdout).strip().splitlines()[-1][:200]}")
        if unit:
            seconds.append(time.perf_counter() - start)
            cpu.append(children() - used)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    measure.report(loss=[], tokens=1, seconds=seconds, cpu_seconds=cpu, peak_mb=peak)


def children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
