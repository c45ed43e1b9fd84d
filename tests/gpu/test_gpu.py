"""The same results on a GPU as everywhere: parity in bf16, every precision and memory mode, the program itself, memory against the
plan, speed. Random weights made here; nothing is downloaded. One GPU: `PYTHONPATH=. python -m pytest tests/gpu -q`; the figures are printed at the end."""

import json
import os
import subprocess
import sys

import pytest
import torch

from accessory.model import ModelArgs
from tests.gpu import bodies, train_step
from tests.gpu.bodies import LORA, counting
from tests.helpers import ROOT, write_tiny_checkpoint, write_tiny_data

PEER = {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4, "hidden_dim": 1408, "vocab_size": 32000}  # 56M
SMALL = {"dim": 256, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 512, "vocab_size": 512}
DATA = counting([90, 50, 140, 70, 110, 60, 80, 120], SMALL["vocab_size"])
PLAN_BOUND = 0.15


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, bound", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float32, 1e-4)], ids=str
)
def test_logits_and_loss_are_those_of_transformers(dtype: torch.dtype, bound: float) -> None:
    pytest.importorskip("transformers")
    bodies.logits_and_loss_are_those_of_transformers("cuda", dtype, bound, tokens=256, **PEER)


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_packed_attention_is_that_of_each_sequence(kv_heads: int, head_dim: int) -> None:
    lengths = [300, 1, 129, 64, 512]
    packed = bodies.packed_attention_is_that_of_each_sequence(
        "cuda", torch.bfloat16, 8, kv_heads, head_dim, lengths, bound=2e-2
    )
    if torch.cuda.get_device_capability() >= (8, 0):
        assert packed.kernel is not None  # torch's varlen kernel did it
    bodies.packed_attention_is_that_of_each_sequence("cuda", torch.float32, 8, kv_heads, head_dim, lengths, bound=1e-4)


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2e-2), (torch.float32, 1e-4)], ids=str)
def test_attention_after_a_common_beginning(dtype: torch.dtype, bound: float) -> None:
    lengths, after = [300, 1, 129, 64, 512], [-1, 0, 0, 2, 2]
    bodies.packed_attention_is_that_of_each_sequence("cuda", dtype, 8, 2, 64, lengths, bound, after)


def test_packed_attention_of_odd_heads_does_without_the_kernel() -> None:
    bodies.packed_attention_is_that_of_each_sequence("cuda", torch.bfloat16, 4, 2, 12, [30, 7], bound=2e-2)


def test_the_cache_on_the_gpu_gives_the_tokens_of_the_cpu() -> None:
    prompts = [[5, 6, 7, 8, 9], [9], [10, 11, 12]]
    cpu, _ = bodies.greedy_tokens("cpu", SMALL, prompts, new=24)
    gpu, plain = bodies.greedy_tokens("cuda", SMALL, prompts, new=24)
    assert gpu == cpu == plain


# --- training ---------------------------------------------------------------------------------------------------------


def test_bf16_learns_what_fp32_learns(tmp_path) -> None:
    variants = {
        "fp32": {"precision": "fp32"},
        "tf32": {"precision": "tf32"},
        "bf16": {"precision": "bf16"},
        "bf16, ddp": {"precision": "bf16", "data_parallel": "ddp"},
    }
    bounds = {"tf32": 1e-2, "bf16": 2e-2, "bf16, ddp": 2e-2}
    bodies.variants_learn_alike(
        tmp_path, "cuda", SMALL, DATA, variants, bounds, steps=20, dtype=torch.bfloat16, lr=1e-3
    )


def test_nf4_is_that_of_the_cpu_and_learns_alike_in_every_memory_mode(tmp_path) -> None:
    bodies.nf4_bytes_are_the_cpus("cuda", (1024, 2752))
    bodies.calibrated_nf4_is_as_good_as_the_cpus("cuda", SMALL, DATA)
    bodies.nf4_learns_alike(tmp_path, "cuda", SMALL, DATA, bound=2e-2, steps=12, dtype=torch.bfloat16, lr=1e-3)


def test_a_step_on_the_gpu_is_one_on_the_cpu(tmp_path) -> None:
    common = {"steps": 6, "tuning": LORA, "precision": "fp32", "lr": 1e-2}
    cpu = bodies.train(tmp_path / "cpu", "cpu", SMALL, DATA, **common)
    gpu = bodies.train(tmp_path / "gpu", "cuda", SMALL, DATA, **common, draw_on="cpu")
    assert bodies.apart(gpu.losses, cpu.losses) <= 1e-4


@pytest.mark.parametrize("precision, bound", [("fp32", 1e-4), ("bf16", 2e-2)])
def test_lora_checkpointed_and_compiled_learns_what_eager_learns(tmp_path, precision: str, bound: float) -> None:
    variants = {
        "eager": {},
        "checkpointing": {"checkpointing": True},
        "compile": {"compile": True},
        "both": {"checkpointing": True, "compile": True, "validate": True, "sample": True},
    }
    bounds = {"checkpointing": bound, "compile": bound, "both": bound}
    bodies.variants_learn_alike(
        tmp_path, "cuda", SMALL, DATA, variants, bounds, steps=12, tuning=LORA, precision=precision, lr=1e-2
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"tuning": LORA, "compile": True}, {"tuning": {"trainable": ["output"]}}, {"precision": "fp16"}],
    ids=str,
)
def test_steps_wait_for_nothing(tmp_path, options: dict) -> None:
    bodies.steps_wait_for_nothing(tmp_path, "cuda", SMALL, DATA, **options)


