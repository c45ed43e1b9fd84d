"""bench/ceiling.py counts what a step multiplies as bench/workload.py does, and puts a peer's time beside its floor."""

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
    assert steps[0].lengths[0] == sum(sft.LENGTHS[sft.WARMUP * sft.WINDOWS * sft.BATCH])
    assert all(s.learnt < s.tokens for s in steps)


def test_a_small_step_is_timed_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "BEYOND_CACHES", 2**12)
    small = SIZES | {"n_layers": 1, "vocab_size": 64}
    told = {
        "products": ceiling.product_ms(torch.float32, 8, 16, 8, False)
        + ceiling.product_ms(torch.float32, 8, 16, 8, True),
        "passes": ceiling.passes_ms(torch.float32, small, 4),
        "silu": ceiling.silu_ms(torch.bfloat16, 4, 64),
        "weights": ceiling.weights_ms(small, 0, torch.bfloat16) + ceiling.weights_ms(small, 16, torch.float32),
        "softmax": ceiling.softmax_ms(4, 64),
        "attention": ceiling.attention_ms(torch.bfloat16, (8, 3), 2, 1, 8),
    }
    assert all(v > 0 for v in told.values())
    assert "| peer, 20 ms: at most | 2.00 |" in ceiling.table({"products": 6.0, "AdamW": 4.0}, {"peer": 20.0})


def test_weights_come_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "BEYOND_CACHES", 2**12)
    weights = ceiling.in_turn(torch.arange(256.0))  # 1 KiB
    met = [next(weights) for _ in range(6)]
    assert len({w.data_ptr() for w in met[:5]}) == 5 and met[5] is met[0] and torch.equal(met[4], torch.arange(256.0))
