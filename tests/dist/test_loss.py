"""The vocab-parallel, token-chunked cross-entropy against torch's on the whole head: loss, both gradients, hits.

V = 101 divides by no mp size, so the last ranks hold padding rows; those are filled with huge values, which must not show.
"""

import itertools

import pytest
import torch
from torch.nn import functional as F

from accessory.parallel import groups, layers, loss, products
from tests.helpers import gather_over_mp, run_ranks

V, D = 101, 16
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def inputs(n: int, dtype: torch.dtype, v: int = V) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, D, generator=generator).to(dtype)
    weight = torch.randn(v, D, generator=generator).to(dtype)
    targets = torch.randint(v, (n,), generator=generator)
    targets[: n // 3] = (hidden[: n // 3].float() @ weight.float().t()).argmax(
        1
    )  # some hits, or `correct` proves nothing
    return hidden, weight, targets


def reference(hidden, weight, targets):
    """In fp64 from the same values: (loss, d hidden, d weight, hits)."""
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = h @ w.t()
    total = F.cross_entropy(logits, targets, reduction="sum")
    total.backward()
    return total.detach(), h.grad, w.grad, (logits.argmax(1) == targets).sum()


def ours(hidden, weight, targets, v: int = V, factor: float = 1.0, trains=(True, True), turned: bool = False):
    """The same through this rank's rows, put together again. Padding rows hold 1e4. `turned`: the weight lies as its transpose."""
    start, stop = layers.vocab_range(v)
    rows = layers.padded_vocab(v) // groups.mp_size()
    part = torch.full((rows, D), 1e4, dtype=weight.dtype)
    part[: stop - start] = weight[start:stop]
    part = part.t().contiguous().t() if turned else part
    h, w = hidden.clone().requires_grad_(trains[0]), part.requires_grad_(trains[1])
    total, correct = loss.linear_cross_entropy(layers.copy_to_mp(h), w, targets, v)
    (total * factor).backward()
    w_grad = None
    if w.grad is not None:
        assert not w.grad[stop - start :].any(), "a padding row has a gradient"
        w_grad = torch.cat(gather_over_mp(w.grad))[:v]
    return total.detach(), h.grad, w_grad, correct


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> float:
    """Largest difference relative to the expected values' scale."""
    assert found.shape == expected.shape
    if not expected.numel():
        return 0.0
    error = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    assert error <= TOLERANCE[dtype], (error, dtype)
    return error.item()


def every_case(mp: int) -> float:
    groups.init(mp)
    worst = 0.0
    # chunks of 1 row, of some rows (64 is no multiple), of some in blocks of a few, of all
    sizes = [(1, 2**18), (4 * 101 * 5, 2**18), (4 * 101 * 20, 101 * 3), (loss.CHUNK_BYTES, loss.BLOCK["cpu"])]
    for n, (chunk, block), dtype, way in itertools.product((0, 1, 7, 21, 64), sizes, TOLERANCE, ("cpu", "parts", "rounded")):
        hidden, weight, targets = inputs(n, dtype)
        expected = reference(hidden, weight, targets)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loss, "SUM_BYTES", 0)  # chunks where one would do
            patch.setattr(loss, "CHUNK_BYTES", chunk)
            patch.setattr(loss, "BLOCK", {"cpu": block})
            patch.setattr(loss, "BY_EXP", True)  # where there is AMX
            if way != "cpu":  # a GPU's ways: in parts that do not go into the vocabulary, or in 16 bit
                patch.setattr(loss, "PRODUCT_ROWS", 16)
                patch.setattr(loss, "WHOLE_PRODUCT", ())
                patch.setattr(loss, "BY_EXP", False)
                patch.setitem(products.CPU_MULTIPLIES, torch.bfloat16, True)
            if way == "rounded":
                patch.setattr(loss, "ROUNDED_CHUNKS", {"cpu": 8})
                patch.setattr(loss, "FAST_ROWS", {"cpu": {2: 1, 4: 1}})
            found = ours(hidden, weight, targets, turned=n == 7 or way == "rounded")
        assert found[0].dtype == torch.float32 and found[1].dtype == dtype and found[2].dtype == dtype
        errors = [close(f, e, dtype) for f, e in zip(found[:3], expected[:3])]
        worst = max([worst, *errors]) if dtype == torch.float32 else worst
        if dtype == torch.float32:
            assert found[3] == expected[3], (found[3], expected[3])
    return worst


@pytest.mark.parametrize("mp", [1, 2, 3, 4])
def test_equals_torch_at_every_chunk_size(mp):
    worst = run_ranks(every_case, mp, world=mp)
    print(f"mp {mp}: largest relative difference {max(worst):.1e}")


