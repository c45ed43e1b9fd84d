"""Products that are taken in fp32 where a CPU does not multiply 16 bit: against fp64, and through the layers that use them."""

import pytest
import torch
from torch.nn import functional as F

from accessory.model import attention
from accessory.model.lora_function import lora_linear
from accessory.parallel import groups, layers, loss, products

HALF = (torch.bfloat16, torch.float16)
ROUNDED = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}  # one rounding of the result


@pytest.fixture(params=[False, True], ids=["without", "with"])
def instructions(request, monkeypatch):
    """A CPU without instructions for 16 bit, and one with them."""
    groups.ensure()
    monkeypatch.setattr(products, "CPU_MULTIPLIES", dict.fromkeys(HALF, request.param))
    return request.param


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def far(found: torch.Tensor, true: torch.Tensor) -> float:
    return ((found.double() - true).abs().max() / true.abs().max()).item()


@pytest.mark.parametrize("block", [1, 40, 130, 2**20])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_blocks_of_a_weight_are_the_whole(dtype, block, monkeypatch):
    monkeypatch.setattr(products, "BLOCK", block)
    x, g, weight = drawn(2, 3, 13), drawn(2, 3, 29), drawn(29, 13, dtype=dtype)
    out, back = torch.full((6, 29), 7.0), torch.full((6, 13), 7.0)
    assert far(products.times_t(x, weight), x.double() @ weight.double().t()) < 1e-6
    assert far(products.times(g, weight), g.double() @ weight.double()) < 1e-6
    assert products.times_t(x.flatten(0, 1), weight, out=out) is out
    assert products.times(g.flatten(0, 1), weight, out=back) is back
    torch.testing.assert_close(out.view(2, 3, 29), products.times_t(x, weight))
    torch.testing.assert_close(back.view(2, 3, 13), products.times(g, weight))
    assert products.times_t(x[:, :0], weight).shape == (2, 0, 29)


