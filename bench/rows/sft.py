"""Instruction tuning as on GSM8K: short examples of very different lengths, of which only the answers are learnt. The unit is useful
tokens, padding not counted.

LENGTHS: (question with BOS, answer with EOS) in tokens of LLaMA's tokenizer, 72 rows of GSM8K's training set drawn at random.

In bf16 the timed lengths come once before, untimed, with other tokens: products build a kernel for each length that is new, which
steps 3 to 6 of a run do for all of theirs, and an epoch's 934 steps for few after the first forty (docs/LOG.md, "A pair as one number").
"""

import functools
import itertools
from pathlib import Path
from typing import Any

from bench import workload
from bench.rows import ITSELF, Goal, Row, Side, wants_gpu
from bench.rows.full_ft import hf, own

LENGTHS = [
    (74, 111), (109, 209), (102, 104), (87, 119), (184, 243), (139, 178), (112, 157), (77, 85), (67, 117), (68, 89), (115, 229),
    (45, 96), (82, 110), (107, 210), (57, 120), (58, 212), (140, 262), (52, 134), (80, 97), (53, 234), (45, 169), (82, 138),
    (54, 97), (53, 95), (41, 96), (89, 144), (66, 134), (56, 133), (101, 205), (62, 82), (86, 113), (33, 103), (69, 150),
    (25, 103), (47, 57), (44, 103), (45, 95), (86, 107), (92, 137), (55, 143), (41, 100), (63, 95), (40, 92), (67, 133),
    (29, 103), (68, 183), (117, 180), (83, 131), (114, 150), (46, 70), (66, 150), (42, 113), (82, 142), (56, 140), (102, 145),
    (38, 89), (57, 152), (46, 128), (47, 79), (46, 67), (114, 309), (69, 79), (71, 92), (48, 78), (70, 99), (87, 66), (63, 95),
    (97, 335), (70, 124), (79, 205), (75, 96), (76, 381),
]  # fmt: skip
UNITS, WINDOWS, BATCH = 2, 2, 8  # units of two steps of eight examples
FIRST = 2  # windows before the timed ones in LENGTHS
GPU_TIMES = 4  # a GPU takes so many times the batch
EPOCH = 7473 * 197  # tokens of GSM8K's training set


