"""Rounding a frozen base to NF4 by what it does to real tokens, not weight by weight (GPTQ, Frantar et al. 2022).

    tokens -> tok_embeddings -> x -> layer, exact  -> H = sum of x^T x over what each linear is given
                                     pack(W, H)       a column's rounding error is made up for by the columns after it
                                     layer, packed -> x for the next layer

What `pack` makes has the same format and size, and the same absmax of every block: only the choice among the 16 levels differs,
so that |x W^T - x Q^T| is small on inputs like these, where rounding each weight to its nearest level makes |W - Q| small.
H is summed over dp, each rank with its own tokens. Under mp a row layer's rank knows its own inputs only, so errors are made up
for within its slice. fp32 noise may turn the choice between two levels that are nearly as good: the base is the same bits on the
same layout and machine, not on every one.

Legend: N tokens, In inputs of a linear (this rank's), rows its outputs. Test: tests/unit/test_calibrate.py, tests/dist/test_quant.py
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accessory.model import rope
from accessory.model.attention import segments
from accessory.model.quant import BLOCK, NF4_LEVELS, Layout, inverse, pack
from accessory.parallel import groups

SAME_INPUT = (("wq", "wk", "wv"), ("wo",), ("w1", "w3"), ("w2",))
DAMPING = (0.01, 0.1, 1.0)  # of H's mean diagonal, added to it one after the other until H is positive definite
AT_ONCE = 64  # columns whose errors reach the columns far off in one product
ZERO = NF4_LEVELS.index(0.0)


class Calibration:
    """The hidden states of this dp rank's calibration tokens, fp32, on their way from layer to layer.

    `hold` every linear to be packed, exact, then `pack_layer` once its layer is full; layers in their order. Collective."""

    def __init__(self, model: Any, batches: Iterable[Any]):
        """batches: `tokens` and `positions` (1, N), `cu_seqlens` (S + 1,); the embedding is filled."""
        self.held: dict[nn.Module, tuple[Layout, Tensor, torch.dtype]] = {}
        self.states = []
        device = model.tok_embeddings.weight.device
        with torch.no_grad():
            for batch in batches:
                tokens, positions = batch.tokens.to(device), batch.positions.to(device)
                x = model.tok_embeddings(tokens).float()
                turns = rope.table(positions, model.freqs, model.rope_factor)
                self.states.append((x, turns, segments(tokens, batch.cu_seqlens)))

    def hold(self, linear: Any, value: Tensor) -> None:
        """Takes `layout.needed_columns` of a slice; until its layer is packed the linear computes with them, exactly."""
        layout = linear.packed
        start = layout.first_column - layout.needed_columns[0]
        self.held[linear] = layout, value, linear.weight.dtype
        own = value[:, start : start + layout.columns].float()
        linear.packed, linear.weight = None, nn.Parameter(own, requires_grad=False)

    @torch.no_grad()
    def pack_layer(self, layer: nn.Module, table: tuple[Tensor, Tensor]) -> None:
        """Packs what is held of this layer and takes the states through it."""
        training = layer.training
        layer.eval()  # no dropout
        named = {name.rsplit(".", 1)[-1]: m for name, m in layer.named_modules() if m in self.held}
        together = [[named[n] for n in kinds if n in named] for kinds in SAME_INPUT]
        together = [linears for linears in together if linears]
        for linears, gram in zip(together, self._grams(layer, [linears[0] for linears in together]), strict=True):
            order, factor = _factor(_widened(gram, self.held[linears[0]][0]))
            for linear in linears:
                layout, value, storage = self.held.pop(linear)
                weight = pack(value, layout, storage, functools.partial(rounded, order=order, factor=factor))
                linear.weight = nn.Parameter(weight, requires_grad=False)
                linear.packed, linear.table = layout, table
        self.states = [(layer(x, *rest), *rest) for x, *rest in self.states]
        layer.train(training)

    def _grams(self, layer: nn.Module, linears: list[nn.Module]) -> list[Tensor]:
        """H (In, In) fp32 of each of these linears' inputs, of all ranks' tokens."""
        grams = []
        hooks = []
        for linear in linears:
            gram = torch.zeros(linear.weight.shape[1], linear.weight.shape[1], device=linear.weight.device)

            def add(_: nn.Module, given: tuple[Tensor, ...], gram: Tensor = gram) -> None:
                x = given[0].flatten(0, -2).float()
                gram.addmm_(x.t(), x)

            grams.append(gram)
            hooks.append(linear.register_forward_pre_hook(add))
        for state in self.states:
            layer(*state)
        for hook in hooks:
            hook.remove()
        if groups.dp_size() > 1:
            for gram in grams:
                groups.all_reduce(gram, groups.dp_group())
        return grams


def _widened(gram: Tensor, layout: Layout) -> Tensor:
    """H for `needed_columns`: columns of a block on a cut that are another rank's have nothing to do with this one's."""
    start, stop = layout.needed_columns
    before, after = layout.first_column - start, stop - layout.first_column - layout.columns
    wide = F.pad(gram, (before, after, before, after))
    wide.diagonal()[:before] = wide.diagonal()[wide.shape[0] - after :] = gram.diagonal().mean()
    return wide


def _factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(order (In,) in which columns are rounded: those with the largest inputs first, while many are left to make up for
    them; U (In, In) fp32 in this order, upper triangular, U^T U = (H + damping)^-1: U[j, k] / U[j, j] is how k makes up best
    for an error of j). Raises ValueError where H is not finite."""
    order = gram.diagonal().argsort(descending=True, stable=True)
    gram = gram[order][:, order].double()
    diagonal = gram.diagonal()
    diagonal[diagonal == 0] = 1  # an input that is always zero: its weights do nothing
    mean = diagonal.mean().item()
    for damping in DAMPING if math.isfinite(mean) else ():
        diagonal += damping * mean
        factor, failed = torch.linalg.cholesky_ex(gram)
        if not failed:
            factor = torch.cholesky_inverse(factor)  # under the old name: at 7B each of these is a gigabyte
            return order, torch.linalg.cholesky(factor, upper=True).float()
    raise ValueError(
        "--quant nf4: what the calibration tokens give inside the model is not finite: check the checkpoint, or round without "
        "them, --calibration_tokens 0"
    )


def rounded(weight: Tensor, absmax: Tensor, order: Tensor, factor: Tensor) -> Tensor:
    """Codes (rows, blocks * 16), uint8, of weight (rows, In) with the scales absmax (rows, blocks), column after column in
    `order`, each one's error spread over those after it. Blocks begin where the weight does."""
    rows, columns = weight.shape
    left = weight.t()[order].float()  # (In, rows): a column in one piece
    scales = absmax.t()[order // BLOCK]
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    edges = (levels[1:] + levels[:-1]) / 2
    for start in range(0, columns, AT_ONCE):
        stop = min(start + AT_ONCE, columns)
        errors = torch.empty(stop - start, rows, device=weight.device)
        for j in range(start, stop):
            code = torch.bucketize(left[j] * inverse(scales[j]), edges)
            codes[j] = code
            error = (left[j] - levels[code] * scales[j]) / factor[j, j]
            left[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
            errors[j - start] = error
        left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    placed = torch.full((rows, absmax.shape[1] * BLOCK), ZERO, dtype=torch.uint8, device=weight.device)
    placed[:, order] = codes.t()
    return placed
