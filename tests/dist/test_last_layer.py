"""The last layer's rows without a target left out: the same loss and gradients at every layout, FSDP's hooks or not."""

import pytest
import torch

from accessory.model import targets
from tests.dist.runs import Case
from tests.dist.test_sharing import first_step
from tests.helpers import run_ranks
from tests.unit.test_last_layer import rows_after_attention

CASES = [
    Case(2, 1, "lora"),
    Case(1, 2, "full"),
    Case(2, 2, "full", checkpointing="full"),
    Case(1, 2, "lora", checkpointing="selective", data_parallel="ddp"),
    Case(2, 1, "full", sequence_parallel=True),  # where the rows are cut over mp: none is left out
]


def narrowed_and_whole(case: Case) -> list[tuple[set[int], float, dict[str, torch.Tensor]]]:
    """Each way: how many numbers of rows layers had, the loss and the gradients."""
    found = []
    for few in (targets.FEW, 0.0):
        with pytest.MonkeyPatch.context() as patch, rows_after_attention() as rows:
            patch.setattr(targets, "FEW", few)
            loss, _, gradients = first_step(case, False)
        batches = len(rows) // case.args.n_layers
        found.append(([len(set(rows)) / batches], loss, gradients))
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_all_rows(case: Case) -> None:
    for narrowed, whole in run_ranks(narrowed_and_whole, case, world=case.mp * case.dp):
        assert narrowed[0] == whole[0] if case.sequence_parallel else narrowed[0] > whole[0]
        assert narrowed[1] == pytest.approx(whole[1], rel=1e-5)
        for name, gradient in narrowed[2].items():
            torch.testing.assert_close(gradient, whole[2][name], rtol=1e-4, atol=1e-6, msg=name)
