"""The head and the cross-entropy as one step, vocab-parallel, in chunks of tokens, over supervised rows only.

    hidden (N, D) --W (V/mp, D)--> logits of a chunk (C, V/mp) --softmax, max, sum, target over mp--> loss, and at once the
                                                                                                      gradients

The (N, V) logits never exist: a chunk's gradient is taken while its logits are there, so backward only scales (as in Liger
and cut-cross-entropy). fairscale's own loss mutates the logits and knows no ignored label. A chunk is as large as the products
like it and is in the weight's dtype; its softmax is taken in fp32, a block of rows at a time that the CPU's caches hold, and its
gradient is written over the logits: fresh memory costs more, in page faults, than the softmax over it. Proof: tests/dist/test_loss.py.

Shapes: N supervised tokens, C tokens of a chunk, n of a block, D dim, V vocab, /mp = this rank's slice.
"""

from typing import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from accessory.parallel import groups, products, spare
from accessory.parallel.derivatives import once_only

CHUNK_BYTES = 128 * 2**20  # of logits a chunk may take: one chunk, as a rule, so that nothing is summed up
SUM_BYTES = 4  # of a weight of the head in the sum over several chunks of 16 bit: fp32
# of a chunk where the weight is frozen, by a number's bytes: nothing is summed up, so as few as the products are fast with. On a
# GPU, not measured: 1024 x 4096 results are as many tiles of 128 x 256 as an H200 computes at once
FAST_ROWS = {"cpu": {2: 256, 4: 512}, "cuda": {2: 1024, 4: 1024}}
# chunks that the gradient of a head in 16 bit may be added up from in 16 bit, within the products, which add in fp32: 8 have 1.3
# times the error of one, 64 would have 2.6 (tests/dist/test_loss.py). On a CPU none: the sum is in fp32
ROUNDED_CHUNKS = {"cpu": 0, "cuda": 8}
# on such a CPU exp, which is MKL's, takes a third of the time of torch's softmax; on others it was not measured
BY_EXP = products.AMX
# numbers of a block, in fp32 beside the chunk, logits and probabilities, by exp in one memory: what caches hold, of an H200 50 MB
BLOCK = {"cpu": 2**18 if BY_EXP else 2**19, "cuda": 2**22}
PRODUCT_ROWS = 8192  # of a head's gradient in 16 bit that are computed at once, to be added to the sum in fp32,
WHOLE_PRODUCT = ("cpu",)  # but here all of them


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, rows: int, learns: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.parameter = parameter = weight
        if weight.requires_grad or not products.by_blocks(hidden, weight):
            weight = weight.to(hidden.dtype)
        start = groups.mp_rank() * weight.shape[0]
        true = weight[: max(0, min(len(weight), vocab_size - start))]  # the rows below are padding, they take no part
        loss = hidden.new_zeros((), dtype=torch.float32)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        wants_hidden, wants_weight = (learns and wanted for wanted in ctx.needs_input_grad[:2])
        count = len(hidden)
        if extra := products.padding(count, hidden.dtype, hidden.device):  # rows with a loss that nobody adds up
            hidden, targets = F.pad(hidden, (0, 0, 0, extra)), F.pad(targets, (0, extra))
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad = None
        if wants_weight:
            summed = _sum_dtype(weight, parameter.dtype) if rows < len(hidden) else weight.dtype
            same = summed == parameter.dtype
            weight_grad = spare.take(parameter) if same else torch.empty_like(weight, dtype=summed)
            if not len(hidden):
                weight_grad.zero_()
        chunk = _Chunk(min(rows, len(hidden)), true, hidden.dtype)
        for first in range(0, len(hidden), rows):
            h, t = hidden[first : first + rows], targets[first : first + rows]
            chunk.fill(h, t - start)
            top, log_total, target_logit = chunk.statistics()
            counts = slice(0, max(0, count - first))
            loss += (log_total - target_logit)[counts].sum()
            correct += (target_logit >= top)[counts].sum()
            if wants_hidden or wants_weight:
                gradient = chunk.gradient(log_total)
                if extra:
                    gradient[counts.stop :] = 0
            if wants_weight:
                _add_product(weight_grad, gradient, h, first == 0)
            if wants_hidden:
                products.times(gradient, true, out=hidden_grad[first : first + rows])
        if wants_hidden and extra:
            hidden_grad = hidden_grad[:count]
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, loss_grad: Tensor, _: Tensor):
        once_only("the loss of labels=..", "compute it from the logits")
        hidden_grad, weight_grad = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = _scaled(hidden_grad, loss_grad, torch.empty_like(hidden_grad))
        if weight_grad is not None:
            # in place where it can be, a matrix less: autograd refuses a second backward, which would find it scaled
            same = weight_grad.dtype == ctx.parameter.dtype
            to = weight_grad if same else spare.take(ctx.parameter)
            weight_grad = _scaled(weight_grad, loss_grad, to)
        return hidden_grad, weight_grad, None, None, None, None


