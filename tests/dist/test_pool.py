"""The pool of ranks itself: results by rank, failures with their traceback, and life after one."""

import time

import pytest
import torch
import torch.distributed as dist

from accessory.parallel import groups
from tests.helpers import run_ranks


def whoami(mp: int) -> tuple:
    groups.init(mp)
    total = groups.all_reduce(torch.ones(()) * groups.rank())
    return groups.rank(), groups.mp_rank(), groups.dp_rank(), total.item()


def fails_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("on purpose")
    dist.barrier()


def hangs() -> None:
    time.sleep(30)


def test_results_come_back_by_rank():
    assert run_ranks(whoami, 2, world=4) == [(0, 0, 0, 6), (1, 1, 0, 6), (2, 0, 1, 6), (3, 1, 1, 6)]
    assert run_ranks(whoami, 1, world=1) == [(0, 0, 0, 0)]
    assert run_ranks(whoami, 3, world=3) == [(0, 0, 0, 3), (1, 1, 0, 3), (2, 2, 0, 3)]


def test_a_failing_rank_is_reported_and_the_pool_lives_on():
    with pytest.raises(pytest.fail.Exception, match="rank 1 of 2:(.|\n)*fails_on(.|\n)*on purpose"):
        run_ranks(fails_on, 1, world=2)
    with pytest.raises(pytest.fail.Exception, match="still running after 1 s"):
        run_ranks(hangs, world=1, timeout=1)
    assert run_ranks(whoami, 1, world=2) == [(0, 0, 0, 1), (1, 0, 1, 1)]
