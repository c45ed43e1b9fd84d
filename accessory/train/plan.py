"""What a run will do and hold, before it starts: parameters, the trained set, memory per rank, steps, tokens.

    weights + gradients + moments   exact: counted from the model (NF4 as it is held), cut over mp and dp; once more, without gradients, for the copy
                                    that is written while training goes on (in host memory: not counted on a GPU)
    widened                         a linear's input and output in fp32, where the CPU does not multiply 16 bit (parallel/products.py)
    gathered layers                 what FSDP puts together at one moment, in the compute dtype, under NF4 as held; one weight without FSDP
    activations                     values a token and layer, autograd's saved tensors (SAVED, tests/unit/test_checkpointing.py):
                                    4 D + (A + 3 F) / mp, selective 2 D + (A + 2 F) / mp, full D; sequence parallel: all / mp
                                    A: q, k, v and attention's result, k and v as wide as q but where a kernel takes groups
                                    and on a CPU what attention by blocks keeps (model/blocks.py)
    gradients                       on a GPU, of a single micro batch: what they have beyond the activations, whose place they take
    the program itself              Python, torch, libraries: measured

The largest micro batch counts: the `batch_size` longest examples. docs/parallelism.md has the estimate beside measured peaks.
"""

import os
from pathlib import Path
from typing import Any

import torch

from accessory.flags import ParallelArgs
from accessory.model import attention, blocks
from accessory.model.llama import Transformer, global_shape
from accessory.model.lora import packed_weights
from accessory.parallel import groups, products
from accessory.parallel.fsdp import DTYPES
from accessory.parallel.loss import BLOCK, rows_of_chunk
from accessory.train.lowbit import BYTES

PROGRAM_GB = 0.55  # resident before any weight is read, on CPU; on a GPU it is not on the device
UNPACKING = 6  # bytes a weight while a linear held in NF4 is at work: looked up in fp32, then cast
# What a layer keeps a token: times D replicated over mp (inputs, norms); of this rank's slice times attention's, times F
SAVED = {"none": (4, 1, 3), "selective": (2, 1, 2), "full": (1, 0, 0)}
FILLED = 0.9  # of free memory: auto leaves the rest to what no plan knows


