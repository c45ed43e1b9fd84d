"""Which tokens have something to predict, and what: sorted out on the host, once a batch, so that a GPU is never waited for.

    tokens   a b c | d e f        two sequences of a packed row
    labels   - b c | - - f        aligned with the tokens; -100 (-): nothing is learnt
    rows     0 1 4                where a label comes next, among all B T tokens; a sequence's first comes after nothing
    ids      b c f

After the last layer's attention only `rows` go on (`Targets.few`, `only`): of the others that layer's keys and values alone are
wanted. Proof: tests/unit/test_targets.py, tests/unit/test_last_layer.py, tests/dist/test_last_layer.py.
"""

from typing import Any

import torch
from torch import Tensor

from accessory.model.attention import Segments
from accessory.parallel import groups, products

IGNORED = -100  # a label that is no target
FEW = 0.9  # of the tokens: more are not worth a graph of their own for the last layer
IDS = (torch.int64, torch.int32)  # what labels come in


class Targets:
    """Of labels (B, T); `device` is the tokens', `packed` the bounds of the sequences in one row."""

    def __init__(self, labels: Tensor, device: torch.device, packed: Segments | None = None):
        self.shape = labels.shape
        labels = labels.cpu()
        last = [-1] if packed is None else [end - 1 for end in packed.bounds[1:]]
        following = labels.roll(-1, 1)
        if labels.numel():
            following = following.index_fill(1, torch.tensor(last), IGNORED)
        following = following.flatten()
        self.host_rows = (following != IGNORED).nonzero().squeeze(1)  # (M,), rising
        ids = following[self.host_rows]
        self.least, self.most = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
        self.rows, self.ids = groups.sent(self.host_rows, device), groups.sent(ids, device)

    def few(self, dtype: torch.dtype) -> Tensor | None:
        """`rows`, and after them others, in a number for which products have kernels (products.py); None where these are
        most of the tokens."""
        total, device = self.shape.numel(), self.rows.device
        extra = products.padding(len(self.host_rows), dtype, device)
        if not 0 < len(self.host_rows) + extra <= FEW * total:
            return None
        if not extra:
            return self.rows
        other = torch.ones(total, dtype=torch.bool).index_fill_(0, self.host_rows, False).nonzero().squeeze(1)
        return groups.sent(torch.cat((self.host_rows, other[:extra])), device)


def targets_of(labels: Tensor | Targets, tokens: Tensor, packed: Segments | None, vocab_size: int) -> Targets:
    """Raises ValueError where there is not a label for each token, or one is no token's id: the loss would be wrong, and
    nothing else would tell."""
    if not isinstance(labels, Targets | Tensor) or isinstance(labels, Tensor) and labels.dtype not in IDS:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels of {kind}: token ids are expected, {IGNORED} where nothing is learnt")
    if labels.shape != tokens.shape:
        raise ValueError(f"labels {tuple(labels.shape)} for tokens {tuple(tokens.shape)}: one for each is expected")
    targets = labels if isinstance(labels, Targets) else Targets(labels, tokens.device, packed)
    if targets.least < 0 or targets.most >= vocab_size:
        wrong = targets.least if targets.least < 0 else targets.most
        raise ValueError(
            f"labels: {wrong} is none of this model's {vocab_size} tokens; {IGNORED} is where nothing is learnt"
        )
    return targets


class _Only(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x.flatten(0, 1).index_select(0, rows).unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # index_select's own would add them up, one at a time
        (rows,) = ctx.saved_tensors
        x = gradient.new_zeros(ctx.shape)
        x.flatten(0, 1).index_copy_(0, rows, gradient.squeeze(0))
        return x, None


def only(x: Tensor, rows: Tensor | None) -> Tensor:
    """(B, T, D) -> (1, M, D) of these rows, none of them twice; all of x where rows is None."""
    return x if rows is None else _Only.apply(x, rows)