def test_fp16_scales_its_loss(tmp_path) -> None:
    bodies.fp16_scales_its_loss(tmp_path, "cuda", SMALL, DATA, bound=2e-2, steps=16, tuning=LORA, lr=1e-2)


def test_cpu_offload_learns_the_same(tmp_path) -> None:
    variants = {
        "on the device": {},
        "offloaded": {"cpu_offload": True},
        "offloaded, all": {"cpu_offload": True, "tuning": None, "lr": 1e-3},
    }
    runs = bodies.variants_learn_alike(
        tmp_path,
        "cuda",
        SMALL,
        DATA,
        variants,
        {"offloaded": 1e-4},
        steps=12,
        precision="fp32",
        **{"tuning": LORA, "lr": 1e-2},
    )
    assert not any(p.is_cuda for p in runs["offloaded"].model.parameters())


@pytest.mark.parametrize("flags", [{}, {"data_parallel": "ddp"}, {"cpu_offload": True}], ids=str)
def test_saved_state_returns(tmp_path, flags: dict) -> None:
    bodies.saved_state_returns(tmp_path, "cuda", SMALL, DATA, tuning=LORA, precision="bf16", **flags)


def test_the_program_runs_under_the_launcher_and_continues(tmp_path) -> None:
    """torchrun's environment, NCCL beside gloo, samples, validation, saving, resuming."""
    base, data = write_tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16), write_tiny_data(tmp_path / "data")
    command = [
        sys.executable,
        "-m",
        "accessory.launch",
        "--nproc_per_node",
        "1",
        "-m",
        "accessory.main_finetune",
        "--pretrained_path",
        base,
        "--data_config",
        data,
    ]
    command += [
        "--output_dir",
        tmp_path / "run",
        "--lora_rank",
        "4",
        "--precision",
        "bf16",
        "--lr",
        "1e-2",
        "--batch_size",
        "4",
        "--max_seq_len",
        "256",
        "--resume",
        "auto",
    ]
    for steps in (6, 9):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(
            [
                *map(str, command),
                "--max_steps",
                str(steps),
                "--sample_prompts",
                "What colour is snow?",
                "--report_to",
                "none",
            ],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["loss"] for r in lines if "loss" in r}
    assert sorted(losses) == list(range(1, 10)) and losses[9] < losses[1]
    assert (tmp_path / "run" / "latest" / "adapter.safetensors").exists()


# --- memory and speed -------------------------------------------------------------------------------------------------


def sizes(name: str) -> dict:
    return ModelArgs.from_files([ROOT / "model_configs" / f"{name}.json"]).to_dict()


def needs_memory(gigabytes: float) -> None:
    total = torch.cuda.get_device_properties(0).total_memory / 1e9
    if total < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB on the device, there are {total:.0f}")


@pytest.mark.parametrize("data_parallel", ["fsdp", "sdp"])
@pytest.mark.parametrize("kind", ["full", "LoRA", "LoRA, checkpointing"])
def test_memory_is_what_the_plan_says(kind: str, data_parallel: str) -> None:
    needs_memory(40)
    flags = {
        "lora_rank": 0 if kind == "full" else 8,
        "checkpointing": "checkpointing" in kind,
        "data_parallel": data_parallel,
    }
    measured = train_step.measure(sizes("tinyllama_1.1b"), [1024] * 8, steps=4, **flags)
    bodies.note(f"1.1B {kind} {data_parallel}: {measured}")
    assert abs(measured.planned_gb / measured.peak_gb - 1) <= PLAN_BOUND


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_nf4_is_what_the_plan_says(checkpointing: bool) -> None:
    needs_memory(40)
    flags = {"lora_rank": 8, "quant": "nf4", "checkpointing": checkpointing}
    measured = train_step.measure(sizes("llama2_7b"), [1024], steps=4, **flags)
    bodies.note(f"7B NF4 LoRA{', checkpointing' if checkpointing else ''}: {measured}")
    assert abs(measured.planned_gb / measured.peak_gb - 1) <= PLAN_BOUND


SPEEDS = {
    "1 x 2048, fsdp": ([2048], {"data_parallel": "fsdp"}),
    "1 x 2048, sdp": ([2048], {"data_parallel": "sdp"}),
    "8 x 512, sdp": ([512] * 8, {"data_parallel": "sdp"}),
    "1 x 4096, sdp": ([4096], {"data_parallel": "sdp"}),
    "8 x 512, sdp, compile": ([512] * 8, {"data_parallel": "sdp", "compile": True}),
    "1 x 4096, sdp, compile": ([4096], {"data_parallel": "sdp", "compile": True}),
    "8 x 512, fsdp, checkpointing": ([512] * 8, {"data_parallel": "fsdp", "checkpointing": True}),
    "1 x 4096, sdp, nf4": ([4096], {"data_parallel": "sdp", "quant": "nf4"}),
    "1 x 4096, sdp, nf4, compile": ([4096], {"data_parallel": "sdp", "quant": "nf4", "compile": True}),
}


@pytest.mark.parametrize("lengths, flags", SPEEDS.values(), ids=SPEEDS)
def test_speed_of_lora_on_7b(request, lengths: list[int], flags: dict) -> None:
    """The bound only says that nothing is badly wrong; what was measured is printed at the end."""
    needs_memory(80)
    measured = train_step.measure(sizes("llama2_7b"), lengths, lora_rank=8, **flags)
    bodies.note(f"7B LoRA {request.node.callspec.id}: {measured}")
    assert measured.mfu > 0.1
