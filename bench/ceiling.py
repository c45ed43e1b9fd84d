"""The least time of a training step on one CPU thread:
python -m bench.ceiling full_ft|lora|sft|sft_fp32 [--precision bf16|fp32] [--peer NAME=MS ..]

    floor   = every product of a step, in its fastest layout, + attention + softmax + silu + a pass for whatever else a layer
              does + what is done to every weight once a step                                                  each alone
    ceiling = a peer's unit / floor: no program made of these parts can be so many times faster than the peer

All parts are timed in one run, one after the other, by CPU time; the least of several passes counts. Weights and their gradients
lie in memory, as in a step, in which every cache has been through all the others meanwhile; what a layer computes lies in the
caches. Not in the floor, though every program has it: fresh memory, sums over chunks, data, the interpreter. NAME=MS: a unit of
the row as `python -m bench.run ROW --threads 1` prints it. Test: tests/unit/test_ceiling.py

    attention   the faster of flash and accessory/model/blocks.py, forward and backward
    softmax     of the head's logits, one pass in fp32 over a block in the caches
    silu        forward and backward, the products with it for nothing
    passes      norms, residuals and rotary embedding: each reads its input once and writes its result once, both ways
    weights     casts from fp32 and of the gradients to it, the embedding's gradient cleared, the gradients' norm, fused AdamW;
                or the last three in 16 bit where that takes less
"""

import argparse
import functools
import itertools
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import measure, workload
from bench.rows import full_ft, sft

LAYOUTS = [(a, b) for a in (False, True) for b in (False, True)]  # is an operand held transposed?
BEYOND_CACHES = 2**27  # bytes


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


def products(sizes: dict[str, Any], step: Step, rank: int = 0) -> list[tuple[int, int, int, bool]]:
    """All of a step, (m, k, n) and whether the result is a weight's gradient; if not, the second operand is a weight. With a
    rank the base is frozen and each linear of the layers has an adapter."""
    found, trained = [], not rank
    for rows, k, n in [(step.tokens, *w) for w in linears(sizes)] * sizes["n_layers"]:
        found += _of_linear(rows, k, n, trained)
        if rank:
            found += _of_linear(rows, k, rank, True) + _of_linear(rows, rank, n, True)
    return found + _of_linear(step.learnt, sizes["dim"], sizes["vocab_size"], trained)


def _of_linear(rows: int, k: int, n: int, trained: bool) -> list[tuple[int, int, int, bool]]:
    """Forward, the input's gradient, the weight's."""
    return [(rows, k, n, False), (rows, n, k, False)] + [(n, rows, k, True)] * trained


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
def product_ms(dtype: torch.dtype, m: int, k: int, n: int, of_weight: bool) -> float:
    return min(_product_ms(dtype, m, k, n, of_weight, *layout) for layout in LAYOUTS)


def _product_ms(dtype: torch.dtype, m: int, k: int, n: int, of_weight: bool, a: bool, b: bool) -> float:
    left, right, out = _drawn(dtype, m, k, a), _drawn(dtype, k, n, b), torch.empty(m, n, dtype=dtype)
    weights = in_turn(out if of_weight else right)
    if of_weight:
        return least(lambda: torch.mm(left, right, out=next(weights)), 3)
    return least(lambda: torch.mm(left, next(weights), out=out), 3)


def _drawn(dtype: torch.dtype, rows: int, columns: int, turned: bool) -> Tensor:
    matrix = torch.randn(rows, columns).to(dtype)
    return matrix.t().contiguous().t() if turned else matrix


def in_turn(tensor: Tensor) -> Iterator[Tensor]:
    """Copies of it for ever, so many that each has left the caches when its turn comes again."""
    count = 1 + BEYOND_CACHES // (tensor.numel() * tensor.element_size())
    return itertools.cycle([tensor.clone() for _ in range(count)])


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


def silu_ms(dtype: torch.dtype, rows: int, width: int) -> float:
    x, g, out = (torch.randn(rows, width).to(dtype) for _ in range(3))
    forward = least(lambda: torch.ops.aten.silu.out(x, out=out))
    return forward + least(lambda: torch.ops.aten.silu_backward.grad_input(g, x, grad_input=out))


def passes_ms(dtype: torch.dtype, sizes: dict[str, Any], rows: int) -> float:
    """Of one step: each norm with its residual, and the rotary embedding of q and k; forward and backward."""
    layers, dim, kv = sizes["n_layers"], sizes["dim"], sizes["dim"] // sizes["n_heads"] * sizes["n_kv_heads"]
    x, out = (torch.randn(rows, dim + kv).to(dtype) for _ in range(2))
    one = least(lambda: out[:, :dim].copy_(x[:, :dim]))
    return 2 * ((2 * layers + 1) * one + layers * least(lambda: out.copy_(x)))


def weights_ms(sizes: dict[str, Any], rank: int, dtype: torch.dtype) -> float:
    """Of one step: what is done to all that is trained, or to its gradient, but for products."""
    shapes = [s for k, n in linears(sizes) for s in ([(rank, k), (n, rank)] if rank else [(n, k)])] * sizes["n_layers"]
    shapes += [(sizes["vocab_size"], sizes["dim"])] * (0 if rank else 2)
    masters = [torch.zeros(s) for s in shapes]
    if dtype == torch.float32:
        return _update_ms(masters, not rank)
    half = [w.to(dtype) for w in masters]
    casts = least(lambda: [h.copy_(w) for h, w in zip(half, masters)])
    casts += least(lambda: [w.copy_(h) for h, w in zip(half, masters)])
    return min(casts + _update_ms(masters, not rank), _update_ms(half, not rank))


def _update_ms(held: list[Tensor], embedding: bool) -> float:
    for p in held:
        p.requires_grad_().grad = torch.zeros_like(p)
    gradients = [p.grad for p in held]
    told = least(lambda: torch._foreach_norm(gradients)) + least(torch.optim.AdamW(held, fused=True).step)
    if not embedding:
        return told
    tables = in_turn(gradients[-1])
    return told + least(lambda: next(tables).zero_())


def parts(row: str, sizes: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """ms of a unit by part."""
    rank, steps = workload.RANK if row == "lora" else 0, steps_of(row)
    heads, kv, size = sizes["n_heads"], sizes["n_kv_heads"], sizes["dim"] // sizes["n_heads"]
    told = {
        "products": sum(product_ms(dtype, *p) for s in steps for p in products(sizes, s, rank)),
        "attention": sizes["n_layers"] * sum(attention_ms(dtype, s.lengths, heads, kv, size) for s in steps),
        "softmax": sum(softmax_ms(s.learnt, sizes["vocab_size"]) for s in steps),
        "silu": sizes["n_layers"] * sum(silu_ms(dtype, s.tokens, sizes["hidden_dim"]) for s in steps),
        "passes": sum(passes_ms(dtype, sizes, s.tokens) for s in steps),
        "weights": len(steps) * weights_ms(sizes, rank, dtype),
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
