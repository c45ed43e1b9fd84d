"""Full fine-tuning on dense batches: 4 sequences of 256 tokens (a GPU: 4 of 2048, of a 7B), every token learnt."""

from pathlib import Path
from typing import Any

from bench import workload
from bench.rows import ANY, ITSELF, OURS, Goal, Row, Side

# sequences, their length; eight of a 7B would take 150 GB, by the plan
DENSE = {"cpu": (4, 256), "cuda": (4, 2048)}


def dense(
    directory: Path, sizes: dict[str, Any], device: str, backward: int = 2, warmup: int = 2, units: int = 4
) -> dict:
    """What all sides read, the model apart."""
    count, length = DENSE[device]
    lengths = [(1, length - 1)] * (count * (warmup + units + 1))
    return {
        "examples": workload.examples(directory, lengths, sizes["vocab_size"]),
        "batch_size": count,
        "windows_per_unit": 1,
        "warmup": warmup,
        "units": units,
        "losses": 2,
        "lr": 1e-5,
        "sizes": sizes,
        "flops_per_token": workload.flops_per_token(sizes, length, backward),
        "gemms": workload.gemms(sizes, count * length),
    }


def prepare(directory: Path, device: str) -> dict[str, Any]:
    sizes = workload.M if device == "cpu" else workload.LLAMA_7B
    return {"models": workload.model(directory, sizes, device)} | dense(directory, sizes, device)


def prepare_smollm2(directory: Path, device: str) -> dict[str, Any]:
    models, sizes = workload.smollm2(directory)
    return {"models": models} | dense(directory, sizes, device, units=3)


def own(name: str, peer: str = OURS, **settings: Any) -> Side:
    precision = settings["precision"]
    return Side(name, OURS, "ours_train", settings, peer, precision)


def hf(name: str, mode: str, peer: str = "", **settings: Any) -> Side:
    return Side(name, "hf", "hf_train", {"mode": mode} | settings, peer, "fp32" if mode == "fp32" else "bf16")


SIDES = [
    own("ours-bf16", precision="bf16"),
    own("ours-bf16-compile", precision="bf16", compile=True),
    own("ours-fp32", "ours-fp32", precision="fp32"),
    own("ours-fp32-compile", "ours-fp32", precision="fp32", compile=True),
    hf("hf-autocast", "autocast"),
    hf("hf-bf16-compile", "bf16", compile=True),
    hf("hf-bf16", "bf16"),
    hf("hf-fp32", "fp32"),
    hf("hf-fp32-compile", "fp32", "hf-fp32", compile=True),
    Side("litgpt-bf16", "litgpt", "litgpt_train", {"mode": "bf16"}, "litgpt", "bf16"),
    Side("litgpt-bf16-compile", "litgpt", "litgpt_train", {"mode": "bf16", "compile": True}, "litgpt", "bf16"),
    Side("torchtune-bf16", "torchtune", "torchtune_train", {"mode": "bf16"}, "torchtune", "bf16"),
    Side(
        "torchtune-bf16-compile", "torchtune", "torchtune_train", {"mode": "bf16", "compile": True}, "torchtune", "bf16"
    ),
]
GOALS = [
    Goal("hf-autocast", "speed", at_least=1.3),
    Goal("hf-bf16-compile", "speed", at_least=1.05),
    Goal("hf-fp32", "speed", at_least=1.8),
    Goal("hf-fp32", "speed", at_least=1.0, ours="ours-fp32"),
    Goal("litgpt", "speed", at_least=1.0),
    Goal("torchtune", "speed", at_least=1.0),
]
GPU_GOALS = [  # one with fp32 weights may not go into the memory
    Goal("hf-autocast", "speed", at_least=1.5),
    Goal("hf-bf16", "speed", at_least=1.5),
    Goal(ANY, "speed", at_least=1.15),
    Goal(ITSELF, "of_gemm", at_least=0.75),
]
WHAT = "full fine-tuning, 58 M parameters, 4 x 256 tokens (a GPU: a 7B, 4 x 2048), all learnt"
ROWS = [
    Row("full_ft", WHAT, SIDES, GOALS, prepare, GPU_GOALS),
    Row(
        "full_ft_smollm2",
        "full fine-tuning of the real SmolLM2-135M, 4 x 256 tokens",
        [s for s in SIDES if s.name in ("ours-bf16", "ours-bf16-compile", "hf-autocast", "hf-bf16-compile")],
        GOALS[:2],
        prepare_smollm2,
    ),
]