def plan(
    model: Transformer,
    checkpoint: Any,
    parallel: ParallelArgs,
    loop_args: Any,
    optim_args: Any,
    train_set: Any,
    max_steps: int,
) -> dict[str, Any]:
    """The figures, from the empty model. Bytes in 10^9 (GB). No weights are read."""
    dp = 1 if parallel.data_parallel == "ddp" else groups.dp_size()
    known = set(checkpoint.source.names())
    compute = DTYPES[parallel.precision].itemsize
    wide = products.wide(torch.empty(0, dtype=DTYPES[parallel.precision], device=groups.device())).element_size()
    tokens = sum(longest(train_set, loop_args.batch_size))
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
    trained_count = sum(p.numel() for _, p in trained)
    packed = packed_weights(model)
    held = {n: checkpoint.source.dtype(n).itemsize for n in known - packed.keys()}  # bytes a number
    frozen_bytes = sum(p.nbytes if n in packed else p.numel() * held.get(n, 4) for n, p in frozen)
    sharded = groups.dp_size() > 1 or parallel.cpu_offload

    def whole(name: str, p: torch.nn.Parameter) -> int:
        """Bytes of a parameter that FSDP has gathered: a layer with packed weights as it is held, all others cast."""
        if name in packed:
            return p.nbytes
        if packed and name.startswith("layers."):
            return p.numel() * (4 if p.requires_grad else held.get(name, 4))
        return p.numel() * compute

    block = sum(whole(f"layers.0.{n}", p) for n, p in model.layers[0].named_parameters())
    root = sum(whole(n, p) for n, p in model.named_parameters() if not n.startswith("layers."))
    gathered = root + block * (2 if parallel.data_parallel == "fsdp" else len(model.layers))
    if not sharded:  # no FSDP: the largest weight that is cast while it is used
        sizes = [(p.numel(), 4) for _, p in trained] + [
            (p.numel(), held.get(n, 4)) for n, p in frozen if n not in packed
        ]
        gathered = max((count * compute for count, size in sizes if size != compute), default=0)
    grouped = attention.keeps_groups(groups.device(), DTYPES[parallel.precision])
    kept = {
        mode: activations(model, tokens, compute, mode, parallel.sequence_parallel, wide, grouped) for mode in SAVED
    }
    if model.layers[0].attention.wq.weight.requires_grad:
        heads = len(model.layers) * model.args.n_heads / groups.mp_size()
        kept["none"] += tokens * heads * blocks.kept_bytes(groups.device(), DTYPES[parallel.precision])
    gradients = trained_count * 4 / dp
    alone = loop_args.sequences_per_step(groups.dp_size()) <= loop_args.batch_size * groups.dp_size()
    in_place = alone and groups.device().type == "cuda"  # malloc does not give back all that is freed
    beside = {mode: max(0.0, gradients - kept[mode]) if in_place else gradients for mode in SAVED}
    gigabytes = {
        "weights": (trained_count * 4 + frozen_bytes) / dp,
        "gradients": 0.0,
        "optimizer": trained_count * BYTES[optim_args.optim_states] / dp,
        "gathered": gathered,
        "widened": wide * tokens * (model.args.dim + model.args.ffn_dim) if wide != compute else 0,
        "unpacked": UNPACKING * max((m.packed.rows * m.packed.columns for m in packed.values()), default=0),
        "activations": 0.0,
        "loss": rows_of_chunk(model.head, wide, tokens, compute if sharded else 4) * wide * model.head.shape[0]
        + 8 * BLOCK[groups.device().type]
        + (4 * model.head.numel() if model.head.requires_grad else 0),
        "checkpoint": trained_count * (8 if optim_args.optim_states == "bf16" else 12) / dp
        if groups.device().type == "cpu"
        else 0,  # the copy that is being saved
        "program": PROGRAM_GB * 1e9 if groups.device().type == "cpu" else 0,
    }
    free, mode = None, parallel.checkpointing
    if mode == "auto":
        free = free_bytes()
        others = sum(v for k, v in gigabytes.items() if k != "program")  # which is there already
        mode = fitting({m: kept[m] + beside[m] for m in SAVED}, FILLED * free - others)
    gigabytes |= {"activations": kept[mode], "gradients": beside[mode]}
    totals = whole_counts(model, trained)
    report = train_set.report
    return {
        "parameters": totals[0], "trained": totals[1], "trained_names": kinds([n for n, _ in trained]),
        "mp": groups.mp_size(), "dp": groups.dp_size(), "data_parallel": parallel.data_parallel, "precision": parallel.precision,
        "checkpointing": mode, "free": free, "sequence_parallel": parallel.sequence_parallel,
        "gigabytes": {k: v / 1e9 for k, v in gigabytes.items()}, "steps": max_steps, "warmup": optim_args.warmup(max_steps),
        "sequences_per_step": loop_args.sequences_per_step(groups.dp_size()), "largest_micro_batch": tokens,
        "tokens_per_epoch": report.tokens, "supervised_per_epoch": report.supervised_tokens,
    }  # fmt: skip


def longest(train_set: Any, count: int) -> list[int]:
    """Tokens of the `count` longest items: the data set's own answer, or all of them looked at."""
    if hasattr(train_set, "longest"):
        return train_set.longest(count)
    return sorted((len(train_set[i].ids) for i in range(len(train_set))), reverse=True)[:count]


