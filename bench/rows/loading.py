"""1 GB of consolidated.00.pth and consolidated.01.pth, from the files to the first logits. Program: bench/sides/load_model.py.

The peers read what suits them: transformers the same weights as safetensors, plain torch the .pth files; ours_hf the file that
transformers reads, ours_one a single .pth. Two files' weights have to be copied into memory of their own: at the rate of the limit
fresh_gb_per_s, so 1.1 GB of it beside transformers' time says whether two files can be loaded as fast as its one, mapped.
(tokens: parameters.) loading_gpu: a 7B of 13.5 GB to a GPU, no logits, beside safetensors alone; program:
bench/sides/load_weights.py."""

import json
import subprocess
import sys
from pathlib import Path

from bench import workload
from bench.rows import OURS, Goal, Row, Side, wants_gpu

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"dim": 1536, "n_layers": 16, "n_heads": 12, "n_kv_heads": 12, "hidden_dim": 4096, "vocab_size": 32000}
MORE = {"norm_eps": 1e-5, "rope_theta": 10000.0}


def prepare(directory, device: str) -> dict:
    """0.55 G parameters in bf16, three times on the disk: 3.3 GB."""
    sizes = directory / "sizes.json"
    sizes.write_text(json.dumps(SIZES | MORE))
    run("random_checkpoint", llama_config=sizes, dst=directory / "one", dtype="bf16")
    run("reshard", src=directory / "one", dst=directory / "meta", mp=2)
    run("meta_to_hf", src=directory / "one", dst=directory / "hf")
    count = sum(f.stat().st_size for f in (directory / "meta").glob("*.pth")) / 2
    tokens = [(7919 * i) % SIZES["vocab_size"] for i in range(1, 33)]
    files = {kind: str(directory / kind) for kind in ("meta", "one", "hf")}
    return files | {"tokens": tokens, "parameters": count}


def prepare_gpu(directory, device: str) -> dict:
    """27 GB on the disk."""
    wants_gpu(device)
    sizes = directory / "sizes.json"
    sizes.write_text(json.dumps(workload.LLAMA_7B | MORE))
    run("random_checkpoint", llama_config=sizes, dst=directory / "one", dtype="bf16")
    run("meta_to_hf", src=directory / "one", dst=directory / "hf")
    count = sum(f.stat().st_size for f in (directory / "one").glob("*.pth")) / 2
    return {"one": str(directory / "one"), "hf": str(directory / "hf"), "parameters": count}


def run(tool: str, **flags) -> None:
    """Raises OSError with the tool's last words."""
    words = [sys.executable, str(ROOT / f"tools/{tool}.py"), *(f"--{k}={v}" for k, v in flags.items())]
    done = subprocess.run(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", cwd=ROOT
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise OSError(
            f"tools/{tool}.py: {said[-1].rpartition('error: ')[2] if said else f'ended with {done.returncode}'}"
        )


WAYS = {
    "ours": OURS,
    "ours_one": OURS,
    "ours_hf": OURS,
    "plain_torch": OURS,
    "plain_mapped": OURS,
    "transformers": "hf",
}
LOADING = Row(
    "loading",
    "1.1 GB in two consolidated files, to the first logits",
    [Side(way, env, "load_model", {"way": way}, precision="bf16") for way, env in WAYS.items()],
    [
        *(Goal(p, "speed", at_least=1.0) for p in ("plain_torch", "plain_mapped", "transformers")),
        *(Goal("transformers", "speed", at_least=1.0, ours=way) for way in ("ours_one", "ours_hf")),
        Goal("plain_torch", "anonymous_mb", at_most=0.6),
        Goal("plain_torch", "peak_mb", at_most=0.6),
        Goal("transformers", "anonymous_mb", at_most=0.6),
        Goal("transformers", "peak_mb", at_most=0.6),
        *(Goal("transformers", m, at_most=0.6, ours="ours_one") for m in ("anonymous_mb", "peak_mb")),
        *(Goal("transformers", m, at_most=0.6, ours="ours_hf") for m in ("anonymous_mb", "peak_mb")),
    ],
    prepare,
)
TO_GPU = {"ours_one": OURS, "ours_hf": OURS, "safetensors": "hf", "transformers": "hf"}
GPU = Row(
    "loading_gpu",
    "a 7B's 13.5 GB in bf16 from the page cache to a GPU",
    [Side(way, env, "load_weights", {"way": way}, precision="bf16") for way, env in TO_GPU.items()],
    [
        *(Goal("safetensors", "speed", at_least=0.9, ours=way) for way in ("ours_one", "ours_hf")),
        Goal("transformers", "speed", at_least=1.0, ours="ours_hf"),
    ],
    prepare_gpu,
)
ROWS = [LOADING, GPU]
