"""Packed attention as plain products on CPU, beside torch's SDPA in fp64 and beside the flash kernel's own errors in bf16."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from accessory.model import attention, blocks
from accessory.model.attention import Segments
from accessory.parallel import products

LENGTHS = [[1, 5, 128, 3], [129, 7], [300, 64, 2]]  # below, at and above a block of queries


def drawn(lengths: list[int], heads: int, kv: int, dtype: torch.dtype, size: int = 16) -> list[Tensor]:
    """q, k, v and the result's gradient."""
    draw = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    return [torch.randn(tokens, n, size, generator=draw).to(dtype) for n in (heads, kv, kv, heads)]


def bounds_of(lengths: list[int]) -> list[int]:
    return torch.tensor([0, *lengths]).cumsum(0).tolist()


def by_sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    parts = zip(*(t.split(lengths) for t in (q, k, v)))
    heads_first = ([t.transpose(0, 1).unsqueeze(0) for t in part] for part in parts)
    done = (F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in heads_first)
    return torch.cat([y[0].transpose(0, 1) for y in done])


def with_gradients(attend, tensors: list[Tensor]) -> list[Tensor]:
    """The result and the gradients of q, k and v."""
    *inputs, gradient = (t.detach().clone() for t in tensors)
    inputs = [t.requires_grad_() for t in inputs]
    y = attend(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, gradient)]


