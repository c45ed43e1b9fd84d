"""Speed and peak memory of a training step on one GPU, through main_finetune's own path, with random weights made there.

    PYTHONPATH=. python -m tests.gpu.train_step --config model_configs/llama2_7b.json --lora_rank 8 --lengths 4096 --data_parallel sdp
    PYTHONPATH=. python -m tests.gpu.train_step --config model_configs/tinyllama_1.1b.json --lora_rank 0 --lengths 512,512,512,512

--lengths are the sequences of one micro batch, packed in a row. All their tokens carry a loss. Floating-point operations a token, with
no credit for recomputing and none for the adapters: full 6 N + 3 A, LoRA 4 N + 3 A; N weights of the linears and the head,
A = 2 S D L for causal attention. MFU is of 989 TF/s (H100, H200, dense bf16).
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from accessory import config
from accessory.model import ModelArgs
from accessory.model.llama import global_shape
from tests.gpu import bodies

PEAK_FLOPS = 989e12


@dataclass
class Measured:
    tokens_per_second: float
    mfu: float
    peak_gb: float  # the most memory that was allocated, in 10^9 bytes
    planned_gb: float  # what --dry_run says
    parts: dict[str, float]
    last_loss: float

    def __str__(self) -> str:
        parts = ", ".join(f"{k} {v:.2f}" for k, v in self.parts.items() if v >= 0.005)
        return f"{self.tokens_per_second:,.0f} tokens/s, MFU {self.mfu:.1%}, peak {self.peak_gb:.2f} GB, planned {self.planned_gb:.2f} ({parts})"


def flops_per_token(args: ModelArgs, length: int, full: bool) -> float:
    names = [
        f"layers.0.{n}.weight"
        for n in (
            "attention.wq",
            "attention.wk",
            "attention.wv",
            "attention.wo",
            "feed_forward.w1",
            "feed_forward.w2",
            "feed_forward.w3",
        )
    ]
    weights = args.n_layers * sum(torch.Size(global_shape(args, n)).numel() for n in names) + args.vocab_size * args.dim
    return (6 if full else 4) * weights + 3 * 2 * length * args.n_heads * args.head_size * args.n_layers


def measure(sizes: dict, lengths: list[int], *, lora_rank: int, steps: int = 12, **flags) -> Measured:
    """Median speed of the second half of `steps` on this process's GPU. bf16, weights frozen by LoRA are bf16."""
    sizes = sizes | ({"vocab_size": 32000} if sizes.get("vocab_size", -1) < 1 else {})
    tuning = {"lora_rank": lora_rank, "lora_alpha": 2.0 * lora_rank} if lora_rank else None
    data = bodies.counting(lengths, sizes["vocab_size"], prompt=0.0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with tempfile.TemporaryDirectory() as directory:
        run = bodies.train(
            Path(directory),
            "cuda",
            sizes,
            data,
            steps=steps,
            tuning=tuning,
            dtype=torch.bfloat16,
            lr=1e-4,
            batch_size=len(lengths),
            precision="bf16",
            **flags,
        )
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    speed = statistics.median(run.speeds[steps // 2 :])
    args, length = (
        run.model.args,
        sum(n * n for n in lengths) / sum(lengths),
    )  # the mean over tokens of their sequence's length
    return Measured(
        speed,
        speed * flops_per_token(args, length, not lora_rank) / PEAK_FLOPS,
        peak,
        sum(run.planned.values()),
        run.planned,
        run.losses[-1],
    )


def main(
    config: str = "model_configs/llama2_7b.json", lora_rank: int = 8, lengths: str = "4096", steps: int = 12,
    data_parallel: str = "fsdp", checkpointing: bool = False, compile: bool = False, quant: str | None = None,
) -> None:  # fmt: skip
    """Prints one line."""
    sizes = ModelArgs.from_files([config]).to_dict()
    print(
        measure(
            sizes,
            [int(n) for n in lengths.split(",")],
            lora_rank=lora_rank,
            steps=steps,
            data_parallel=data_parallel,
            checkpointing=checkpointing,
            compile=compile,
            quant=quant,
        )
    )


if __name__ == "__main__":
    config.run_tool(main)