def timed(every: int = 1) -> list[list[tuple[int, int]]]:
    """The lengths of each timed step. Their mean is 194 tokens, with `every` 2 199; all 7473 rows of the training set have 197."""
    return _windows(LENGTHS[::every], BATCH // every)


def _windows(lengths: list[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    return [lengths[i * size : (i + 1) * size] for i in range(FIRST, FIRST + UNITS * WINDOWS)]


def prepare(directory: Path, device: str, every: int = 1) -> dict[str, Any]:
    """`every` 2: every second example, steps of half as many, where one takes long."""
    sizes = workload.M if device == "cpu" else workload.LLAMA_7B
    times = 1 if device == "cpu" else GPU_TIMES
    mean = sum(p + a for p, a in LENGTHS) / len(LENGTHS)
    windows = _windows(LENGTHS[::every] * times, BATCH * times // every)
    warmup = 1 if every > 1 else UNITS  # kernels are built for bf16 alone
    # backwards, the longest last: no side's memory grows in a timed step. The very last one ends the time of the one before
    run = itertools.chain(*reversed(windows[: warmup * WINDOWS]), *windows, windows[0])
    return {
        "models": workload.model(directory, sizes, device),
        "examples": workload.examples(directory, list(run), sizes["vocab_size"]),
        "batch_size": BATCH * times // every,
        "windows_per_unit": WINDOWS,
        "warmup": warmup,
        "units": UNITS,
        "losses": 2,
        "lr": 1e-5,
        "sizes": sizes,
        "flops_per_token": workload.flops_per_token(
            sizes, mean, learnt=sum(a for _, a in LENGTHS) / mean / len(LENGTHS)
        ),
        "gemms": workload.gemms(sizes, int(BATCH * mean / every)),
    }


def prepare_lora(directory: Path, device: str) -> dict[str, Any]:
    wants_gpu(device)
    data = prepare(directory, device)
    return data | {"adapter": workload.adapter(directory, data["sizes"], data["models"]["bf16"]), "lr": 1e-4}


PADDED = {"pad_to": 512}
HALF = [
    own("ours-bf16", precision="bf16"),
    own("ours-bf16-compile", precision="bf16", compile=True),
    hf("hf-dynamic-autocast", "autocast", "hf-dynamic"),
    hf("hf-dynamic-bf16-compile", "bf16", "hf-dynamic-bf16", compile=True, dynamic=True),
    hf("hf-padded-autocast", "autocast", "hf-padded-512", **PADDED),
    hf("hf-padded-bf16-compile", "bf16", "hf-padded-bf16", compile=True, **PADDED),
    Side("trl-packing-bf16", "trl", "trl_train", {"mode": "bf16"}, "trl-packing", "bf16"),
    Side("litgpt-dynamic", "litgpt", "litgpt_train", {"mode": "bf16"}, "litgpt", "bf16"),
    Side("torchtune-dynamic", "torchtune", "torchtune_train", {"mode": "bf16"}, "torchtune", "bf16"),
]
FP32 = [
    own("ours-fp32", precision="fp32"),
    own("ours-fp32-compile", precision="fp32", compile=True),
    own("ours-bf16", "ours-bf16", precision="bf16"),
    hf("hf-dynamic-fp32", "fp32", "hf-dynamic"),
    hf("hf-dynamic-fp32-compile", "fp32", "hf-dynamic", compile=True, dynamic=True),
    hf("hf-padded-fp32-compile", "fp32", "hf-padded-512", compile=True, **PADDED),
    Side("trl-packing-fp32", "trl", "trl_train", {"mode": "fp32"}, "trl-packing"),
    Side("litgpt-dynamic-fp32", "litgpt", "litgpt_train", {"mode": "fp32"}, "litgpt"),
    Side("torchtune-dynamic-fp32", "torchtune", "torchtune_train", {"mode": "fp32"}, "torchtune"),
]
GOALS = [
    Goal("hf-dynamic", "speed", at_least=1.6),
    Goal("hf-dynamic-bf16", "speed", at_least=1.6),
    Goal("hf-padded-512", "speed", at_least=4.0),
    Goal("hf-padded-bf16", "speed", at_least=4.0),
    Goal("trl-packing", "speed", at_least=1.3),
    Goal("litgpt", "speed", at_least=1.0),
    Goal("torchtune", "speed", at_least=1.0),
]
LORA = [
    own("ours-bf16", precision="bf16", lora=True, file="bf16"),
    own("ours-bf16-compile", precision="bf16", lora=True, file="bf16", compile=True),
    hf("peft-autocast", "autocast", lora=True, file="bf16"),
    hf("peft-bf16-compile", "bf16", lora=True, file="bf16", compile=True, dynamic=True),
]
WHAT = "instruction tuning on GSM8K's lengths, answers only, 58 M parameters"
ROWS = [
    Row(
        "sft",
        f"{WHAT}, 8 examples a step (a GPU: a 7B, {BATCH * GPU_TIMES})",
        HALF,
        GOALS,
        prepare,
        [Goal(ITSELF, "speed", at_least=EPOCH / 110), *GOALS],  # an epoch in 110 s
    ),
    Row(
        "sft_lora_gpu",
        f"instruction tuning on GSM8K's lengths, answers only, LoRA r16 of a 7B, {BATCH * GPU_TIMES} examples a step",
        LORA,
        [Goal(ITSELF, "speed", at_least=EPOCH / 80), *(Goal(s.peer, "speed", at_least=1.0) for s in LORA[2:])],
        prepare_lora,
    ),
    Row(
        "sft_fp32",
        f"{WHAT}, 4 examples a step, for CPUs without instructions for bf16",
        FP32,
        [g for g in GOALS if g.peer in {s.peer for s in FP32}],
        functools.partial(prepare, every=2),
    ),
]
