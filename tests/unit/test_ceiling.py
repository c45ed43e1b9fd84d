"""bench/ceiling.py counts what a step multiplies as bench/workload.py does, and puts a side's time beside the floors around it."""

import functools

import pytest
import torch

from bench import ceiling, workload

SIZES = workload.M | {"n_kv_heads": 4}


@pytest.mark.parametrize("rank", [0, 16])
def test_products_are_those_of_the_flop_count(rank: int) -> None:
    step = ceiling.Step((100, 28), 128)
    flops = sum(2 * m * k * n for m, k, n, _ in ceiling.products(SIZES, step, rank))
    attention = 3 * 2 * 64 * SIZES["dim"] * SIZES["n_layers"]  # flops_per_token's share of a sequence of 64
    base = workload.flops_per_token(SIZES, 64, backward=1 if rank else 2) - attention
    adapters = SIZES["n_layers"] * sum(6 * rank * (k + n) for k, n in ceiling.linears(SIZES))
    assert flops == pytest.approx(step.tokens * (base + adapters), rel=1e-12)


def test_sft_has_the_timed_examples_of_its_row() -> None:
    from bench.rows import sft

    steps = ceiling.steps_of("sft")
    assert len(steps) == sft.UNITS * sft.WINDOWS and {len(s.lengths) for s in steps} == {sft.BATCH}
    assert steps[0].lengths[0] == sum(sft.LENGTHS[sft.FIRST * sft.BATCH])
    assert all(s.learnt < s.tokens for s in steps)


def test_the_fastest_is_taken() -> None:
    def slow() -> None:
        sum(range(20_000))

    def fast() -> None:
        sum(range(200))

    assert ceiling.fastest([slow, fast], seconds=1e-3) is fast and ceiling.fastest([fast, slow], seconds=1e-3) is fast


def test_a_small_step_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part with what it stands for: the optimizer's with weights that move."""
    monkeypatch.setattr(ceiling, "BEYOND_CACHES", 2**12)
    small = SIZES | {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48, "n_layers": 2, "vocab_size": 64}
    steps = [ceiling.Step((8, 3), 5), ceiling.Step((6,), 4)]
    monkeypatch.setattr(ceiling, "steps_of", lambda row: steps)
    monkeypatch.setattr(ceiling, "fastest", functools.partial(ceiling.fastest, passes=1, seconds=1e-3))
    for row, dtype in (("sft", torch.bfloat16), ("lora", torch.float32)):
        found = ceiling.parts(row, small, dtype)
        rank = ceiling.workload.RANK if row == "lora" else 0
        counted = sum(p.count for p in found if p.name == "products")
        assert counted == sum(len(ceiling.products(small, s, rank)) for s in steps)
        told = ceiling.floor(found, 2)
        assert (
            list(told) == ["products", "attention", "softmax", "silu", "passes", "weights"] and min(told.values()) > 0
        )


@pytest.mark.parametrize("of_weight", [False, True])
@pytest.mark.parametrize("layout", ceiling.LAYOUTS)
def test_products_are_products(monkeypatch: pytest.MonkeyPatch, of_weight: bool, layout: tuple[bool, bool]) -> None:
    monkeypatch.setattr(ceiling, "BEYOND_CACHES", 2**6)
    seen = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: (seen.append((a, b, out)), real(a, b, out=out)))
    ceiling._product(torch.float32, 4, 6, 5, of_weight, *layout)()
    (a, b, out), turned = seen[0], [not t.is_contiguous() for t in seen[0][:2]]
    assert (*a.shape, *b.shape, *out.shape) == (4, 6, 6, 5, 4, 5) and turned == list(layout)


def test_a_side_is_compared_with_the_floors_beside_it() -> None:
    floors = [{"products": 6.0, "weights": w} for w in (4.0, 4.0, 14.0, 4.0, 4.0)]
    told = ceiling.table(floors, {"a": [20.0, 30.0], "b": [30.0, 10.0]})
    assert "| products | 6 | 6 |" in told and "| weights | 6 | 4 |" in told and "| floor | 12 | 10 |" in told
    assert "| a | 25 | 2.00 | 2.00 to 2.00 |" in told  # 20 / 10, 30 / 15
    assert "| b | 20 | 1.50 | 1.00 to 2.00 |" in told  # 30 / 15, 10 / 10
    assert "side" not in ceiling.table(floors, {})


def test_weights_come_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "BEYOND_CACHES", 2**12)
    weights = ceiling.in_turn(torch.arange(256.0))  # 1 KiB
    met = [next(weights) for _ in range(6)]
    assert len({w.data_ptr() for w in met[:5]}) == 5 and met[5] is met[0] and torch.equal(met[4], torch.arange(256.0))
