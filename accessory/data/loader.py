"""Batches in an order that is a pure function of (seed, epoch, position): nothing here depends on what ran before.

    one epoch   perm = a permutation of the examples drawn from (seed, epoch), or the data set's own, lazy
    window w    perm[w*G : (w+1)*G], G = sequences_per_step: one optimizer step; the last of an epoch may be short
                | micro batch 0: rank 0 | rank 1 | ... | micro batch 1: rank 0 | rank 1 | ... |
                  each cell `batch_size` examples; an empty cell is a filler sequence without labels

So every rank gets ceil(G / (batch_size * dp_size)) micro batches of every window (collectives meet), each example comes
exactly once an epoch, and which examples a step sees does not depend on the number of ranks or on batch_size.

An item of the data set is one Example, or a list of them that belong together: a block of text cut at its documents.
It counts as one of `batch_size` and `sequences_per_step`; its parts are sequences like any other.

Padding-free: a micro batch is its sequences one after the other, with positions from 0 in each and their edges in
`cu_seqlens`; what prompts begin with alike may be there once, as a sequence that others come after (sharing.py).
Legend: N tokens of a micro batch, S sequences in it. Ranks arrive as integers; tensors are on the CPU.
Test: pytest tests/unit/test_loader.py
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from .sft import Example, ordered_map, rng
from .sharing import shared

Item = Example | list[Example]
IGNORED = -100  # a label that is no target
FILLER = Example(np.zeros(2, np.int32), 2)
AT_ONCE = 2048  # tokens that `first_batches` puts together


class Batch(NamedTuple):
    """One micro batch of one rank, replicated across mp. Labels stand where their tokens stand: the model shifts."""

    tokens: Tensor  # (1, N) int64
    labels: Tensor  # (1, N) int64, -100 where nothing is learnt; always so at the first token of a sequence
    positions: Tensor  # (1, N) int64, from 0 in every sequence, or from the end of the one that it comes after
    cu_seqlens: Tensor  # (S + 1,) int32, 0 ... N
    after: Tensor  # (S,) int32: of each sequence, the one that its tokens come after, or -1: `Segments` wants it


class Window(NamedTuple):
    """One optimizer step's data. The two counts are of all ranks and micro batches, without fillers."""

    micro_batches: list[Batch]  # this rank's, equally many in every window and on every rank
    num_tokens: int  # targets: what the summed loss is divided by
    num_all_tokens: int
    sample_ids: list[int]  # this rank's items of the data set, in their order


