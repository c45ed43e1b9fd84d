"""x W^T and g W where a CPU has no instructions for the dtype, or where W is kept in another one than x.

    16 bit without the instructions    torch multiplies in plain loops: 1 to 20 GFLOP/s on a core that does 87 in fp32
    here                               x in fp32; W in fp32 a block of rows at a time, in memory that is used again; the
                                       result rounded once: what instructions for 16 bit do, and about as fast as fp32

With them oneDNN builds a kernel for every shape that it has not seen among the last 1024: 3 to 12 ms, as long as the product itself.
So the rows of batches whose lengths differ are brought to few numbers (`padding`).

A block stays in the caches, so W may lie in 16 bit, half the memory, at no cost: a copy of all of W in fp32 costs more than the
product of a short batch with it (docs/LOG.md). Elsewhere W is cast whole. Test: tests/unit/test_products.py

Shapes: N tokens, I inputs, O outputs.
"""

import platform
from typing import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 2**20  # weights of a block: 4 MiB in fp32, which caches hold
GRANULE = 32  # rows, at least, that are added together: what a tile of AMX takes along the sum
FEW = 2  # tokens: so few read W once and hardly multiply, torch's loops are as fast then
TURNED_FROM = 1024  # inputs of a weight, for which torch's turning costs less than it saves
LEAST_EXP = -87.0  # of what exp is taken: below, it is no normal number, which takes a CPU ten times as long
AMX = torch.cpu._is_amx_tile_supported()


def _knows_bf16() -> bool:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    # not oneDNN's word: it would take AVX-512 without them, and multiply in fp32
    return torch.cpu._is_avx512_bf16_supported() or AMX


# whether this machine's CPU has instructions for products of the dtype, and torch uses them, which it does through oneDNN
CPU_MULTIPLIES = dict.fromkeys((torch.bfloat16, torch.float16), False)
if torch.backends.mkldnn.is_available():
    CPU_MULTIPLIES = {torch.bfloat16: _knows_bf16(), torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported()}


def native(x: Tensor) -> bool:
    """Whether x's device multiplies x's dtype."""
    return x.device.type != "cpu" or CPU_MULTIPLIES.get(x.dtype, True)


def padding(count: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many rows to add to `count`, whose number differs from batch to batch: to a multiple of GRANULE, of more above 2048,
    so that there are 32 numbers between one power of two and the next; none where kernels are not built for a shape."""
    if device.type != "cpu" or not CPU_MULTIPLIES.get(dtype, False):
        return 0
    return -count % max(GRANULE, 1 << count.bit_length() >> 6)


def wide(x: Tensor) -> Tensor:
    """x in the dtype that products of it are to be taken in: fp32 for 16 bit that the CPU does not multiply, else x itself."""
    return x if native(x) else x.float()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in x's dtype, without a gradient of its own: (.., I) -> (.., O)."""
    few = x.numel() <= FEW * x.shape[-1]
    if weight.dtype == x.dtype and few:
        return F.linear(x, weight)
    return times_t(wide(x), weight).to(x.dtype)


def times_t(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x W^T: x (.., I), already `wide`; W (O, I) in any dtype -> (.., O) in x's dtype. out: (N, O), x being (N, I)."""
    if not by_blocks(x, weight):
        weight = weight.to(x.dtype)
        return F.linear(x, weight) if out is None else torch.mm(x, weight.t(), out=out)
    y = x.new_empty(*x.shape[:-1], len(weight)) if out is None else out  # not to be a view: mp sums it in place
    rows, results = x.flatten(0, -2), y.flatten(0, -2)
    for (i, j), block in _blocks(weight):
        torch.mm(rows, block.t(), out=results[:, i:j])
    return y


def times(g: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """g W: g (.., O), already `wide`; W (O, I) in any dtype -> (.., I) in g's dtype. out: (N, I), g being (N, O)."""
    if not by_blocks(g, weight):
        return torch.matmul(g, weight.to(g.dtype), out=out)
    x = g.new_empty(*g.shape[:-1], weight.shape[1]) if out is None else out
    rows, results = g.flatten(0, -2), x.flatten(0, -2)
    for (i, j), block in _blocks(weight):
        torch.addmm(results, rows[:, i:j], block, beta=1 if i else 0, out=results)
    return x


def turns(g: Tensor, inputs: int) -> bool:
    """Whether g is turned in memory before the product g^T x, the gradient of a weight of so many inputs. AMX takes two thirds
    of the time then, or half, since the product would turn it a tile at a time; torch's turning, not compiled, is slow."""
    gains = inputs >= TURNED_FROM or torch.compiler.is_compiling()
    return gains and AMX and g.device.type == "cpu" and g.dtype == torch.bfloat16


def as_it_lies(tensor: Tensor, weight: Tensor | None = None) -> Tensor:
    """A matrix's transpose where that is what lies in memory row by row, as of a trained head (fsdp.py); else the tensor itself.
    `weight`: which the tensor belongs to, and as which it is taken."""
    like = tensor if weight is None else weight
    return tensor.t() if like.dim() == 2 and like.stride(0) == 1 < like.stride(1) else tensor


def turns_head(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a head of this weight had better lie as its transpose, where it is multiplied in `dtype`: with AMX on a CPU the
    logits are made faster then, and its gradient twice as fast, as x^T g. Not for a frozen one: it would be copied."""
    return AMX and weight.device.type == "cpu" and dtype == torch.bfloat16 and weight.requires_grad


def columns(g: Tensor, inputs: int) -> Tensor:
    """g^T of g (N, O), to be multiplied with x (N, inputs)."""
    if not turns(g, inputs):
        return g.t()
    turned = g.t().contiguous()
    # the compiler leaves what a product alone reads in the order that it had, unless told
    return turned.as_strided(turned.shape, (turned.shape[1], 1))


def by_blocks(x: Tensor, weight: Tensor) -> bool:
    """Whether W, frozen or not, is cast while it is used; else as a whole, which is then best done once."""
    mixed = weight.dtype != x.dtype and x.dtype == torch.float32
    return mixed and x.device.type == "cpu" and len(weight) > 0


def _blocks(weight: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """((i, j), rows i to j in fp32), one after the other in the same memory."""
    count = -(-weight.numel() // BLOCK)
    size = max(1, -(-len(weight) // max(1, count)))
    memory = weight.new_empty(min(size, len(weight)), weight.shape[1], dtype=torch.float32)
    for i in range(0, len(weight), size):
        part = weight[i : i + size]
        yield (i, i + len(part)), memory[: len(part)].copy_(part)
