"""NF4 weights with double quantisation (QLoRA, Dettmers et al. 2023), computed as bitsandbytes does, in plain torch.

    W (out, in)      rows in blocks of 16:  code = nearest of 16 levels to W / absmax, two codes a byte      4     bits a weight
    absmax           less its mean over W, in blocks of 256 along the rows: nearest of 256 levels, times scale  0.5
    mean, scales     fp32                                                                                    0.008

    one flat tensor   [ mean, scales | codes of absmax | codes of W | padding to 4 bytes ]     seen as numbers of STORAGE

`pack` makes it of a rank's slice, each weight to its nearest level unless calibrate.py chooses better; `dequantise` gives the
slice back, `linear` computes x W^T and keeps only the packed bytes for backward. Blocks lie as they do in the whole matrix, and
mean and scales are the whole's: every mp size holds the very same numbers. STORAGE is what FSDP hands on bit for bit: 16 bit it
copies on a GPU by way of fp32, which leaves one NaN of all that there are (torch's foreach copy, 2.13 too), and whole numbers
it refuses before torch 2.13.

Shapes: rows, columns of this rank's slice; blocks: those that the slice touches, of one row. Test: tests/unit/test_quant.py,
tests/dist/test_quant.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from accessory.parallel import groups, products
from accessory.parallel.derivatives import by_hand

BLOCK = 16  # weights that share an absmax (bitsandbytes has 64, or 32 at least)
GROUP = 256  # absmaxes that share a scale
AT_ONCE = 2**24  # weights that are packed in one go
STORAGE = torch.float32
NF4_LEVELS = (  # quantiles of a normal distribution, scaled to [-1, 1], with a true zero: appendix E of the paper
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Layout(NamedTuple):
    """Where a slice lies in its matrix."""

    rows: int
    columns: int
    first_row: int
    first_column: int
    all_rows: int
    all_columns: int

    @property
    def row_blocks(self) -> int:
        """Blocks of a whole row; the last one may be short."""
        return -(-self.all_columns // BLOCK)

    @property
    def first_block(self) -> int:
        return self.first_column // BLOCK

    @property
    def blocks(self) -> int:
        """Blocks of a row that the slice touches: at a cut inside a block both ranks hold all of it."""
        return -(-(self.first_column + self.columns) // BLOCK) - self.first_block

    @property
    def needed_columns(self) -> tuple[int, int]:
        """[start, stop) of the whole's columns that `pack` wants of the slice's rows."""
        return self.first_block * BLOCK, min((self.first_block + self.blocks) * BLOCK, self.all_columns)

    @property
    def head(self) -> int:
        """fp32 numbers: the mean and every scale."""
        return 1 + -(-self.all_rows * self.row_blocks // GROUP)

    @property
    def nbytes(self) -> int:
        blocks = self.rows * self.blocks
        return -(-(4 * self.head + blocks + blocks * BLOCK // 2) // 4) * 4


@functools.cache
def dynamic_levels() -> tuple[float, ...]:
    """The 256 levels of an absmax: seven decades, each with twice the levels of the one below, both signs, 0 and 1
    (Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning")."""
    levels = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = ((bounds[:-1] + bounds[1:]) / 2 * 10.0 ** (exponent - 6)).tolist()
        levels += middles + [-m for m in middles]
    return tuple(sorted(levels))


def tables(device: torch.device | str) -> tuple[Tensor, Tensor]:
    """What `dequantise` looks up: the two weights of a byte (256, 2), the level of an absmax's code (256,); fp32."""
    levels = torch.tensor(NF4_LEVELS)
    pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), 1)  # the first weight is in the high half
    return pairs.to(device), torch.tensor(dynamic_levels()).to(device)


# (weight (rows, columns), absmax (rows, blocks) as it is kept) -> codes (rows, blocks * 16)
Rounding = Callable[[Tensor, Tensor], Tensor]


