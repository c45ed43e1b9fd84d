"""FSDP's gather and scatter on CPU beside torch.distributed's own, and what they send."""

import pytest
import torch
import torch.distributed as dist

from accessory.parallel import exchange, groups
from bench.sides.traffic import Traffic
from tests.helpers import run_ranks

M = 1001


def drawn(rank: int, size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(rank))


def both(world: int) -> None:
    groups.init(1)
    group, rank = groups.dp_group(), groups.dp_rank()
    gather, scatter = exchange.AllGather(), exchange.ReduceScatter()

    expected = torch.cat([drawn(r, M) for r in range(world)])
    whole = gather.allocate((world * M,), dtype=torch.float32, device=torch.device("cpu"))
    with Traffic(world) as sent:
        assert gather(whole, drawn(rank, M), group) is None
    assert torch.equal(whole, expected) and sent.wire == (world - 1) * M * 4
    in_place = torch.zeros(world * M)  # as FSDP gives it
    in_place[rank * M : (rank + 1) * M] = drawn(rank, M)
    gather(in_place, in_place[rank * M : (rank + 1) * M], group)
    assert torch.equal(in_place, expected)
    narrow = torch.empty(world * M, dtype=torch.bfloat16)
    gather(narrow, drawn(rank, M).bfloat16(), group)
    assert torch.equal(narrow, expected.bfloat16())

    given = [drawn(r, world * M) for r in range(world)]
    before, found = given[rank].clone(), torch.empty(M)
    total = sum(g.double() for g in given)[rank * M : (rank + 1) * M]
    for op, exact in ((dist.ReduceOp.SUM, total), (dist.ReduceOp.AVG, total / world)):
        with Traffic(world) as sent:
            scatter(found, given[rank], group, op)
        assert (found - exact).abs().max() < 1e-6 and sent.wire == (world - 1) * M * 4
    assert torch.equal(given[rank], before)
    with pytest.raises(ValueError, match="not .*MAX"):
        scatter(found, given[rank], group, dist.ReduceOp.MAX)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_rank_has_what_torch_gives_it(world):
    run_ranks(both, world, world=world)
