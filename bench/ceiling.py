"""The least time of a training step on one CPU thread:
python -m bench.ceiling full_ft|lora|sft|sft_fp32 [--precision bf16|fp32] [--peer NAME=MS ..]

    floor   = every product of a step, in its fastest layout, + attention + softmax + fused AdamW      each alone, caches warm
    ceiling = a peer's unit / floor: no program made of these parts can be so many times faster than the peer

All parts are timed in one run, one after the other, by CPU time; the least of several passes counts. Not in the floor, though
every program has it: norms, rotary embedding, silu, casts of weights, sums of gradients, clipping, data. NAME=MS: a unit of the
row as `python -m bench.run ROW --threads 1` prints it. Attention is the fastest of flash and accessory/model/blocks.py, softmax
one pass in fp32 over a block in the caches. Test: tests/unit/test_ceiling.py
"""

import argparse
import functools
import itertools
from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch.nn import functional as F

from bench import measure, workload
from bench.rows import full_ft, sft

LAYOUTS = [(a, b) for a in (False, True) for b in (False, True)]  # is an operand held transposed?


@dataclass(frozen=True)
class Step:
    """One optimizer step: the sequences' lengths, and how many tokens have a label."""

    lengths: tuple[int, ...]
    learnt: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def steps_of(row: str) -> list[Step]:
    """Of one unit of the row; of sft, of all timed units."""
    if not row.startswith("sft"):
        count, length = full_ft.DENSE["cpu"]
        return [Step((length,) * count, count * (length - 1))]
    windows = sft.timed(2 if row == "sft_fp32" else 1)
    return [Step(tuple(p + a for p, a in w), sum(a for _, a in w)) for w in windows]


def linears(sizes: dict[str, Any]) -> list[tuple[int, int]]:
    """(in, out) of a layer's seven."""
    dim, ffn = sizes["dim"], sizes["hidden_dim"]
    kv = dim // sizes["n_heads"] * sizes["n_kv_heads"]
    return [(dim, dim), (dim, kv), (dim, kv), (dim, dim), (dim, ffn), (dim, ffn), (ffn, dim)]


def products(sizes: dict[str, Any], step: Step, rank: int = 0) -> list[tuple[int, int, int]]:
    """All of a step, (m, k, n). With a rank the base is frozen and each linear of the layers has an adapter."""
    found, trained = [], not rank
    for rows, k, n in [(step.tokens, *w) for w in linears(sizes)] * sizes["n_layers"]:
        found += _of_linear(rows, k, n, trained)
        if rank:
            found += _of_linear(rows, k, rank, True) + _of_linear(rows, rank, n, True)
    return found + _of_linear(step.learnt, sizes["dim"], sizes["vocab_size"], trained)


def _of_linear(rows: int, k: int, n: int, trained: bool) -> list[tuple[int, int, int]]:
    """Forward, the input's gradient, the weight's."""
    return [(rows, k, n), (rows, n, k)] + [(n, rows, k)] * trained


def least(call: Callable[[], Any], passes: int = 5, seconds: float = 0.05) -> float:
    """ms of CPU time of one call, of the best pass; a pass is as many calls as fill `seconds`."""
    call()
    start = measure.cpu_seconds()
    call()
    count = max(1, int(seconds / max(1e-6, measure.cpu_seconds() - start)))
    best = float("inf")
    for _ in range(passes):
        start = measure.cpu_seconds()
        for _ in range(count):
            call()
        best = min(best, (measure.cpu_seconds() - start) / count)
    return 1e3 * best