@pytest.mark.parametrize("by_exp", [True, False])
def test_logits_so_far_apart_that_exp_underflows(monkeypatch: pytest.MonkeyPatch, by_exp: bool) -> None:
    monkeypatch.setattr(loss, "BY_EXP", by_exp)
    groups.ensure()
    hidden, weight, targets = inputs(64, torch.float32)
    hidden, weight = (128 * hidden).round(), weight.round()  # whole numbers, so that the logits are exact: up to some 2000
    for found, expected in zip(ours(hidden, weight, targets), reference(hidden, weight, targets)[:3]):
        close(found, expected, torch.float32)
        assert found.isfinite().all()


def edge_cases() -> None:
    groups.init(4)
    hidden, weight, targets = inputs(
        12, torch.float32, v=5
    )  # 2 rows a rank: the last holds padding only, the third half
    expected = reference(hidden, weight, targets)
    for f, e in zip(ours(hidden, weight, targets, v=5), expected[:3]):
        close(f, e, torch.float32)
    hidden, weight, targets = inputs(12, torch.float32)
    expected = reference(hidden, weight, targets)
    _, h_grad, w_grad, _ = ours(hidden, weight, targets, factor=0.25)
    close(h_grad, expected[1] / 4, torch.float32)
    close(w_grad, expected[2] / 4, torch.float32)
    usual, loss.FAST_ROWS = loss.FAST_ROWS, {"cpu": {4: 5}}  # three chunks of the twelve
    frozen_head = ours(hidden, weight, targets, trains=(True, False))
    loss.FAST_ROWS = usual
    assert frozen_head[2] is None
    close(frozen_head[0], expected[0], torch.float32)
    close(frozen_head[1], expected[1], torch.float32)
    head_only = ours(hidden, weight, targets, trains=(False, True))
    assert head_only[1] is None
    close(head_only[2], expected[2], torch.float32)
    with torch.no_grad():
        start, stop = layers.vocab_range(V)
        part = F.pad(weight[start:stop], (0, 0, 0, 26 - (stop - start)))
        close(loss.linear_cross_entropy(hidden, part, targets, V)[0], expected[0], torch.float32)


def test_padding_only_ranks_scaled_loss_and_frozen_parts():
    run_ranks(edge_cases, world=4)


def extreme_logits() -> None:
    groups.init(2)
    for scale in (300.0, 1e4):
        hidden, weight, targets = inputs(20, torch.float32)
        expected = reference(hidden * scale, weight, targets)
        found = ours(hidden * scale, weight, targets)
        assert found[0].isfinite()
        close(found[0], expected[0], torch.float32)
        close(found[1], expected[1], torch.float32)


def test_large_logits_do_not_overflow():
    run_ranks(extreme_logits, world=2)


