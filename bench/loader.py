"""Tokens a second that the data loader gives, alone: random ids in a store, windows as a run draws them.

    python bench/loader.py [--tokens 20000000] [--block_size 2048] [--tokens_per_step 8192] [--document 500] [--num_workers 0]
                           [--step_seconds 10]

--step_seconds is what a training step over --tokens_per_step takes; the loader's share of it is printed. (SmolLM2-135M on two
CPU cores: about 10 s for 8192 tokens.) Opening and the first window are timed apart. No model is run.
"""

import hashlib
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from accessory.config import run_tool
from accessory.data.blocks import PretrainDataArgs, load_corpus
from accessory.data.loader import train_windows
from accessory.data.store import ENDS, FORMAT, META, TOKENS, VERSION

IDS = 2**15  # so many different ones


def main(
    *,
    tokens: int = 20_000_000,
    block_size: int = 2048,
    tokens_per_step: int = 8192,
    document: int = 500,
    num_workers: int = 0,
    step_seconds: float = 10.0,
) -> None:
    """Prints the loader's tokens a second, its time a step, and the share of --step_seconds that this is."""
    per_step = max(1, tokens_per_step // block_size)
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as name:
        store = write_store(Path(name, "store"), tokens, document)
        start = time.perf_counter()
        train, _ = load_corpus(PretrainDataArgs([str(store)], block_size), SimpleNamespace(fingerprint="bench"), seed=0)
        windows = train_windows(
            train,
            batch_size=1,
            sequences_per_step=per_step,
            dp_rank=0,
            dp_size=1,
            seed=0,
            epoch=0,
            num_workers=num_workers,
        )
        next(windows)
        first = time.perf_counter() - start
        start, seen, steps = time.perf_counter(), 0, 0
        for window in windows:
            seen, steps = seen + window.num_all_tokens, steps + 1
            if time.perf_counter() - start > 10:
                break
        seconds = time.perf_counter() - start
    if not steps:
        raise ValueError(f"--tokens {tokens}: one step's, which is timed apart: give more")
    print(f"opened, first window after {first * 1000:.1f} ms; {seen / seconds / 1e6:.2f} million tokens/s")
    share = seconds / steps / step_seconds
    print(f"{seconds / steps * 1000:.2f} ms a step of {per_step} x {block_size}: {share:.4%} of {step_seconds:g} s")


def write_store(directory: Path, tokens: int, document: int) -> Path:
    directory.mkdir()
    rng = np.random.default_rng(0)
    rng.integers(0, IDS, tokens, np.uint16).tofile(directory / TOKENS)
    ends = np.minimum(np.cumsum(rng.integers(1, 2 * document, 2 * tokens // document + 1)), tokens)
    ends = ends[: int(np.searchsorted(ends, tokens)) + 1].astype("<i8")
    ends.tofile(directory / ENDS)
    files = {n: {"sha256": hashlib.sha256(n.encode()).hexdigest()} for n in (TOKENS, ENDS)}
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": "u2",
        "tokens": tokens,
        "documents": len(ends),
        "files": files,
    }
    meta |= {"tokenizer": {"fingerprint": "bench", "vocab_size": IDS}, "settings": {"blocks": "none"}, "sources": []}
    (directory / META).write_text(json.dumps(meta))
    return directory


if __name__ == "__main__":
    run_tool(main)
