"""Between backward and the optimizer: sums that mp still owes, and the norm over both cuts, for clipping.

A gradient here is a piece of a piece: fairscale cut the weight over mp, FSDP cut that over dp.
    sum_partial  ->  gradient of every parameter complete        (replicated LoRA matrices and q, k norms, copies of kv heads)
    global_norm  ->  cut parameters add over mp, replicated ones count once, both add over dp
`torch.nn.utils.clip_grad_norm_` knows the dp cut only and gives every mp rank another, wrong norm.
"""

import torch
from torch import Tensor, nn

from accessory.parallel import groups, products
from accessory.parallel.fsdp import local

# numbers of a gradient in fp32 on a CPU whose squares BLAS adds up, at most so many at once: of 58 M torch's norm is off by 4e-4,
# this by 3e-6, and with two threads it takes less time (docs/LOG.md)
BY_BLAS, ADDED = 2**16, 2**20


class GradientRules:
    """Which parameters' gradients need what, sorted out once. Functions of a parameter's name come from the model's module."""

    def __init__(self, model: nn.Module, kv_heads: int, shard_dim, partial_grad, kv_copied, cut_over_dp: bool = True):
        """`cut_over_dp`: false under ddp, where every dp rank holds its whole slice."""
        self.cut_over_dp = cut_over_dp
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        copies = max(1, groups.mp_size() // kv_heads)
        self.parameters = [p for _, p in trained]
        self.partial = [p for n, p in trained if partial_grad(n)]
        self.copied = [p for n, p in trained if copies > 1 and kv_copied(n)]
        copied = {id(p) for p in self.copied}
        # what each gradient's square counts in the sum over mp: cut 1, copied 1/copies; replicated ones are added after it
        self.cut = [(p, 1.0 / copies if id(p) in copied else 1.0) for n, p in trained if shard_dim(n) is not None]
        self.replicated = [p for n, p in trained if shard_dim(n) is None]
        self.kv_group = groups.kv_group(kv_heads)

    def sum_partial(self) -> None:
        """Completes the gradients that are addends. Collective over mp; one message each for the two kinds."""
        if groups.mp_size() > 1:
            _sum([p.grad for p in self.partial if p.grad is not None], groups.mp_group())
            if self.kv_group is not None:
                _sum([p.grad for p in self.copied if p.grad is not None], self.kv_group)

    def global_norm(self) -> Tensor:
        """L2 norm of the whole gradient: a scalar, fp32, equal on every rank. Collective over the world."""
        device = groups.device()
        cut, replicated = torch.zeros((), device=device), torch.zeros((), device=device)
        for weight, parameters in self._by_weight().items():
            cut += weight * _squares(parameters).to(device)
        replicated += _squares(self.replicated).to(device)
        if groups.mp_size() > 1:
            groups.all_reduce(cut, groups.mp_group())
        total = cut + replicated
        if self.cut_over_dp and groups.dp_size() > 1:
            groups.all_reduce(total, groups.dp_group())
        if groups.mp_size() > 1 and groups.dp_size() > 1:
            # several groups each added it up, in an order of their own: a last bit that differs would, by way of clipping, part
            # what ranks hold alike and never compare
            groups.all_reduce(total, op="max")
        return total.sqrt()

    def _by_weight(self) -> dict[float, list]:
        weights: dict[float, list] = {}
        for p, w in self.cut:
            weights.setdefault(w, []).append(p)
        return weights


def _squares(parameters: list) -> Tensor:
    squares, others = [], []
    for p in parameters:
        if (g := p.grad) is None or not (count := (g := local(g)).numel()):
            continue
        if count >= BY_BLAS and g.dtype == torch.float32 and g.device.type == "cpu":
            squares += [torch.dot(part, part) for part in products.as_it_lies(g).reshape(-1).split(ADDED)]
        else:
            others.append(g)
    if not squares and not others:  # on the device: from the host a GPU would be waited for
        return torch.zeros((), device=groups.device())
    if others:
        squares.append(torch.stack(torch._foreach_norm(others, 2, torch.float32)).square().sum())
    return torch.stack(squares).sum()


def _sum(gradients: list, group) -> None:
    pieces = [g for gradient in gradients if (g := local(gradient)).numel()]
    if pieces:  # every rank of the group has the same pieces: mp neighbours hold the same rows of the dp cut
        flat = torch.cat([p.flatten() for p in pieces])
        groups.all_reduce(flat, group)
        for piece, total in zip(pieces, flat.split([p.numel() for p in pieces])):
            piece.copy_(total.view_as(piece))
