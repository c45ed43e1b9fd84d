"""The least time of a training step on one CPU thread, beside peers and beside ours:
python -m bench.ceiling full_ft|full_ft_smollm2|lora|lora_smollm2|sft|sft_fp32 [--precision bf16|fp32] [--beside SIDE,..] [--rounds 3]

    floor   = every product of a step, in its fastest layout, + attention + softmax + silu + a pass for whatever else a layer
              does + what is done to every weight once a step: all of a unit's, and nothing else
    ceiling = a side's unit / the floor's: no program made of these parts can be so many times faster than the side

floor A floor B floor ..: the sides of the row run as `python -m bench.run ROW --threads 1` runs them, between floors, and each
is compared with the mean of the two beside it; the median of the rounds counts. For a machine's rate may change from one minute
to the next, and a floor of its best minute beside a peer of another says nothing. Both are told: each part's mean, and its least.

By CPU time. Weights and their gradients lie in memory, as in a step, in which every cache has been through all the others
meanwhile; what a layer computes lies in the caches. Not in the floor, though every program has it: fresh memory, sums over
chunks, data, the interpreter, kernels built for a new shape. Test: tests/unit/test_ceiling.py

    products    operands held either way, rows as they are or rounded up to 32
    attention   the faster of flash and accessory/model/blocks.py, forward and backward
    softmax     of the head's logits, in fp32 over a block in the caches: torch's own, or exp and the sums, whichever is faster
    silu        forward and backward, the products with it for nothing
    passes      norms, residuals and rotary embedding: each reads its input once and writes its result once, both ways
    weights     casts from fp32 and of the gradients to it, the embedding's gradient cleared, the gradients' norm, fused AdamW;
                or the last three in 16 bit where that takes less
"""

import argparse
import collections
import functools
import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import run, verdict, workload
from bench.rows import Absent, Row, full_ft, sft

LAYOUTS = [(a, b) for a in (False, True) for b in (False, True)]  # is an operand held transposed?
BEYOND_CACHES = 2**27  # bytes
ROWS = ("full_ft", "full_ft_smollm2", "lora", "lora_smollm2", "sft", "sft_fp32")

Call = Callable[[], Any]


@dataclass(frozen=True)
class Step:
    """One optimizer step: the sequences' lengths, and how many tokens have a label."""

    lengths: tuple[int, ...]
    learnt: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Part:
    """What a floor does `count` times."""

    name: str
    call: Call
    count: int


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


def fastest(calls: Sequence[Call], passes: int = 5, seconds: float = 0.02) -> Call:
    """The one whose best pass takes least CPU time. They take turns; a pass is as many calls as fill `seconds`."""
    if len(calls) == 1:
        return calls[0]
    best, counts = [float("inf")] * len(calls), [0] * len(calls)
    for _ in range(1 + passes):
        for i, call in enumerate(calls):
            taken = cpu_ms(call, counts[i] or 2) / (counts[i] or 2)
            if counts[i]:
                best[i] = min(best[i], taken)
            else:  # the first pass, in which kernels are built
                counts[i] = max(1, int(1e3 * seconds / max(1e-3, taken)))
    return calls[best.index(min(best))]


def cpu_ms(call: Call, count: int = 1) -> float:
    start = time.process_time()
    for _ in range(count):
        call()
    return 1e3 * (time.process_time() - start)


def product(dtype: torch.dtype, m: int, k: int, n: int, of_weight: bool) -> Call:
    """The fastest way."""
    rows = k if of_weight else m
    sizes = {(m, k + up) if of_weight else (m + up, k) for up in (0, -rows % 32)}
    return fastest([_product(dtype, *s, n, of_weight, *layout) for s in sorted(sizes) for layout in LAYOUTS])


def _product(dtype: torch.dtype, m: int, k: int, n: int, of_weight: bool, a: bool, b: bool) -> Call:
    left, out = _drawn(dtype, m, k, a), torch.empty(m, n, dtype=dtype)
    if of_weight:
        right, results = _drawn(dtype, k, n, b), _weights(dtype, m, n, False)
        return lambda: torch.mm(left, right, out=next(results))
    weights = _weights(dtype, k, n, b)
    return lambda: torch.mm(left, next(weights), out=out)


def _drawn(dtype: torch.dtype, rows: int, columns: int, turned: bool) -> Tensor:
    matrix = torch.randn(rows, columns).to(dtype)
    return matrix.t().contiguous().t() if turned else matrix