def activations(
    model: Transformer,
    tokens: int,
    compute: int,
    checkpointing: str,
    divided: bool,
    wide: int | None = None,
    grouped: bool = False,
) -> float:
    """Bytes kept for backward at the moment when it begins, for one micro batch of so many tokens. `divided`: sequence
    parallel, which cuts over mp what would be replicated. compute, wide: bytes a number, of the latter where products are
    taken in it: attention then keeps q, k, v and its result so, and q, k, v not as they were. `grouped`: k and v are kept
    once a kv head."""
    args, mp, layers = model.args, groups.mp_size(), len(model.layers)
    heads = args.n_heads * args.head_size / mp
    kv_heads = max(args.kv_heads / mp, 1) * args.head_size if grouped else heads

    def of_layer(mode: str) -> float:
        whole, attended, ffn = SAVED[mode]
        numbers = (
            whole * args.dim / (mp if divided else 1) + attended * 2 * (heads + kv_heads) + ffn * args.ffn_dim / mp
        )
        widened = (4 * wide - 3 * compute) * heads if wide not in (None, compute) and mode != "full" else 0
        return tokens * (compute * numbers + widened)

    return layers * of_layer(checkpointing) + (of_layer("none") if checkpointing == "full" else 0)  # the one made again


def fitting(kept: dict[str, float], room: float) -> str:
    """--checkpointing auto: the first way whose activations have room, which is the fastest; full if none does. The same on
    all ranks: the one with least room decides. Collective."""
    modes = list(kept)
    first = next((i for i, mode in enumerate(modes) if kept[mode] <= room), len(modes) - 1)
    return modes[int(groups.all_reduce(torch.tensor(first), op="max"))]


def free_bytes() -> float:
    """Memory of this rank's device that nobody has taken. On CPU its share of what the machine, and a container, still has.
    ValueError where that cannot be read."""
    device = groups.device()
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        raise ValueError(
            "--checkpointing auto: the free memory of this system cannot be read: choose none, selective or full"
        ) from None
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (most := limit.read_text().strip()) != "max":  # a container's
        stat = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
        used = int(limit.with_name("memory.current").read_text()) - int(stat["inactive_file"])
        free = min(free, int(most) - used)
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def whole_counts(model: Transformer, trained: list) -> tuple[int, int]:
    """(all, trained) parameters of the unsharded model: true vocabulary rows, kv heads once, adapters whole."""
    names = {n for n, _ in trained}
    everything = learned = 0
    for name, parameter in model.named_parameters():
        rank = parameter.shape[0] if ".lora_a." in name else parameter.shape[-1]
        count = torch.Size(global_shape(model.args, name, rank)).numel()
        everything += count
        learned += count if name in names else 0
    return everything, learned


def kinds(names: list[str]) -> list[str]:
    """The names in a few words: a layer's number as *, and names that differ in one part only together in braces."""
    found = list(dict.fromkeys(tuple("*" if part.isdigit() else part for part in n.split(".")) for n in names))
    for place in range(-2, -5, -1):
        together: dict[tuple, list[str]] = {}
        for parts in found:
            key = parts if len(parts) < -place else (*parts[:place], None, *parts[len(parts) + place + 1 :])
            together.setdefault(key, []).append(parts[place] if len(parts) >= -place else "")
        found = [tuple(_braces(v) if p is None else p for p in key) for key, v in together.items()]
    return [".".join(parts) for parts in found]


def _braces(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else "{" + ",".join(parts) + "}"


def lines(figures: dict[str, Any]) -> list[str]:
    """The plan in words."""
    gb = figures["gigabytes"]
    share = figures["trained"] / figures["parameters"]
    parts = ", ".join(f"{k} {v:.2f}" for k, v in gb.items() if v >= 0.005)
    return [
        f"model: {figures['parameters']:,} parameters; trained: {figures['trained']:,} ({share:.2%}): {', '.join(figures['trained_names'])}",
        f"layout: model parallel {figures['mp']}{' with sequence parallel' if figures['sequence_parallel'] else ''} x data parallel {figures['dp']} ({figures['data_parallel']}), {figures['precision']}",
        f"memory per rank: about {sum(gb.values()):.2f} GB at the peak ({parts}) with a micro batch of {figures['largest_micro_batch']} tokens",
        *(
            [f"checkpointing: {figures['checkpointing']}, chosen for {figures['free'] / 1e9:.2f} GB of free memory"]
            if figures["free"] is not None
            else []
        ),
        f"steps: {figures['steps']} of {figures['sequences_per_step']} sequences (warm-up {figures['warmup']}); an epoch is {figures['tokens_per_epoch']:,} tokens, {figures['supervised_per_epoch']:,} with loss",
    ]
