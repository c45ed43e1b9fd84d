"""LoRA of rank 16 on all seven linears over a frozen base, dense batches as in full_ft. The adapter is one on disk, both its
matrices drawn, which every side reads: losses after the first steps show whether gradients are the same.

In bf16 the base is held in bf16 and the adapter in fp32 (ours; PEFT under autocast) or both in bf16 (the others).
"""

from pathlib import Path
from typing import Any

from bench import workload
from bench.rows import ANY, ITSELF, Goal, Row, Side
from bench.rows.full_ft import dense, hf, own


def with_adapter(directory: Path, models: dict[str, str], sizes: dict[str, Any], device: str) -> dict[str, Any]:
    adapter = workload.adapter(directory, sizes, models["bf16"])
    return {"models": models, "adapter": adapter} | dense(directory, sizes, device, backward=1) | {"lr": 1e-4}


def prepare(directory: Path, device: str) -> dict[str, Any]:
    sizes = workload.M if device == "cpu" else workload.LLAMA_7B
    return with_adapter(directory, workload.model(directory, sizes, device), sizes, device)


def prepare_smollm2(directory: Path, device: str) -> dict[str, Any]:
    return with_adapter(directory, *workload.smollm2(directory), device)


SIDES = [
    own("ours-bf16", precision="bf16", lora=True, file="bf16"),
    own("ours-bf16-compile", precision="bf16", lora=True, file="bf16", compile=True),
    own("ours-fp32", "ours-fp32", precision="fp32", lora=True),
    own("ours-fp32-compile", "ours-fp32", precision="fp32", lora=True, compile=True),
    hf("peft-autocast", "autocast", lora=True, file="bf16"),
    hf("peft-autocast-fp32-base", "autocast", "peft-autocast", lora=True),
    hf("peft-bf16-compile", "bf16", lora=True, file="bf16", compile=True),
    hf("peft-bf16", "bf16", lora=True, file="bf16"),
    hf("peft-fp32", "fp32", lora=True),
    hf("peft-fp32-compile", "fp32", "peft-fp32", lora=True, compile=True),
    Side("litgpt", "litgpt", "litgpt_train", {"mode": "bf16", "lora": True}, "litgpt", "bf16"),
    Side("torchtune", "torchtune", "torchtune_train", {"mode": "bf16", "lora": True}, "torchtune", "bf16"),
    Side(
        "torchtune-compile", "torchtune", "torchtune_train", {"mode": "bf16", "lora": True, "compile": True}, "torchtune",
        "bf16",
    ),
]  # fmt: skip
GOALS = [
    Goal("peft-autocast", "speed", at_least=1.25),
    Goal("peft-bf16-compile", "speed", at_least=1.05),
    Goal("peft-fp32", "speed", at_least=1.1, ours="ours-fp32"),
    Goal("litgpt", "speed", at_least=1.0),
    Goal("torchtune", "speed", at_least=1.0),
    Goal("peft-autocast", "peak_mb", at_most=0.8),
    Goal("peft-bf16-compile", "peak_mb", at_most=0.8),
]
GPU_GOALS = [
    Goal("peft-autocast", "speed", at_least=2.0),
    Goal(ANY, "speed", at_least=1.3),
    Goal(ITSELF, "of_gemm", at_least=0.70),
    *(g for g in GOALS if g.metric == "peak_mb"),
]
WHAT = "LoRA r16 on all linears, 58 M parameters, 4 x 256 tokens (a GPU: a 7B, 4 x 2048)"
# of the larger model, to stay below ten minutes: slow, and never the fastest
LEFT_OUT = ("peft-autocast-fp32-base", "peft-bf16", "ours-fp32-compile", "peft-fp32-compile")
ROWS = [
    Row("lora", WHAT, SIDES, GOALS, prepare, GPU_GOALS),
    Row(
        "lora_smollm2",
        "LoRA r16 on all linears of the real SmolLM2-135M, 4 x 256 tokens",
        [s for s in SIDES if s.env in ("ours", "hf") and s.name not in LEFT_OUT],
        [g for g in GOALS if g.peer.startswith("peft")],
        prepare_smollm2,
    ),
]
