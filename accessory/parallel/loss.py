"""The head and the cross-entropy as one step, vocab-parallel, in chunks of tokens, over supervised rows only.

    hidden (N, D) --W (V/mp, D)--> logits of a chunk (C, V/mp) --softmax, max, sum, target over mp--> loss, and at once the
                                                                                                      gradients

The (N, V) logits never exist: a chunk's gradient is taken while its logits are there, so backward only scales (as in Liger
and cut-cross-entropy). fairscale's own loss mutates the logits and knows no ignored label. Chunks are written one over the
other: a fresh 64 MiB costs more, in page faults, than the softmax over it. Proof: tests/dist/test_loss.py.

Shapes: N supervised tokens, C tokens of a chunk, D dim, V vocab, /mp = this rank's slice.
"""

import torch
from torch import Tensor

from accessory.parallel import groups

CHUNK_BYTES = 64 * 2**20  # of fp32 logits a chunk may take; of probabilities as many again


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, rows: int
    ) -> tuple[Tensor, Tensor]:
        ctx.weight_dtype, weight = weight.dtype, weight.to(hidden.dtype)
        start = groups.mp_rank() * weight.shape[0]
        true = weight[: max(0, min(len(weight), vocab_size - start))]  # the rows below are padding, they take no part
        loss = hidden.new_zeros((), dtype=torch.float32)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        wants_hidden, wants_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        chunks = _Chunks(min(rows, len(hidden)), true)
        for first in range(0, len(hidden), rows):
            h, t = hidden[first : first + rows], targets[first : first + rows]
            logits, probabilities = chunks.of(h)  # (C, V/mp); this rank's softmax
            inside = (t >= start) & (t < start + len(true))
            column = (t - start).masked_fill(~inside, 0).unsqueeze(1)
            top, log_total, target_logit = _local(logits, probabilities, column, inside)
            mine = log_total
            if groups.mp_size() > 1:
                top, log_total, target_logit = _over_mp(top, log_total, target_logit)
            loss += (log_total - target_logit).sum()
            correct += (target_logit >= top).sum()
            if (wants_hidden or wants_weight) and len(true):
                if groups.mp_size() > 1:
                    probabilities.mul_((mine - log_total).exp().unsqueeze(1))
                probabilities.scatter_add_(1, column, -inside.float().unsqueeze(1))
                gradient = chunks.gradient(probabilities)
                if wants_weight:
                    _add_product(weight_grad[: len(true)], gradient, h)
            if wants_hidden:
                out = hidden_grad[first : first + rows]
                torch.mm(gradient, true, out=out) if len(true) else out.zero_()
        ctx.save_for_backward(hidden_grad, weight_grad)
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


class _Chunks:
    """The memory that every chunk's logits, probabilities and gradient are written to."""

    def __init__(self, rows: int, weight: Tensor):
        self.weight = weight  # (V/mp, D), true rows
        empty = lambda dtype: torch.empty(rows, len(weight), dtype=dtype, device=weight.device)  # noqa: E731
        half = weight.dtype != torch.float32
        self.product = empty(weight.dtype)
        self.logits = empty(torch.float32) if half else self.product
        self.probabilities = empty(torch.float32)

    def of(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(C, D) -> logits, and their softmax over this rank's columns: (C, V/mp) each, fp32."""
        n = len(hidden)
        logits = torch.mm(hidden, self.weight.t(), out=self.product[:n])
        if self.logits is not self.product:
            logits = self.logits[:n].copy_(logits)
        return logits, torch.softmax(logits, 1, out=self.probabilities[:n])

    def gradient(self, probabilities: Tensor) -> Tensor:
        """In the weight's dtype, for the products."""
        if self.logits is self.product:
            return probabilities
        return self.product[: len(probabilities)].copy_(probabilities)


def _local(logits: Tensor, probabilities: Tensor, column: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of this rank's columns, (C,) each: largest logit, log of the sum of exponentials, the target's logit or 0."""
    if not logits.shape[1]:
        least = logits.new_full((len(logits),), -torch.inf)
        return least, least, logits.new_zeros(len(logits))
    top = logits.amax(1)
    log_total = top - probabilities.amax(1).log()  # the largest probability is exp(0) / sum
    return top, log_total, logits.gather(1, column).squeeze(1).masked_fill(~inside, 0.0)


def _over_mp(top: Tensor, log_total: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of all ranks' columns: two reductions."""
    highest = groups.all_reduce(top.clone(), groups.mp_group(), op="max")
    sums = torch.stack(((log_total - highest).exp(), target_logit))
    total, target_logit = groups.all_reduce(sums, groups.mp_group()).unbind()
    return highest, highest + total.log(), target_logit


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total (V, D), fp32, += gradient^T (V, C) hidden (C, D); in fp32 within the product itself."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), hidden)
    else:
        total += gradient.t() @ hidden


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of `targets` under softmax(hidden W^T), fp32, and how many targets were the argmax.

    hidden (N, D): replicated across mp and already through `copy_to_mp` (its gradient here is this rank's addend);
    weight (ceil(V/mp), D): this rank's rows, cast to hidden's dtype where it is another; targets (N,): global ids, every one
    a real label. Collective over mp: every mp rank has the same N. Both results are replicated. With N = 0 the loss is 0 and still carries gradients (of zero)."""
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size, rows)