@functools.cache
def _weights(dtype: torch.dtype, rows: int, columns: int, turned: bool) -> Iterator[Tensor]:
    return in_turn(_drawn(dtype, rows, columns, turned))


def in_turn(tensor: Tensor) -> Iterator[Tensor]:
    """Copies of it for ever, so many that each has left the caches when its turn comes again."""
    count = 1 + BEYOND_CACHES // (tensor.numel() * tensor.element_size())
    return itertools.cycle([tensor.clone() for _ in range(count)])


def attention(dtype: torch.dtype, lengths: tuple[int, ...], heads: int, kv: int, size: int) -> Call:
    """Forward and backward of these sequences in one row, the faster way."""
    from accessory.model import blocks

    bounds = [0, *itertools.accumulate(lengths)]
    q, k, v, g = (torch.randn(bounds[-1], n, size).to(dtype).requires_grad_() for n in (heads, kv, kv, heads))

    def flash() -> None:
        for a, b in zip(bounds, bounds[1:]):
            inputs = [t[a:b].detach().requires_grad_() for t in (q, k, v)]
            whole = (t.transpose(0, 1).repeat_interleave(heads // t.shape[1], 0).unsqueeze(0) for t in inputs)
            y = F.scaled_dot_product_attention(*whole, is_causal=True)[0].transpose(0, 1)
            torch.autograd.grad(y, inputs, g[a:b].detach())

    def by_blocks() -> None:
        torch.autograd.grad(blocks.attend(q, k, v, bounds), (q, k, v), g.detach())

    return fastest([flash, by_blocks])


def softmax(rows: int, vocab: int) -> Call:
    block = torch.randn(max(1, 2**18 // vocab), vocab)
    out, whole, rest = torch.empty_like(block), rows // len(block), rows % len(block)

    def own(x: Tensor, to: Tensor) -> None:
        torch.softmax(x, 1, out=to)

    def by_exp(x: Tensor, to: Tensor) -> None:
        torch.exp(x, out=to).sum(1)

    def blocks(one: Callable[[Tensor, Tensor], None]) -> None:
        for _ in range(whole):
            one(block, out)
        one(block[:rest], out[:rest])

    return fastest([functools.partial(blocks, own), functools.partial(blocks, by_exp)])


def silu(dtype: torch.dtype, rows: int, width: int) -> Call:
    x, g, out = (torch.randn(rows, width).to(dtype) for _ in range(3))

    def both_ways() -> None:
        torch.ops.aten.silu.out(x, out=out)
        torch.ops.aten.silu_backward.grad_input(g, x, grad_input=out)

    return both_ways


def passes(dtype: torch.dtype, sizes: dict[str, Any], rows: int) -> Call:
    """Of one step: each norm with its residual, and the rotary embedding of q and k; forward and backward."""
    layers, dim, kv = sizes["n_layers"], sizes["dim"], sizes["dim"] // sizes["n_heads"] * sizes["n_kv_heads"]
    x, out = (torch.randn(rows, dim + kv).to(dtype) for _ in range(2))

    def both_ways() -> None:
        for _ in range(2 * (2 * layers + 1)):
            out[:, :dim].copy_(x[:, :dim])
        for _ in range(2 * layers):
            out.copy_(x)

    return both_ways


def weights(sizes: dict[str, Any], rank: int, dtype: torch.dtype) -> Call:
    """Of one step: what is done to all that is trained, or to its gradient, but for products."""
    shapes = [s for k, n in linears(sizes) for s in ([(rank, k), (n, rank)] if rank else [(n, k)])] * sizes["n_layers"]
    shapes += [(sizes["vocab_size"], sizes["dim"])] * (0 if rank else 1 + (not sizes.get("tie_word_embeddings")))
    masters = [torch.zeros(s) for s in shapes]
    if dtype == torch.float32:
        return _update(masters, not rank)
    half = [w.to(dtype) for w in masters]
    update = _update(masters, not rank)

    def with_casts() -> None:
        for h, w in zip(half, masters):
            h.copy_(w)
        for h, w in zip(half, masters):
            w.grad.copy_(h)
        update()

    return fastest([with_casts, _update([w.clone() for w in half], not rank)])


def _update(held: list[Tensor], embedding: bool) -> Call:
    for p in held:
        p.requires_grad_().grad = torch.zeros_like(p)
    gradients, optimizer = [p.grad for p in held], torch.optim.AdamW(held, fused=True)

    def update() -> None:
        if embedding:
            gradients[-1].zero_()
        torch._foreach_norm(gradients)
        optimizer.step()

    return torch.no_grad()(update)


def parts(row: str, sizes: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> list[Part]:
    """Of all steps of `steps_of`."""
    rank = workload.RANK if row.startswith("lora") else 0
    heads, kv, size, layers = sizes["n_heads"], sizes["n_kv_heads"], sizes["dim"] // sizes["n_heads"], sizes["n_layers"]
    found, update = [], weights(sizes, rank, dtype)
    for step in steps_of(row):
        counted = collections.Counter(products(sizes, step, rank))
        found += [Part("products", product(dtype, *p), count) for p, count in counted.items()]
        found += [
            Part("attention", attention(dtype, step.lengths, heads, kv, size), layers),
            Part("softmax", softmax(step.learnt, sizes["vocab_size"]), 1),
            Part("silu", silu(dtype, step.tokens, sizes["hidden_dim"]), layers),
            Part("passes", passes(dtype, sizes, step.tokens), 1),
            Part("weights", update, 1),
        ]
    return found


def floor(found: list[Part], units: int) -> dict[str, float]:
    """All of it once -> ms of a unit by part's name."""
    told: dict[str, float] = collections.defaultdict(float)
    for part in found:
        told[part.name] += cpu_ms(part.call, part.count) / units
    return dict(told)


def table(floors: list[dict[str, float]], sides: dict[str, list[float]]) -> str:
    """floors: before the first round and after each side; sides: ms of each round, in the order in which they ran."""
    whole = [sum(f.values()) for f in floors]
    lines = ["| part | ms a unit | least |", "|---|---|---|"]
    for name in floors[0]:
        lines.append(
            f"| {name} | {statistics.mean(f[name] for f in floors):,.0f} | {min(f[name] for f in floors):,.0f} |"
        )
    least = sum(min(f[name] for f in floors) for name in floors[0])
    lines.append(f"| floor | {statistics.mean(whole):,.0f} | {least:,.0f} |")
    if sides:
        lines += ["", "| side | ms a unit | over the floor beside it | of the rounds |", "|---|---|---|---|"]
    for i, (name, rounds) in enumerate(sides.items()):
        places = [i + len(sides) * r for r in range(len(rounds))]
        ratios = [2 * ms / (whole[p] + whole[p + 1]) for p, ms in zip(places, rounds)]
        middle = statistics.median(ratios)
        lines.append(
            f"| {name} | {statistics.median(rounds):,.0f} | {middle:.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"
        )
    return "\n".join(lines)


def beside(row: Row, names: list[str], rounds: int, dtype: torch.dtype) -> str:
    """Floors and sides in turn -> the table. Raises ValueError with a side's last words where one fails."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        data = row.prepare(Path(scratch), "cpu")
        found, units = parts(row.name, data["sizes"], dtype), sft.UNITS if row.name.startswith("sft") else 1
        floors, sides = [floor(found, units)], {name: [] for name in names}
        for number in range(rounds):
            for side in (s for name in names for s in row.sides if s.name == name):
                result = run.run_side(side, data, "cpu", 1, Path(scratch))
                if "error" in result:
                    raise ValueError(f"{side.name}: {result['error']}")
                sides[side.name].append(1e3 * verdict.seconds_of(result, "cpu_seconds"))
                floors.append(floor(found, units))
                told = f"{sides[side.name][-1]:,.0f} ms a unit, the floor {sum(floors[-1].values()):,.0f}"
                print(f"{row.name} round {number + 1} {side.name}: {told}", file=sys.stderr, flush=True)
        floors += [floor(found, units) for _ in range(0 if names else rounds)]
    return table(floors, sides)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--beside", default="", metavar="SIDE,..", help="sides of the row by name")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("bf16", "fp32"))
    given = parser.parse_args()
    row, names = run.all_rows()[given.row], [name for name in given.beside.split(",") if name]
    if wrong := sorted(set(names) - {s.name for s in row.sides}):
        parser.error(f"--beside {wrong[0]}: no such side; there are {', '.join(s.name for s in row.sides)}")
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds}: it must be 1 or more")
    torch.set_num_threads(1)
    precision = given.precision or ("fp32" if given.row == "sft_fp32" else "bf16")
    try:
        print(beside(row, names, given.rounds, torch.bfloat16 if precision == "bf16" else torch.float32))
    except (Absent, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
