"""What a conversion mapped to what, one line per kind of tensor instead of one per layer.

    layers.{0..31}.attention.wq.weight -> model.layers.{0..31}.self_attn.q_proj.weight   32 x 4096x4096 bf16

Layers that have another shape or dtype, or that went elsewhere, get a line of their own, so that an odd one is seen.
Test: tests/unit/test_writers.py
"""

import re
from collections.abc import Iterable, Sequence

import torch

SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
Pair = tuple[str, str, tuple[int, ...], torch.dtype]


def mapping_lines(pairs: Iterable[Pair]) -> list[str]:
    """(source name, target name, shape, dtype) of every tensor -> aligned lines, in the order in which kinds first appear.

    The first number between dots is the layer's. A name that stays the same is shown once."""
    kinds: dict[tuple, list[tuple[int | None, int | None]]] = {}
    for source, target, shape, dtype in pairs:
        (old, layer), (new, other) = _split(source), _split(target)
        kinds.setdefault((old, new, shape, dtype), []).append((layer, other))
    left, right = [], []
    for (old, new, shape, dtype), layers in kinds.items():
        layers.sort(key=lambda pair: tuple(-1 if n is None else n for n in pair))  # files sort 10 before 2
        before, after = _named(old, [a for a, _ in layers]), _named(new, [b for _, b in layers])
        left.append(before if before == after else f"{before} -> {after}")
        size = f"{'x'.join(map(str, shape)) or 'scalar'} {SHORT.get(dtype, str(dtype).removeprefix('torch.'))}"
        right.append(f"{len(layers)} x {size}" if len(layers) > 1 else size)
    width = max(map(len, left), default=0)
    return [f"{names:<{width}}   {sizes}" for names, sizes in zip(left, right)]


def _split(name: str) -> tuple[str, int | None]:
    """layers.3.attention.wq.weight -> ('layers.{}.attention.wq.weight', 3)"""
    match = re.search(r"(?<=\.)\d+(?=\.)", name)
    return (f"{name[: match.start()]}{{}}{name[match.end() :]}", int(match[0])) if match else (name, None)


def _named(pattern: str, layers: Sequence[int | None]) -> str:
    numbers = [n for n in layers if n is not None]
    if not numbers:
        return pattern
    return pattern.replace("{}", f"{{{_ranges(numbers)}}}" if len(numbers) > 1 else str(numbers[0]), 1)


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> 0..2,5 (a target stays beside its source)."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)