@pytest.fixture(params=["exp", "exp2"])
def either_exponential(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with AMX, and on others."""
    monkeypatch.setattr(blocks, "BY_EXP", request.param == "exp")
    monkeypatch.setattr(blocks, "ROUNDED_CHANGE", request.param == "exp")


@pytest.mark.usefixtures("either_exponential")
@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_result_and_gradients_are_those_of_sdpa(lengths: list[int], kv: int) -> None:
    tensors = drawn(lengths, 4, kv, torch.float32)
    ours = with_gradients(lambda *x: blocks.attend(*x, bounds_of(lengths)), tensors)
    exact = with_gradients(lambda *x: by_sdpa(*x, lengths), [t.double() for t in tensors])
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("either_exponential")
def test_scores_so_far_apart_that_exp_under_and_overflows() -> None:
    lengths = [300, 64, 2]
    q, *others = drawn(lengths, 4, 2, torch.float32)
    tensors = [80 * q, *others]  # scores of up to 400, later keys' too
    ours = with_gradients(lambda *x: blocks.attend(*x, bounds_of(lengths)), tensors)
    exact = with_gradients(lambda *x: by_sdpa(*x, lengths), [t.double() for t in tensors])
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("flash_forward, keeps", [(True, False), (False, False), (False, True)])
def test_bf16_is_no_further_from_the_truth_than_flash(
    monkeypatch: pytest.MonkeyPatch, flash_forward: bool, keeps: bool
) -> None:
    for as_with_amx in ("FLASH_FORWARD", "ROUNDED_CHANGE", "BY_EXP"):
        monkeypatch.setattr(blocks, as_with_amx, flash_forward)
    lengths = [200, 90]
    tensors = drawn(lengths, 4, 4, torch.bfloat16, 64)
    exact = with_gradients(lambda *x: by_sdpa(*x, lengths), [t.double() for t in tensors])
    flash = with_gradients(lambda *x: by_sdpa(*x, lengths), tensors)
    ours = with_gradients(lambda *x: blocks.attend(*x, bounds_of(lengths), keeps), tensors)
    off = [[((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact)] for found in (ours, flash)]
    assert sum(off[0]) <= sum(off[1]) and max(off[0]) <= max(off[1]), off


@pytest.mark.parametrize("kv", [1, 4])
def test_flash_forward_has_grouped_heads(monkeypatch: pytest.MonkeyPatch, kv: int) -> None:
    lengths, found = [70, 33, 1], []
    for flash_forward in (True, False):
        monkeypatch.setattr(blocks, "FLASH_FORWARD", flash_forward)
        tensors = drawn(lengths, 4, kv, torch.bfloat16, 64)
        found.append(with_gradients(lambda *x: blocks.attend(*x, bounds_of(lengths)), tensors))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("keeps", [True, False])
def test_a_compiled_layer_has_the_same_as_one_opaque_step(keeps: bool) -> None:
    lengths = [70, 33, 1]
    tensors, bounds = drawn(lengths, 4, 2, torch.bfloat16), bounds_of(lengths)
    opaque = with_gradients(lambda *x: blocks.attend_opaque(*x, torch.tensor(bounds), keeps)[0], tensors)
    usual = with_gradients(lambda *x: blocks.attend(*x, bounds, keeps), tensors)
    assert all(torch.equal(a, b) for a, b in zip(opaque, usual))
    inputs = [t.clone().requires_grad_() for t in tensors[:3]]
    of_results = () if keeps else ("test_aot_dispatch_dynamic",)  # where nothing was kept, memory has anything
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", *of_results)
    torch.library.opcheck(blocks.attend_opaque, (*inputs, torch.tensor(bounds), keeps), test_utils=checks)


@pytest.mark.parametrize("kv", [1, 4])
@pytest.mark.parametrize("lengths", [[200, 33, 1], [40, 700, 90]])  # all blocks have room, or some
def test_kept_probabilities_are_those_made_again(monkeypatch: pytest.MonkeyPatch, lengths: list[int], kv: int) -> None:
    monkeypatch.setattr(blocks, "QUERIES", 128)
    monkeypatch.setattr(blocks, "FLASH_FORWARD", False)
    tensors, bounds, again = drawn(lengths, 4, kv, torch.bfloat16), bounds_of(lengths), []
    usual = with_gradients(lambda *x: blocks.attend(*x, bounds), tensors)
    made = blocks._Work.softmax_again
    monkeypatch.setattr(blocks._Work, "softmax_again", lambda *x: again.append(x) or made(*x))
    kept = with_gradients(lambda *x: blocks.attend(*x, bounds, True), tensors)
    count = sum(len(blocks._blocks(length)) for length in lengths)
    assert 0 < len(again) < count - 2 if max(lengths) > 256 else not again
    for a, b in zip(kept, usual):
        assert (a - b).norm() <= 3e-3 * b.norm()  # as flash's own error


def test_sequences_of_all_lengths_have_few_shapes() -> None:
    shapes = set()
    for length in range(1, 513):
        cuts = blocks._blocks(length)
        assert cuts[0][0] == 0 and all(a[1] == b[0] for a, b in zip(cuts, cuts[1:]))
        assert cuts[-1][0] < length <= cuts[-1][1] < length + blocks.STEP
        shapes |= {(j - i, j) for i, j in cuts}
    assert len(shapes) <= 64 and all(n <= blocks.QUERIES and n % blocks.STEP == 0 for n, _ in shapes)


def test_inputs_in_any_order_of_elements() -> None:
    lengths = [130, 20]
    q, k, v, g = drawn(lengths, 4, 2, torch.bfloat16)
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v, g)]
    usual, other = (with_gradients(lambda *x: blocks.attend(*x, bounds_of(lengths)), t) for t in ([q, k, v, g], turned))
    assert all(torch.equal(a, b) for a, b in zip(usual, other))


@pytest.mark.parametrize("instructions", [True, False])
def test_packed_bf16_on_a_cpu_that_multiplies_it_goes_this_way(monkeypatch: pytest.MonkeyPatch, instructions) -> None:
    monkeypatch.setitem(products.CPU_MULTIPLIES, torch.bfloat16, instructions)
    called = []
    real = blocks.attend
    monkeypatch.setattr(blocks, "attend", lambda *x: called.append(x[0].dtype) or real(*x))
    for dtype, lengths in (
        (torch.bfloat16, [5, 9]),
        (torch.float32, [5, 9]),
        (torch.bfloat16, [blocks.LONGEST + 1, 2]),
    ):
        q, k, v = (t.unsqueeze(0) for t in drawn(lengths, 2, 2, dtype)[:3])
        packed = Segments(torch.tensor(bounds_of(lengths)), q.device)
        y = attention.attend(q, k, v, packed, None)
        torch.testing.assert_close(
            y[0].float(), by_sdpa(q[0].float(), k[0].float(), v[0].float(), lengths), rtol=2e-2, atol=2e-2
        )
    assert called == [torch.bfloat16] * instructions  # of two sequences, short, in bf16