def windows_per_epoch(n: int, sequences_per_step: int) -> int:
    """Optimizer steps in an epoch over n examples, the last short one counted."""
    return -(-n // sequences_per_step)


def micro_batches(sequences_per_step: int, batch_size: int, dp_size: int) -> int:
    """Micro batches of one rank in an optimizer step. The last need not be full."""
    return -(-sequences_per_step // (batch_size * dp_size))


def train_windows(
    dataset: Sequence[Item],
    *,
    batch_size: int,
    sequences_per_step: int,
    dp_rank: int,
    dp_size: int,
    seed: int,
    epoch: int,
    start_window: int = 0,
    num_workers: int = 0,
    share_prompts: bool = False,
) -> Iterator[Window]:
    """The windows of one epoch for one dp rank, from `start_window` on (a resumed run names the next one).

    The order is dataset.epoch_order(seed, epoch) where there is such a method: something that gives the item at a
    position, len(dataset) of them; else a permutation that is drawn at once. `num_workers` threads prepare windows ahead;
    they change nothing but the speed. `share_prompts`: see sharing.py."""
    assert 0 <= dp_rank < dp_size and batch_size > 0 < sequences_per_step, (dp_rank, dp_size, batch_size)
    total, count = (
        windows_per_epoch(len(dataset), sequences_per_step),
        micro_batches(sequences_per_step, batch_size, dp_size),
    )
    assert 0 <= start_window <= total, (start_window, total)
    perm = order(dataset, seed, epoch)

    def window(w: int) -> Window:
        places = range(w * sequences_per_step, min((w + 1) * sequences_per_step, len(dataset)))
        ids = [int(perm[place]) for place in places]
        items = [dataset[i] for i in ids]
        cells = [cell(range(len(ids)), m * dp_size + dp_rank, batch_size) for m in range(count)]
        return Window(
            micro_batches=[collate([items[k] for k in c] or [FILLER], share_prompts) for c in cells],
            num_tokens=sum(num_targets(e) for e in items),
            num_all_tokens=sum(num_tokens(item) for item in items),
            sample_ids=[ids[k] for c in cells for k in c],
        )

    return ordered_map(window, range(start_window, total), num_workers)


def order(dataset: Sequence[Item], seed: int, epoch: int) -> Sequence[int]:
    """Of each place in the epoch, the number of its item."""
    own = getattr(dataset, "epoch_order", None)
    return own(seed, epoch) if own else rng(seed, epoch).permutation(len(dataset))


def first_batches(dataset: Sequence[Item], tokens: int, *, seed: int, dp_rank: int, dp_size: int) -> list[Batch]:
    """The first items of a run, at least so many tokens of them or the whole data set, dealt out over dp one by one; on each
    rank in batches of AT_ONCE tokens or a little more."""
    perm, batches, items = order(dataset, seed, 0), [], []
    for place in range(len(dataset)):
        if tokens <= 0:
            break
        item = dataset[int(perm[place])]
        tokens -= num_tokens(item)
        if place % dp_size == dp_rank:
            items.append(item)
        if sum(num_tokens(i) for i in items) >= AT_ONCE:
            batches.append(collate(items))
            items = []
    return batches + ([collate(items)] if items else [])


def eval_batches(
    dataset: Sequence[Item], *, eval_batch_size: int, dp_rank: int, dp_size: int, share_prompts: bool = False
) -> Iterator[Batch]:
    """Every example exactly once over all ranks, in the data set's order; equally many batches on each (fillers)."""
    assert 0 <= dp_rank < dp_size and eval_batch_size > 0, (dp_rank, dp_size, eval_batch_size)
    ids = range(len(dataset))
    for step in range(windows_per_epoch(len(ids), eval_batch_size * dp_size)):
        chosen = cell(ids, step * dp_size + dp_rank, eval_batch_size)
        yield collate([dataset[i] for i in chosen] or [FILLER], share_prompts)


def cell(ids: range, index: int, batch_size: int) -> range:
    """The index-th run of batch_size ids; shorter, or empty, at the end."""
    return ids[index * batch_size : (index + 1) * batch_size]


def padded(batch: Batch, count: int) -> Batch:
    """With `count` tokens more behind the others, of which nothing is learnt: in sequences no longer than the longest there is,
    which a sliding window may allow and no longer one."""
    if not count:
        return batch
    rows = {name: pad(getattr(batch, name), (0, count)) for name in ("tokens", "positions")}
    bounds, after = batch.cu_seqlens, batch.after
    longest = int(bounds.diff().max())
    ends = torch.arange(longest, count + longest, longest, dtype=bounds.dtype).clamp_(max=count)
    return batch._replace(
        **rows,
        labels=pad(batch.labels, (0, count), value=IGNORED),
        cu_seqlens=torch.cat((bounds, bounds[-1] + ends)),
        after=pad(after, (0, len(ends)), value=-1),
    )


def parts(item: Item) -> list[Example]:
    """The sequences of an item."""
    return [item] if isinstance(item, Example) else item


def num_targets(item: Item) -> int:
    """Tokens that a loss is computed on: what an example has learnt, never a sequence's first."""
    return sum(int(e.learnt().sum()) for e in parts(item))


def num_tokens(item: Item) -> int:
    return sum(len(e.ids) for e in parts(item))


def collate(items: list[Item], share_prompts: bool = False) -> Batch:
    """Items -> one batch, their sequences end to end, without padding; or with what their prompts have in common once."""
    examples = [example for item in items for example in parts(item)]
    examples, after = shared(examples) if share_prompts else (examples, [-1] * len(examples))
    lengths = np.array([len(e.ids) for e in examples])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    tokens = np.concatenate([e.ids for e in examples]).astype(np.int64)
    begun = np.zeros_like(starts)
    for i, before in enumerate(after):
        begun[i] = begun[before] + lengths[before] if before >= 0 else 0
    positions = np.arange(len(tokens)) - np.repeat(starts - begun, lengths)
    labels = np.where(np.concatenate([e.learnt() for e in examples]), tokens, IGNORED)
    cu_seqlens = np.concatenate([[0], ends]).astype(np.int32)
    rows = (torch.from_numpy(array[None]) for array in (tokens, labels, positions))
    return Batch(*rows, torch.from_numpy(cu_seqlens), torch.tensor(after, dtype=torch.int32))
