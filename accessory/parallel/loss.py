"""The head and the cross-entropy as one step, vocab-parallel, in chunks of tokens, over supervised rows only.

    hidden (N, D) --W (V/mp, D)--> logits of a chunk (C, V/mp) --max, sum, target over mp--> loss, and at once the gradients

The (N, V) logits never exist: a chunk's gradient is taken while its logits are there, so backward only scales (as in Liger
and cut-cross-entropy). fairscale's own loss mutates the logits and knows no ignored label. Proof: tests/dist/test_loss.py.

Shapes: N supervised tokens, C tokens of a chunk, D dim, V vocab, /mp = this rank's slice.
"""

import torch
from torch import Tensor

from accessory.parallel import groups

CHUNK_BYTES = 64 * 2**20  # of fp32 logits a chunk may take


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, rows: int
    ) -> tuple[Tensor, Tensor]:
        local, start = weight.shape[0], groups.mp_rank() * weight.shape[0]
        valid = max(0, min(local, vocab_size - start))  # rows from here on are padding
        loss = hidden.new_zeros((), dtype=torch.float32)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        wants_hidden, wants_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for h, t, out in zip(
            hidden.split(rows), targets.split(rows), hidden_grad.split(rows) if wants_hidden else _nones()
        ):
            logits = (h @ weight.t()).float()  # (C, V/mp)
            logits[:, valid:] = -torch.inf
            inside = (t >= start) & (t < start + valid)
            column = (t - start).masked_fill(~inside, 0).unsqueeze(1)
            target_logit = logits.gather(1, column).squeeze(1).masked_fill(~inside, 0.0)
            top = _max_over_mp(logits)
            probabilities = logits.sub_(top.unsqueeze(1)).exp_()
            sums = torch.stack((probabilities.sum(1), target_logit))  # (2, C): one reduction for both
            total, target_logit = (
                groups.all_reduce(sums, groups.mp_group()).unbind() if groups.mp_size() > 1 else sums.unbind()
            )
            loss += (total.log() + top - target_logit).sum()
            correct += (target_logit >= top).sum()
            if wants_hidden or wants_weight:
                probabilities.div_(total.unsqueeze(1))
                probabilities.scatter_add_(1, column, -inside.float().unsqueeze(1))
                gradient = probabilities.to(weight.dtype)
                if wants_hidden:
                    torch.mm(gradient, weight, out=out)
                if wants_weight:
                    weight_grad += gradient.t() @ h
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, loss_grad: Tensor, _: Tensor):
        hidden_grad, weight_grad = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = hidden_grad * loss_grad.to(hidden_grad.dtype)
        if weight_grad is not None:
            weight_grad = (weight_grad * loss_grad).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None


def _nones():
    while True:
        yield None


def _max_over_mp(logits: Tensor) -> Tensor:
    """Largest logit of each row over all ranks, (C,): also where a rank holds padding only."""
    top = logits.max(dim=1).values
    return groups.all_reduce(top, groups.mp_group(), op="max") if groups.mp_size() > 1 else top


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of `targets` under softmax(hidden W^T), fp32, and how many targets were the argmax.

    hidden (N, D): replicated across mp and already through `copy_to_mp` (its gradient here is this rank's addend);
    weight (ceil(V/mp), D): this rank's rows; targets (N,): global ids, every one a real label. Collective over mp: every mp
    rank has the same N. Both results are replicated. With N = 0 the loss is 0 and still carries gradients (of zero)."""
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size, rows)