@functools.cache
def product_ms(dtype: torch.dtype, m: int, k: int, n: int) -> float:
    def drawn(a: bool, b: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return _drawn(dtype, m, k, a), _drawn(dtype, k, n, b)

    out = torch.empty(m, n, dtype=dtype)
    return min(least(functools.partial(torch.mm, *drawn(a, b), out=out), 3) for a, b in LAYOUTS)


def _drawn(dtype: torch.dtype, rows: int, columns: int, turned: bool) -> torch.Tensor:
    matrix = torch.randn(rows, columns).to(dtype)
    return matrix.t().contiguous().t() if turned else matrix


def attention_ms(dtype: torch.dtype, lengths: tuple[int, ...], heads: int, kv: int, size: int) -> float:
    """Forward and backward of these sequences in one row, the faster way."""
    from accessory.model import blocks

    bounds = [0, *itertools.accumulate(lengths)]
    q, k, v, g = (torch.randn(bounds[-1], n, size).to(dtype).requires_grad_() for n in (heads, kv, kv, heads))

    def flash(a: int, b: int) -> None:
        inputs = [t[a:b].detach().requires_grad_() for t in (q, k, v)]
        whole = (t.transpose(0, 1).repeat_interleave(heads // t.shape[1], 0).unsqueeze(0) for t in inputs)
        y = F.scaled_dot_product_attention(*whole, is_causal=True)[0].transpose(0, 1)
        torch.autograd.grad(y, inputs, g[a:b].detach())

    def by_blocks() -> None:
        torch.autograd.grad(blocks.attend(q, k, v, bounds), (q, k, v), g.detach())

    one_by_one = sum(least(functools.partial(flash, a, b)) for a, b in zip(bounds, bounds[1:]))
    return min(one_by_one, least(by_blocks))


def softmax_ms(rows: int, vocab: int) -> float:
    block = torch.randn(max(1, 2**18 // vocab), vocab)
    out = torch.empty_like(block)
    return least(lambda: torch.softmax(block, 1, out=out)) * rows / len(block)


def adamw_ms(sizes: dict[str, Any], rank: int) -> float:
    shapes = [s for k, n in linears(sizes) for s in ([(rank, k), (n, rank)] if rank else [(n, k)])] * sizes["n_layers"]
    if not rank:
        shapes += [(sizes["vocab_size"], sizes["dim"])] * 2
    held = [torch.zeros(s).requires_grad_() for s in shapes]
    for p in held:
        p.grad = torch.zeros_like(p)
    return least(torch.optim.AdamW(held, fused=True).step)


def parts(row: str, sizes: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """ms of a unit by part."""
    rank, steps = workload.RANK if row == "lora" else 0, steps_of(row)
    heads, kv, size = sizes["n_heads"], sizes["n_kv_heads"], sizes["dim"] // sizes["n_heads"]
    told = {
        "products": sum(product_ms(dtype, *p) for s in steps for p in products(sizes, s, rank)),
        "attention": sizes["n_layers"] * sum(attention_ms(dtype, s.lengths, heads, kv, size) for s in steps),
        "softmax": sum(softmax_ms(s.learnt, sizes["vocab_size"]) for s in steps),
        "AdamW": len(steps) * adamw_ms(sizes, rank),
    }
    units = sft.UNITS if row.startswith("sft") else 1
    return {k: v / units for k, v in told.items()}


def table(told: dict[str, float], peers: dict[str, float]) -> str:
    floor = sum(told.values())
    lines = [
        "| part | ms a unit |",
        "|---|---|",
        *(f"| {k} | {v:,.0f} |" for k, v in told.items()),
        f"| floor | {floor:,.0f} |",
    ]
    lines += [f"| {name}, {ms:,.0f} ms: at most | {ms / floor:.2f} |" for name, ms in peers.items()]
    return "\n".join(lines)


def named(text: str) -> tuple[str, float]:
    """NAME=MS"""
    name, _, ms = text.rpartition("=")
    try:
        return name, float(ms)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: NAME=MS, such as hf=2198") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=("full_ft", "lora", "sft", "sft_fp32"))
    parser.add_argument("--peer", type=named, action="append", default=[], metavar="NAME=MS")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    given = parser.parse_args()
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if given.precision == "bf16" else torch.float32
    print(table(parts(given.row, workload.M, dtype), dict(given.peer)))


if __name__ == "__main__":
    main()
