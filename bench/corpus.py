"""Building a corpus beside two other ways, on the same text with the same tokenizer: MB of text a second, and ratios.

    python bench/corpus.py --text DIR_OR_FILE --tokenizer_path tokenizer.model [--megabytes 20] [--num_processes 2]
                           [--peer_python VENV/bin/python]

    ours     accessory.data.corpus.build: JSON lines -> ids with EOS, store and its hashes on the disk
    plain    one process: json.loads, tokenizer.encode, array.extend, write           (sentencepiece's or tokenizers' own call)
    peer     datasets: load_dataset("json"), .map(tokenize), .map(group into blocks), fast tokenizer of transformers, as many
             processes; in an environment of its own that --peer_python names: pip install datasets transformers tokenizers
             sentencepiece protobuf. Without the flag this column is left out.

The text is repeated up to --megabytes in records of 2000 characters or so. In every repetition other words have their letters
shuffled, one in 25: words never seen before keep coming in a text of 100 MB too (some 4 % of all), and ours keeps the ids of
the words it has seen. Start-up of Python and imports are not counted,
start-up of processes is. On a machine that does other work too, CPU seconds say more than seconds. Also the most memory
(PSS) that all of our processes held.
"""

import json
import random
import resource
import subprocess
import tempfile
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

from accessory.config import run_tool
from accessory.data.corpus import CorpusArgs, build
from accessory.tokenizer import Tokenizer

NEW = 25  # one word in so many is new

PEER = """
import json, resource, sys, time
from datasets import disable_progress_bars, load_dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast
text, tokenizer, count, cache = sys.argv[1:]
disable_progress_bars()
if tokenizer.endswith(".json"):
    fast = PreTrainedTokenizerFast(tokenizer_file=tokenizer)
else:
    from transformers import LlamaTokenizerFast
    fast = LlamaTokenizerFast.from_pretrained(tokenizer.rpartition("/")[0])
assert fast.is_fast, "not a fast tokenizer"
def tokenize(rows):
    return {"input_ids": fast(rows["text"])["input_ids"]}
def group(rows):
    ids = [i for row in rows["input_ids"] for i in row]
    total = len(ids) // 1024 * 1024
    return {"input_ids": [ids[i : i + 1024] for i in range(0, total, 1024)]}
def cpu():
    return sum(sum(resource.getrusage(w)[:2]) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
start, used = time.perf_counter(), cpu()
data = load_dataset("json", data_files=text, split="train", cache_dir=cache)
keys = {"batched": True, "num_proc": int(count), "load_from_cache_file": False}
data = data.map(tokenize, remove_columns=data.column_names, **keys).map(group, **keys)
seconds = time.perf_counter() - start, cpu() - used
print(json.dumps({"seconds": seconds, "tokens": len(data) * 1024}))
"""


def main(
    *, text: str, tokenizer_path: str, megabytes: int = 20, num_processes: int = 2, peer_python: str | None = None
) -> None:
    """Prints MB/s of ours, of a plain loop and of datasets.map (needs --peer_python), and the ratios."""
    with tempfile.TemporaryDirectory(prefix="bench-corpus-") as name:
        directory = Path(name)
        source = write_text(Path(text), directory / "text.jsonl", megabytes)
        size = source.stat().st_size / 1e6
        with Memory() as memory:
            ours = timed(lambda: build(CorpusArgs([str(source)], f"{name}/store", tokenizer_path, num_processes)))
        print(f"{size:.0f} MB, {Path(tokenizer_path).name}, {num_processes} processes")
        print(row("ours", size, ours, ours), f"  PSS of all processes {memory.peak / 1e6:.0f} MB at most")
        print(row("plain", size, timed(lambda: plain_loop(source, tokenizer_path, directory / "plain.bin")), ours))
        if peer_python is None:
            print("peer   left out: --peer_python names an environment with datasets and transformers")
            return
        print(
            row("peer", size, run_peer(peer_python, source, tokenizer_path, num_processes, directory / "cache"), ours)
        )


def row(name: str, size: float, took: tuple[float, float], ours: tuple[float, float]) -> str:
    seconds, cpu = took
    times = f"ours is {seconds / ours[0]:.2f} times as fast, {cpu / ours[1]:.2f} times by CPU time"
    return f"{name:6} {size / seconds:6.2f} MB/s {seconds:7.1f} s, CPU {cpu:6.1f} s" + (
        f"; {times}" if took != ours else ""
    )


def write_text(text: Path, path: Path, megabytes: int) -> Path:
    """Records of about 2000 characters out of the .txt files there, over and over, each with its number."""
    files = sorted(text.rglob("*.txt")) if text.is_dir() else [text]
    whole = "\n".join(f.read_text(encoding="utf-8") for f in files)
    if not whole:
        raise ValueError(f"--text {text}: no .txt file there")
    written, number, rng = 0, 0, random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            start = number * 2000 % len(whole)
            words = whole[start : start + 2000].split(" ")
            for at in range(rng.randrange(NEW), len(words), NEW):
                words[at] = "".join(rng.sample(words[at], len(words[at])))
            row = json.dumps({"text": f"{number} {' '.join(words)}"}, ensure_ascii=False) + "\n"
            written, number = written + len(row.encode()), number + 1
            file.write(row)
    return path


def plain_loop(source: Path, tokenizer_path: str, out: Path) -> None:
    tokenizer = Tokenizer.open(tokenizer_path)
    ids = array("H" if tokenizer.vocab_size < 2**16 else "I")
    with open(source, encoding="utf-8") as file:
        for line in file:
            ids.extend(tokenizer.encode(json.loads(line)["text"]))
            ids.append(tokenizer.eos_id)
    out.write_bytes(ids.tobytes())


def run_peer(python: str, source: Path, tokenizer_path: str, num_processes: int, cache: Path) -> tuple[float, float]:
    words = [python, "-c", PEER, str(source), str(Path(tokenizer_path).resolve()), str(num_processes), str(cache)]
    done = subprocess.run(
        words, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "HOME": str(cache.parent)}
    )
    if done.returncode:
        raise ValueError(f"--peer_python {python}: {done.stderr.strip().splitlines()[-1]}")
    return tuple(json.loads(done.stdout.splitlines()[-1])["seconds"])


def timed(function) -> tuple[float, float]:
    """(seconds, CPU seconds of this process and of those that it started and that have ended)."""
    start, cpu = time.perf_counter(), cpu_seconds()
    function()
    return time.perf_counter() - start, cpu_seconds() - cpu


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


class Memory:
    """The most proportional set size of this process and its children, looked at ten times a second."""

    def __enter__(self) -> "Memory":
        self.peak, self.stop = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stop.wait(0.1):
            self.peak = max(self.peak, sum(pss(pid) for pid in family("self")))


def family(pid: str) -> Iterator[str]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            children = (task / "children").read_text().split()
        except OSError:
            continue
        for child in children:
            yield from family(child)


def pss(pid: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


if __name__ == "__main__":
    run_tool(main)