@pytest.mark.parametrize("kept", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_a_linear_and_its_gradients(dtype, kept, instructions):
    x, weight = drawn(2, 5, 32, dtype=dtype).requires_grad_(), drawn(24, 32, dtype=kept, seed=1).requires_grad_()
    g = drawn(2, 5, 24, dtype=dtype, seed=2)
    y = layers.linear(x, weight)
    found = torch.autograd.grad(y, (x, weight), g)
    assert y.dtype == found[0].dtype == dtype and found[1].dtype == kept
    wide, w = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    true = wide @ w.t()
    bound = 2 * max(ROUNDED[dtype], ROUNDED[kept])
    for mine, other in zip((y, *found), (true, *torch.autograd.grad(true, (wide, w), g.double()))):
        assert far(mine, other) < bound


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_adapter(dropout, instructions):
    dtype = torch.bfloat16
    x, weight = drawn(3, 7, 32, dtype=dtype).requires_grad_(), drawn(24, 32, dtype=dtype, seed=1)
    a, b = drawn(4, 32, seed=2).requires_grad_(), drawn(24, 4, seed=3).requires_grad_()
    torch.manual_seed(5)
    y = lora_linear(x, weight, None, a, b, 0.5, dropout)
    torch.manual_seed(5)
    kept = torch.empty(x.shape, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else torch.ones(x.shape).bool()
    wide, wa, wb = (t.detach().double().requires_grad_() for t in (x, a, b))
    true = wide @ weight.double().t() + 0.5 * (wide * kept / (1 - dropout)) @ wa.t() @ wb.t()
    g = drawn(3, 7, 24, dtype=dtype, seed=4)
    found = torch.autograd.grad(y, (x, a, b), g)
    assert y.dtype == found[0].dtype == dtype and found[1].dtype == torch.float32
    for mine, other in zip((y, *found), (true, *torch.autograd.grad(true, (wide, wa, wb), g.double()))):
        assert far(mine, other) < (3e-2 if instructions else 6e-3)


@pytest.mark.parametrize("trained", [False, True])
def test_head_and_loss(trained, instructions, monkeypatch):
    monkeypatch.setattr(products, "BLOCK", 200)
    hidden, weight = drawn(9, 16, dtype=torch.bfloat16).requires_grad_(), drawn(50, 16, dtype=torch.bfloat16, seed=1)
    targets = torch.arange(9) * 5
    total, _ = loss.linear_cross_entropy(hidden, weight.requires_grad_(trained), targets, 50)
    total.backward()
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    true = F.cross_entropy(h @ w.t(), targets, reduction="sum")
    true.backward()
    assert far(total, true) < 5e-3 and far(hidden.grad, h.grad) < 2e-2 and hidden.grad.dtype == torch.bfloat16
    assert not trained or far(weight.grad, w.grad) < 2e-2


def test_attention(instructions):
    q, k, v = (drawn(1, 40, n, 16, dtype=torch.bfloat16, seed=n) for n in (4, 2, 2))
    packed = attention.Segments(torch.tensor([0, 11, 40]), q.device)
    y = attention.attend(q, k, v, packed, None)
    true = attention.attend(q.double(), k.double(), v.double(), packed, None)
    assert y.dtype == torch.bfloat16 and far(y, true) < 1e-2


def test_a_compiled_linear(instructions):
    x, weight = drawn(5, 32, dtype=torch.bfloat16).requires_grad_(), drawn(24, 32, dtype=torch.bfloat16, seed=1)
    y = torch.compile(layers.linear, backend="aot_eager", fullgraph=True)(x, weight)
    assert y.dtype == torch.bfloat16 and far(y, x.double() @ weight.double().t()) < 2**-7
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("inputs", [products.TURNED_FROM - 1, products.TURNED_FROM])
def test_where_there_is_amx_rows_are_turned_for_weights_of_many_inputs(inputs, monkeypatch):
    g, x = drawn(64, 48, dtype=torch.bfloat16), drawn(64, inputs, dtype=torch.bfloat16, seed=1)
    monkeypatch.setattr(products, "AMX", True)
    turned = products.columns(g, inputs)
    assert torch.equal(turned, g.t()) and turned.is_contiguous() == (inputs >= products.TURNED_FROM)
    assert not products.turns(g.float(), inputs)
    weight = drawn(48, inputs).requires_grad_()
    (found,) = torch.autograd.grad(layers.linear(x, weight), weight, g)
    assert far(found, g.double().t() @ x.double()) < ROUNDED[torch.bfloat16]


def test_where_there_is_amx_a_compiled_weights_gradient_is_of_rows_turned_before(monkeypatch):
    x, weight = drawn(1, 64, 32).requires_grad_(), drawn(48, 32, seed=1).requires_grad_()
    g = drawn(1, 64, 48, dtype=torch.bfloat16, seed=2)
    groups.ensure()

    def layer(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        # with something before and after: gradients then are the compiler's own, to lay as it likes
        return torch.sigmoid(layers.linear(torch.sigmoid(x).bfloat16(), w))

    factors, true_mm = [], torch.mm

    def mm(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        factors.append(a)
        return true_mm(a, b, out=out)

    plain = torch.autograd.grad(layer(x, weight), (x, weight), g)
    monkeypatch.setattr(products, "AMX", True)
    monkeypatch.setattr(torch._inductor.select_algorithm.extern_kernels, "mm", mm)
    torch._dynamo.reset()
    for mine, other in zip(torch.autograd.grad(torch.compile(layer)(x, weight), (x, weight), g), plain):
        assert mine.dtype == torch.float32 and mine.is_contiguous()
        assert far(mine, other.double()) < 2 * ROUNDED[torch.bfloat16]
    # x W^T, g W and g^T x
    assert len(factors) == 3 and all(f.is_contiguous() for f in factors), [(f.shape, f.stride()) for f in factors]


def test_without_instructions_no_product_of_16_bit_is_left(monkeypatch):
    """All of a step's products in fp32: a slow one would not be wrong, only thirty times slower."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from accessory.model.args import ModelArgs
    from accessory.model.llama import Transformer

    monkeypatch.setattr(products, "CPU_MULTIPLIES", dict.fromkeys(HALF, False))
    seen: list[tuple[str, torch.dtype]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if name in ("mm", "addmm", "bmm", "baddbmm", "addmm_", "linear", "matmul") or "attention" in name:
                seen.append((name, next(a.dtype for a in args if isinstance(a, torch.Tensor))))
            return function(*args, **(kwargs or {}))

    groups.ensure()
    args = ModelArgs.from_dict({"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 40})
    for half in HALF:
        model = Transformer(args).init_weights(dtype=half)
        tokens = torch.arange(12).unsqueeze(0)
        with Watch():
            model(tokens, labels=tokens, cu_seqlens=torch.tensor([0, 5, 12]))[0].backward()
        assert len(seen) > 30 and {dtype for _, dtype in seen} == {torch.float32}, seen


def test_rows_of_many_counts_become_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(products.CPU_MULTIPLIES, torch.bfloat16, True)
    whole = {n: n + products.padding(n, torch.bfloat16, torch.device("cpu")) for n in range(1, 8193)}
    assert all(n <= m < n + max(32, n / 32) and m % 32 == 0 for n, m in whole.items())
    assert whole[8192] == 8192 and len({m for n, m in whole.items() if n > 4096}) == 32
    for dtype, device in ((torch.float32, torch.device("cpu")), (torch.bfloat16, torch.device("cuda"))):
        assert products.padding(1001, dtype, device) == 0
    monkeypatch.setitem(products.CPU_MULTIPLIES, torch.bfloat16, False)
    assert products.padding(1001, torch.bfloat16, torch.device("cpu")) == 0
