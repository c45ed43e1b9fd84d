"""What converting a 7B costs: seconds and memory of each step, on files made here.

    random weights, one shard -> two shards -> Hugging Face -> one shard again

Each step is a tool in a process of its own, whose anonymous memory (RssAnon: what is no file's page) is sampled; each
stage is deleted when the next is written, so twice the model's size is on the disk at most. A few tensors are compared,
by sha256, between the first stage and the last.

python bench/convert_7b.py --work DIR [--llama_config model_configs/llama2_7b.json] [--dtype bf16] [--limit_gib 2]
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.formats_write import dtype_of
from accessory.config import run_tool
from accessory.model.args import ModelArgs
from accessory.weights import expected_shapes

ROOT = Path(__file__).resolve().parents[1]
INTERVAL = 0.02  # seconds between samples of a process's memory


def main(
    *, work: str, llama_config: str = "model_configs/llama2_7b.json", dtype: str = "bf16", limit_gib: float = 2.0
) -> None:
    """Prints a line for each step; fails when a step holds more than --limit_gib or a tensor comes back changed.

    --work is a directory to write in, which needs twice the model's size; it is emptied of what was written."""
    size = model_bytes(llama_config, dtype)
    stages = {name: Path(work) / name for name in ("one", "two", "hf", "back")}
    if there := [str(stage) for stage in stages.values() if stage.exists()]:
        raise ValueError(f"--work {work}: {there[0]} is there already and would be deleted at the end: take another")
    check_space(Path(work), size)
    try:
        report(
            "random", tool("random_checkpoint", llama_config=llama_config, dst=stages["one"], dtype=dtype), limit_gib
        )
        before = fingerprints(stages["one"])
        for name, source, target, flags in (
            ("reshard", "one", "two", {"mp": 2}),
            ("meta_to_hf", "two", "hf", {}),
            ("hf_to_meta", "hf", "back", {}),
        ):
            cost = tool(name, src=stages[source], dst=stages[target], **flags)
            report(f"{name} {source} -> {target}", cost, limit_gib)
            shutil.rmtree(stages[source])
        after = fingerprints(stages["back"])
    finally:
        for stage in stages.values():
            shutil.rmtree(stage, ignore_errors=True)
    if odd := [name for name in before if before[name] != after[name]]:
        raise ValueError(f"{', '.join(odd)} came back changed")
    print(f"{len(before)} tensors of {size / 1e9:.1f} GB came back bit-equal: {', '.join(before)}")


def model_bytes(llama_config: str, dtype: str) -> int:
    """The size of the model's weights, with 32000 rows where the file names no vocabulary."""
    args = ModelArgs.from_files([str(ROOT / llama_config)])
    if args.vocab_size < 1:
        args = ModelArgs.from_dict(args.to_dict() | {"vocab_size": 32000})
    numbers = sum(torch.Size(shape).numel() for shape in expected_shapes(args, bool(args.tie_word_embeddings)).values())
    return numbers * dtype_of(dtype).itemsize


def check_space(work: Path, size: int) -> None:
    """Raises ValueError unless two models and a little fit on the disk."""
    work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work).free
    if free < 2.1 * size:
        raise ValueError(
            f"--work {work}: {free / 1e9:.1f} GB are free, {2.1 * size / 1e9:.1f} GB are needed: take another"
        )


def tool(name: str, **flags: object) -> tuple[float, int]:
    """Runs one of tools/; returns its seconds and the peak of its RssAnon in bytes."""
    command = [sys.executable, str(ROOT / f"tools/{name}.py"), *(f"--{key}={value}" for key, value in flags.items())]
    start, peak = time.perf_counter(), 0
    log = tempfile.TemporaryFile("w+")  # not a pipe, which would fill up with the progress bar
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(INTERVAL)
    log.seek(0)
    errors = log.read().splitlines()
    if process.returncode:
        raise ValueError(f"tools/{name}.py ended with {process.returncode}: {errors[-1] if errors else 'no message'}")
    return time.perf_counter() - start, peak


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes; 0 when it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def report(name: str, cost: tuple[float, int], limit_gib: float) -> None:
    seconds, peak = cost
    print(f"{name:<24} {seconds:7.1f} s   RssAnon at most {peak / 2**30:5.2f} GiB", flush=True)
    if peak > limit_gib * 2**30:
        raise ValueError(f"{name} held {peak / 2**30:.2f} GiB, more than --limit_gib {limit_gib}")


def fingerprints(path: Path) -> dict[str, str]:
    """sha256 of the bytes of some tensors: the ends, and in the middle one that is reordered and one split on columns."""
    source = open_checkpoint(path).source
    last = max(int(n.split(".")[1]) for n in source.names() if n.startswith("layers."))
    names = ["tok_embeddings.weight", "layers.0.attention.wq.weight", f"layers.{last // 2}.attention.wk.weight"]
    names += [f"layers.{last // 2}.feed_forward.w2.weight", f"layers.{last}.attention.wo.weight", "norm.weight"]
    names += [n for n in ("output.weight",) if n in source.names()]
    return {n: hashlib.sha256(source.read(n).view(torch.uint8).numpy().tobytes()).hexdigest() for n in names}


if __name__ == "__main__":
    run_tool(main)