def test_one_chunk_where_the_sum_over_several_would_want_as_much_memory():
    groups.ensure()
    head = torch.nn.Parameter(torch.empty(128256, 512, device="meta"))
    rows = loss.CHUNK_BYTES // (2 * 128256)
    most = rows + 4 * 512 // 2  # a sum of 4 bytes a weight beside a chunk, in logits of 2 bytes
    for size, count, chunks in [(2, 0, 0), (2, 1, 1), (2, most, 1), (2, most + 1, 3), (4, rows // 2, 1), (4, rows, 3)]:
        found = loss.rows_of_chunk(head, size, count)  # fp32 is summed in place
        assert -(-count // found) == chunks and found * chunks < count + max(1, chunks), (size, count, found)
    head.requires_grad_(False)
    assert [loss.rows_of_chunk(head, size, 1024) for size in (2, 4, 8)] == [256, 256, 128]  # 4 and 8: of CHUNK_BYTES


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_validation_takes_no_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a trained head: the loss is the same to the bit, the products for gradients are left out."""
    groups.ensure()
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * 101 * 5)
    hidden, weight, targets = inputs(64, dtype)
    weight.requires_grad_()
    learning = loss.linear_cross_entropy(hidden, weight, targets, V)
    monkeypatch.setattr(loss, "_add_product", None)
    with torch.no_grad():
        validating = loss.linear_cross_entropy(hidden, weight, targets, V)
    assert [x.item() for x in learning] == [x.item() for x in validating]


@pytest.mark.parametrize("instructions", [True, False])
def test_a_second_backward_is_right_or_refused(instructions, monkeypatch):
    groups.ensure()
    monkeypatch.setitem(products.CPU_MULTIPLIES, torch.bfloat16, instructions)
    for dtype in (torch.float32, torch.bfloat16):  # the weight stays fp32: in bf16 its gradient is a copy
        h = torch.randn(6, 8, dtype=dtype, requires_grad=True)
        w = torch.randn(11, 8, requires_grad=True)
        total, _ = loss.linear_cross_entropy(h, w, torch.arange(6), 11)
        first = [g.clone() for g in torch.autograd.grad(total, (h, w), torch.tensor(0.5), retain_graph=True)]
        if dtype == torch.float32 or not instructions:  # all in fp32 then
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(total, (h, w))
        else:
            again = torch.autograd.grad(total, (h, w), torch.tensor(0.5))
            assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_gradients_are_scaled_in_fp32_and_rounded_once(monkeypatch):
    groups.ensure()
    monkeypatch.setitem(products.CPU_MULTIPLIES, torch.bfloat16, True)  # else there is none of 16 bit to scale
    factor = torch.tensor(1 / 997)  # no 16-bit number
    full, half = torch.float32, torch.bfloat16
    for kept, wanted in ((full, full), (half, half), (half, full)):
        h = torch.randn(50, 64, dtype=kept, requires_grad=True)
        w = torch.randn(101, 64).to(wanted).requires_grad_()
        targets, found = torch.arange(50), {}
        for by in (torch.tensor(1.0), factor):
            total, _ = loss.linear_cross_entropy(h, w, targets, 101)
            found[by.item()] = torch.autograd.grad(total, (h, w), by)
        for one, scaled in zip(found[1.0], found[factor.item()]):
            assert torch.equal(scaled, (one.float() * factor).to(one.dtype))
    # a fp32 gradient for a weight of 16 bits: by blocks, as on a GPU; `h` and `w` are those of (half, full)
    h, w, found = h.detach().float(), w.detach().to(half).requires_grad_(), {}
    for weight in (w, w.detach().float().requires_grad_()):
        total, _ = loss.linear_cross_entropy(h, weight, targets, 101)
        found[weight.dtype] = torch.autograd.grad(total, weight, factor if weight is w else torch.tensor(1.0))[0]
    assert torch.equal(found[half], (found[full] * factor).to(half))


def test_a_sum_of_few_chunks_in_16_bit_is_nearly_as_exact_as_one(monkeypatch):
    """The logits' gradient has been rounded too: 1.3 times the error of one chunk, beside 2.6 with 64 of them."""
    groups.ensure()
    monkeypatch.setitem(products.CPU_MULTIPLIES, torch.bfloat16, True)
    monkeypatch.setattr(loss, "FAST_ROWS", {"cpu": {2: 1, 4: 1}})
    monkeypatch.setattr(loss, "CHUNK_BYTES", 1)
    monkeypatch.setattr(products, "GRANULE", 1)  # 64 chunks have 8 rows each
    hidden, weight, _ = inputs(512, torch.bfloat16)
    targets = torch.randint(V, (512,), generator=torch.Generator().manual_seed(0))
    exact, errors = reference(hidden, weight, targets)[2], {}
    for chunks in (1, 8, 64):
        monkeypatch.setattr(loss, "ROUNDED_CHUNKS", {"cpu": chunks})
        assert loss.rows_of_chunk(weight.requires_grad_(), 2, 512) == 512 // chunks
        errors[chunks] = (ours(hidden, weight.detach(), targets)[2].double() - exact).pow(2).mean().sqrt()
    print({n: f"{e / errors[1]:.2f}" for n, e in errors.items()})
    assert errors[8] < 1.6 * errors[1] and errors[64] > 1.5 * errors[8]  # as bad as feared, where many are allowed


def test_on_a_gpu_a_head_in_16_bit_is_summed_in_few_chunks(monkeypatch):
    groups.ensure()
    monkeypatch.setattr(groups, "device", lambda: torch.device("cuda"))
    wide = torch.nn.Parameter(torch.empty(128256, 4096, device="meta"))
    narrow = torch.nn.Parameter(wide.detach().to(torch.bfloat16))
    for count, rows in [(0, 1), (1, 1), (1024, 1024), (5325, 888), (8192, 1024), (32768, 4096)]:
        assert loss.rows_of_chunk(narrow, 2, count) == loss.rows_of_chunk(wide, 2, count, 2) == rows
    # its own gradient in fp32 takes as much as logits of 8192 tokens, and the sum is that
    assert [loss.rows_of_chunk(wide, 2, n) for n in (5325, 8192, 10240)] == [5325, 8192, 1024]