class _Chunk:
    """The memory that every chunk's logits are written to, then their gradient, and that of one block."""

    def __init__(self, rows: int, weight: Tensor, dtype: torch.dtype):
        self.weight = weight  # (V/mp, D), true rows
        self.memory = weight.new_empty(rows, len(weight), dtype=dtype)
        self.block = min(rows, _rows_of_block(self.memory))
        self.by_exp = BY_EXP and weight.device.type == "cpu"
        self.wide = weight.new_empty(self.block, len(weight), dtype=torch.float32)
        self.softmax = None if self.by_exp else torch.empty_like(self.wide)

    def fill(self, hidden: Tensor, columns: Tensor) -> None:
        """hidden (C, D) -> logits (C, V/mp); columns (C,) of the targets, where this rank has them."""
        self.logits = products.times_t(hidden, self.weight, out=self.memory[: len(hidden)])
        self.inside = (columns >= 0) & (columns < len(self.weight))
        self.columns = columns.masked_fill(~self.inside, 0).unsqueeze(1)
        self.at_target = -self.inside.float().unsqueeze(1)  # what the gradient has beside the probability

    def statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of all ranks' columns, (C,) each: largest logit, log of the sum of exponentials, the target's logit. One rank alone
        leaves the gradient where the logits were, so that no logit is read twice."""
        mine = self._local()
        self.mine = mine[1]
        return mine if groups.mp_size() == 1 else _over_mp(*mine)

    def _local(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same of this rank's columns; the target's logit is 0 where another has it."""
        if not self.logits.shape[1]:
            least = self.wide.new_full((len(self.logits),), -torch.inf)
            return least, least, torch.zeros_like(least)
        target_logit = self.logits.gather(1, self.columns).squeeze(1).float().masked_fill_(~self.inside, 0.0)
        found = []
        for rows in self._blocks():
            p, *statistics = self._softmax(rows)
            found.append(statistics)
            if groups.mp_size() == 1:
                self._write(rows, p)
        top, log_total = (torch.cat(parts) for parts in zip(*found))
        return top, log_total, target_logit

    def gradient(self, log_total: Tensor) -> Tensor:
        """Of the summed loss by the logits, (C, V/mp) in their dtype, where they were."""
        if groups.mp_size() > 1 and len(self.weight):
            share = (self.mine - log_total).exp().unsqueeze(1)  # of this rank in the sum
            for rows in self._blocks():
                self._write(rows, self._softmax(rows)[0].mul_(share[rows]))
        return self.logits

    def _blocks(self) -> Iterator[slice]:
        return (slice(i, min(i + self.block, len(self.logits))) for i in range(0, len(self.logits), self.block))

    def _softmax(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Over this rank's columns, in fp32: the probabilities (n, V/mp), the largest logit and the log of the sum (n,)."""
        logits = self.logits[rows]
        wide = self.wide[: len(logits)]
        if logits.dtype != wide.dtype:
            logits = wide.copy_(logits)
        top = logits.amax(1, keepdim=True)
        if self.by_exp:
            p = torch.sub(logits, top, out=wide).clamp_(min=products.LEAST_EXP).exp_()
            total = p.sum(1, keepdim=True)
            p.mul_(total.reciprocal())
        else:
            p = torch.softmax(logits, 1, out=self.softmax[: len(logits)])
            total = p.amax(1, keepdim=True).reciprocal_()  # the largest probability is exp(0) / sum
        return p, top.squeeze(1), total.log_().add_(top).squeeze(1)

    def _write(self, rows: slice, probabilities: Tensor) -> None:
        probabilities.scatter_add_(1, self.columns[rows], self.at_target[rows])
        self.logits[rows] = probabilities


def _over_mp(top: Tensor, log_total: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of all ranks' columns: two reductions."""
    highest = groups.all_reduce(top.clone(), groups.mp_group(), op="max")
    sums = torch.stack(((log_total - highest).exp(), target_logit))
    total, target_logit = groups.all_reduce(sums, groups.mp_group()).unbind()
    return highest, highest + total.log(), target_logit


def _sum_dtype(weight: Tensor, own_dtype: torch.dtype) -> torch.dtype:
    """Of several chunks' gradients: 16 bit not where the weight itself is wider, since its gradient then is."""
    rounded = weight.dtype == own_dtype and ROUNDED_CHUNKS[_kind(weight.device)] > 0
    return weight.dtype if rounded else torch.promote_types(weight.dtype, torch.float32)


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor, first: bool) -> None:
    """gradient^T (V/mp, C) hidden (C, D) to `total`, the sum over the chunks before, or the first of them: then with zeros for
    the weight's padding."""
    if first:
        total[gradient.shape[1] :] = 0
    total, left, right = total[: gradient.shape[1]], gradient.t(), hidden
    if (lies := products.as_it_lies(total)) is not total:
        total, left, right = lies, hidden.t().contiguous(), gradient
    if total.dtype == gradient.dtype:
        torch.addmm(total, left, right, beta=0 if first else 1, out=total)
        return
    whole = total.device.type in WHOLE_PRODUCT
    rows = max(1, len(total) if whole else PRODUCT_ROWS)
    for to, some in zip(total.split(rows), left.split(rows)):
        product = some @ right
        # a whole one by blocks: torch would make a copy of it in fp32 first
        for part, added in zip(_blocks(to), _blocks(product)) if whole else [(to, product)]:
            part.copy_(added) if first else part.add_(added)


def _scaled(matrix: Tensor, factor: Tensor, to: Tensor) -> Tensor:
    """matrix times factor, a fp32 scalar, into `to` (possibly matrix itself), rounded once."""
    if to.dtype == matrix.dtype and (to.dtype.itemsize > 2 or to.device.type == "cpu"):
        return torch.mul(matrix, factor, out=to)  # in fp32 also of 16 bits, but a GPU would round the factor to them
    for part, out in zip(*(_blocks(products.as_it_lies(x)) for x in (matrix, to))):
        if out.dtype.itemsize > 2:
            out.copy_(part).mul_(factor)
        else:
            out.copy_(part.float() * factor)
    return to


def _blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    return matrix.split(_rows_of_block(matrix))


def _rows_of_block(matrix: Tensor) -> int:
    return max(1, BLOCK[_kind(matrix.device)] // max(1, matrix.shape[1]))


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "cuda"


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of `targets` under softmax(hidden W^T), fp32, and how many targets were the argmax.

    hidden (N, D): replicated across mp and already through `copy_to_mp` (its gradient here is this rank's addend);
    weight (ceil(V/mp), D): this rank's rows, cast to hidden's dtype where it is another; targets (N,): global ids, every one
    a real label. Collective over mp: every mp rank has the same N. Both results are replicated. With N = 0 the loss is 0 and still carries gradients (of zero)."""
    hidden = products.wide(hidden)
    rows = rows_of_chunk(weight, hidden.element_size(), len(hidden))
    rows += products.padding(rows, hidden.dtype, hidden.device)
    learns = torch.is_grad_enabled()  # of validation too, needs_input_grad says what could be asked for
    return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size, rows, learns)


def rows_of_chunk(weight: Tensor, element_size: int, count: int, own_size: int | None = None) -> int:
    """How many of `count` tokens' logits exist at a time: as many as CHUNK_BYTES take, or all of them where a trained head's
    sum over several chunks would want as much memory; chunks of one size, since a small last one is slow. Bytes a number of the
    logits, and of the weight (its own, unless given)."""
    kind, own_size = _kind(groups.device()), own_size or weight.element_size()
    most, fast = max(1, CHUNK_BYTES // (element_size * weight.shape[0])), FAST_ROWS[kind][min(element_size, 4)]
    summed = SUM_BYTES * weight.shape[1] if element_size < 4 else 0  # as bytes of logits a row; fp32 is summed in place
    if not weight.requires_grad:
        most = min(most, fast)
    elif element_size < 4 and element_size == own_size and ROUNDED_CHUNKS[kind]:
        most = max(fast, -(-count // ROUNDED_CHUNKS[kind]))
    elif element_size * count <= element_size * most + summed:
        most = max(1, count)
    elif kind == "cuda":
        most = max(most, fast)
    chunks = max(1, -(-count // most))
    return max(1, -(-count // chunks))