def pack(weight: Tensor, layout: Layout, storage: torch.dtype, rounding: Rounding | None = None) -> Tensor:
    """The flat packed tensor, `layout.nbytes` long, of a slice: weight (rows, stop - start) has `layout.needed_columns`.

    rounding: what chooses the levels; None: the nearest, of the exact absmax, as bitsandbytes does. Collective over mp: every
    rank of the group calls it with its slice of the same matrix."""
    start, stop = layout.needed_columns
    assert weight.shape == (layout.rows, stop - start), (tuple(weight.shape), layout)
    parts = weight.split(max(1, AT_ONCE // max(1, weight.shape[1])))
    absmax = torch.cat([_blocks(part).abs().amax(-1) for part in parts])  # (rows, blocks)
    head, absmax_codes = _quantise_absmax(absmax, layout)
    if rounding is None:
        codes = (
            _nearest(_blocks(p) * inverse(a).unsqueeze(-1), NF4_LEVELS) for p, a in zip(parts, _like(absmax, parts))
        )
    else:
        kept = _absmax(head, absmax_codes, layout, torch.tensor(dynamic_levels(), device=weight.device))
        codes = [rounding(weight, kept)]
    packed = torch.cat([_paired(c.reshape(-1, 2)) for c in codes])
    data = torch.cat((head.view(torch.uint8), absmax_codes.flatten(), packed))
    return F.pad(data, (0, layout.nbytes - data.numel())).view(storage)


def _blocks(rows: Tensor) -> Tensor:
    """(rows, columns) -> (rows, blocks, 16) fp32, a short last block filled with zeros."""
    return F.pad(rows.float(), (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def _paired(codes: Tensor) -> Tensor:
    return (codes[:, 0] << 4) | codes[:, 1]


def _like(absmax: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return absmax.split([len(part) for part in parts])


def inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 for a block of zeros."""
    return torch.where(scale > 0, 1 / scale, 0.0)


def _nearest(values: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Index of the nearest level, uint8; halfway the lower one."""
    ordered = torch.tensor(levels, device=values.device)
    return torch.bucketize(values, (ordered[1:] + ordered[:-1]) / 2, out_int32=True).to(torch.uint8)


def _quantise_absmax(absmax: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """(mean and scales of the whole matrix, fp32; this slice's codes (rows, blocks)). Collective over mp."""
    whole = absmax.new_zeros(layout.all_rows, layout.row_blocks)
    mine = slice(layout.first_row, layout.first_row + layout.rows), _columns(layout)
    whole[mine] = absmax
    if groups.mp_size() > 1:  # no absmax is negative; copies of kv heads and blocks on a cut are equal
        groups.all_reduce(whole, groups.mp_group(), op="max")
    mean = whole.double().mean().float()  # in fp64: the same whatever the order of the sum
    grouped = F.pad((whole - mean).flatten(), (0, -whole.numel() % GROUP)).view(-1, GROUP)
    scales = grouped.abs().amax(-1)
    codes = _nearest(grouped * inverse(scales).unsqueeze(-1), dynamic_levels())
    return torch.cat((mean.view(1), scales)), codes.flatten()[: whole.numel()].view_as(whole)[mine]


def _columns(layout: Layout) -> slice:
    return slice(layout.first_block, layout.first_block + layout.blocks)


def _absmax(head: Tensor, codes: Tensor, layout: Layout, levels: Tensor) -> Tensor:
    """Scales (rows, blocks) of a slice, as they are kept."""
    spread = head[1:].unsqueeze(1).expand(-1, GROUP).reshape(-1)[: layout.all_rows * layout.row_blocks]
    scales = spread.view(layout.all_rows, -1)[layout.first_row : layout.first_row + layout.rows, _columns(layout)]
    return levels[codes.int()] * scales + head[0]


def dequantise(packed: Tensor, layout: Layout, table: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """(rows, columns) in `dtype`: level times absmax in fp32, rounded once."""
    pairs, levels = table
    data, rows, blocks = packed.view(torch.uint8), layout.rows, layout.blocks
    at = 4 * layout.head
    head, codes = data[:at].view(torch.float32), data[at : at + rows * blocks].view(rows, blocks)
    at += rows * blocks
    weights = data[at : at + rows * blocks * BLOCK // 2]
    absmax = _absmax(head, codes, layout, levels)
    values = F.embedding(weights.int(), pairs).view(rows, blocks, BLOCK)
    values = values.mul_(absmax.unsqueeze(-1)).to(dtype).view(rows, -1)
    skip = layout.first_column - layout.first_block * BLOCK
    return values[:, skip : skip + layout.columns]


class _Linear(torch.autograd.Function):
    """x W^T with W made for the moment, in forward and once more in backward: autograd keeps the packed bytes only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, layout: Layout, pairs: Tensor, levels: Tensor) -> Tensor:
        ctx.save_for_backward(packed, pairs, levels)
        ctx.layout = layout
        return _product(x, packed, layout, pairs, levels)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        packed, pairs, levels = ctx.saved_tensors
        g = products.wide(gradient)
        weight = dequantise(packed, ctx.layout, (pairs, levels), g.dtype)
        return (g @ weight).to(gradient.dtype), None, None, None, None


def _product(x: Tensor, packed: Tensor, layout: Layout, pairs: Tensor, levels: Tensor) -> Tensor:
    rows = products.wide(x)
    return (rows @ dequantise(packed, layout, (pairs, levels), rows.dtype).t()).to(x.dtype)


def linear(x: Tensor, packed: Tensor, layout: Layout, table: tuple[Tensor, Tensor]) -> Tensor:
    """x W^T: (.., columns) -> (.., rows), in x's dtype. W has no gradient."""
    if torch.compiler.is_compiling():  # of _Linear it would make W once, and keep it from forward to backward
        return checkpoint(_product, x, packed, layout, *table, use_reentrant=False, preserve_rng_state=False)
    return _Linear.apply(x, packed, layout, *table) if by_hand() else _product(x, packed, layout, *table)
