"""Packed and unpacked: the same loss and gradients for the same examples, at every layout; spans of labels too."""

import numpy as np
import pytest
import torch

from accessory.data.loader import num_targets, train_windows
from accessory.data.packing import best_fit
from accessory.data.sft import Example
from accessory.parallel import groups
from accessory.train import objectives
from tests.dist import runs
from tests.dist.runs import Case
from tests.helpers import run_ranks

CAPACITY = 64


def examples() -> list[Example]:
    """Some with one answer, some with several turns."""
    made = []
    for i, example in enumerate(runs.examples()):
        n, spans = len(example.ids), None
        if i % 3 == 0 and n > 8:
            spans = np.array([[2, 4], [n // 2, n // 2 + 2], [n - 1, n]], np.int32)
            example = Example(example.ids, 2, spans)
        made.append(example)
    return made


def first_step(case: Case, packed: bool) -> tuple[float, int, dict[str, torch.Tensor]]:
    """Mean loss, targets and whole gradients of one step over all examples."""
    run, data = runs.prepare(case), examples()
    items = [[data[i] for i in pack] for pack in best_fit([len(e.ids) for e in data], CAPACITY)] if packed else data
    (window,) = train_windows(
        items, batch_size=2, sequences_per_step=len(items), dp_rank=groups.dp_rank(), dp_size=case.dp, seed=3, epoch=0
    )
    total = torch.zeros(())
    for batch in window.micro_batches:
        loss, _, _ = objectives.next_token(run.model, batch)
        (loss * case.dp / window.num_tokens).backward()
        total += loss.detach()
    run.rules.sum_partial()
    torch.distributed.all_reduce(total)
    return total.item() / case.mp / window.num_tokens, window.num_tokens, runs.whole_gradients(run)


def both(case: Case) -> list:
    return [first_step(case, packed) for packed in (False, True)]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_packed_is_unpacked(tuning: str) -> None:
    reference = run_ranks(both, Case(tuning=tuning), world=1)[0]
    targets = sum(num_targets(e) for e in examples())
    for mp, dp in ((1, 1), (2, 1), (1, 2)):
        found = run_ranks(both, Case(mp, dp, tuning), world=mp * dp)[0]
        for loss, count, gradients in found:
            assert count == targets and abs(loss / reference[0][0] - 1) < 1e-5
            assert gradients.keys() == reference[0][2].keys()
            for name, gradient in gradients.items():
                expected = reference[0][2][name]
                assert (gradient - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max()), (mp, dp, name)
                assert expected.any()


def loss_of(cut: bool) -> float:
    run, item = runs.prepare(Case()), examples()[:2]
    (window,) = train_windows([item], batch_size=1, sequences_per_step=1, dp_rank=0, dp_size=1, seed=3, epoch=0)
    (batch,) = window.micro_batches
    if not cut:
        batch = batch._replace(cu_seqlens=batch.cu_seqlens[[0, -1]])
    return objectives.next_token(run.model, batch)[0].item()


def test_a_neighbour_in_a_pack_is_not_seen() -> None:
    """The check above can fail: without the bounds between examples the loss is another."""

    assert run_ranks(loss_of, True, world=1)[0] != pytest.approx(run_ranks(loss_of, False, world=1)[0], rel=1e-3)
