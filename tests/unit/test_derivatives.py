"""Second derivatives and torch.func, against differences and against a LLaMA in torch alone; a clear error where there is none.

What is asked for matters: torch.autograd.grad comes only by the nodes that lead to the tensors it is asked for, so each is asked
for alone. `sdpa_kernel(MATH)` is torch's own condition: its flash kernels have no second derivative, and say so.
"""

from itertools import product
from typing import Any, Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import functional_call, jacrev, jvp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from accessory.model import Transformer, quant, rope
from accessory.model.attention import Segments, attend
from accessory.model.llama import set_parameter
from accessory.model.lora import TuningArgs, add_tuning, mark_trainable
from accessory.model.lora_function import lora_linear
from accessory.model.norm import RMSNorm
from accessory.model.swiglu import swiglu
from accessory.parallel import groups, products
from accessory.parallel.layers import linear
from bench.sides.plain_llama import Llama
from tests.helpers import random_weights, tiny_args

SIZES = {"n_heads": 4, "n_kv_heads": 2, "dim": 16, "hidden_dim": 24, "vocab_size": 31, "tie_word_embeddings": False}
TOKENS = torch.randint(31, (2, 7), generator=torch.Generator().manual_seed(3))
ASKED = (
    "tok_embeddings",
    "layers.0.attention.wk",
    "layers.0.feed_forward.w2",
    "layers.1.ffn_norm",
    "output",
)  # in pairs


@pytest.fixture(autouse=True)
def _kernel_with_a_second_derivative():
    groups.ensure()
    with sdpa_kernel(SDPBackend.MATH):
        yield


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape) + seed))


def model_of(dtype: torch.dtype = torch.float32, lora_rank: int = 0, mode: str = "none") -> Transformer:
    model = Transformer(tiny_args(**SIZES))
    weights = random_weights(model.args)
    tuning = TuningArgs(lora_rank=lora_rank)
    add_tuning(model, tuning)
    for name in [n for n, _ in model.named_parameters()]:
        adapter = drawn(*model.get_parameter(name).shape) * 0.3
        set_parameter(model, name, weights.get(name, adapter).to(dtype))
    mark_trainable(model, tuning)
    for layer in model.layers:
        layer.checkpointing = mode
    return model


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), TOKENS.flatten())


# --- functions --------------------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional_call(RMSNorm(6, 1e-5), {"weight": weight}, (x,))


def adapted(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return lora_linear(x, weight, bias, a, b, 1.5)


def packed_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three sequences, the last two of which come after the first."""
    segments = Segments(torch.tensor([0, 2, 5, 6]), torch.device("cpu"), torch.tensor([-1, 0, 0]))
    return attend(q, k, v, segments, None)


def rotated(x: Tensor) -> Tensor:
    return rope.rotate(x, rope.table(torch.arange(3).unsqueeze(0), *rope.frequencies(4, 100.0, None)))


def in_4_bits(x: Tensor) -> Tensor:
    layout = quant.Layout(5, 32, 0, 0, 5, 32)
    packed = quant.pack(drawn(5, 32, dtype=torch.float32), layout, quant.STORAGE)
    return quant.linear(x, packed, layout, quant.tables("cpu"))


@pytest.mark.parametrize(
    "function, shapes",
    [
        (swiglu, [(3, 4), (3, 4)]),
        (norm, [(2, 3, 6), (6,)]),
        (adapted, [(2, 3, 4), (5, 4), (5,), (2, 4), (5, 2)]),
        (packed_attention, [(1, 6, 4, 2), (1, 6, 2, 2), (1, 6, 2, 2)]),
        (rotated, [(2, 3, 2, 4)]),
        (in_4_bits, [(3, 32)]),
    ],
    ids=["swiglu", "norm", "lora", "packed", "rope", "nf4"],
)
def test_first_and_second_derivatives_are_those_of_differences(function: Callable, shapes: list) -> None:
    tensors = [drawn(*shape, seed=i) for i, shape in enumerate(shapes)]
    for asked in range(len(shapes) + 1):  # each alone, the others frozen; last all together
        if function is adapted and asked == 4:
            continue  # B alone: refused, below
        for i, tensor in enumerate(tensors):
            tensor.requires_grad_(asked in (i, len(shapes)))
        assert gradcheck(function, tensors) and gradgradcheck(function, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_weight_in_another_dtype(dtype: torch.dtype, monkeypatch) -> None:
    """What casts the weight, and what the CPU does not multiply: as plain torch on the same numbers."""
    monkeypatch.setitem(products.CPU_MULTIPLIES, torch.bfloat16, False)
    x, other = drawn(4, 6).to(dtype).requires_grad_(), torch.bfloat16 if dtype == torch.float32 else torch.float32
    weight = drawn(5, 6).to(other).requires_grad_()

    def seconds(function: Callable) -> list[Tensor]:
        firsts = grad(function(x, weight).float().pow(3).sum(), (x, weight), create_graph=True)
        return [grad(f.float().pow(2).sum(), t, retain_graph=True)[0] for f, t in product(firsts, (x, weight))]

    expected = seconds(lambda x, w: F.linear(x.float(), w.float()).to(x.dtype))
    for ours, plain in zip(seconds(linear), expected, strict=True):
        assert plain.any() and (ours - plain).abs().max() <= 2e-2 * plain.abs().max()


def test_an_input_that_is_two_or_comes_from_another_counts_once() -> None:
    h = drawn(3, 4).requires_grad_()
    for function in (lambda h: swiglu(h, h), lambda h: swiglu(h, h.sin())):
        assert gradcheck(function, h) and gradgradcheck(function, h)


# --- the model --------------------------------------------------------------------------------------------------------


def seconds(model: torch.nn.Module, names: tuple[str, ...]) -> dict[tuple[str, str], Tensor]:
    """{(a, b): the derivative by b of a fixed direction in the gradient by a}, each gradient asked for alone."""
    weights = {n: model.get_parameter(f"{n}.weight") for n in names}
    found = {}
    for a, b in product(names, names):
        [first] = grad(loss_of(model(TOKENS)), weights[a], create_graph=True)
        [found[a, b]] = grad((first * drawn(*first.shape, dtype=first.dtype)).sum(), weights[b])
    return found


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_second_derivatives_are_those_of_plain_torch(mode: str) -> None:
    ours = model_of(mode=mode)
    plain = Llama(ours.args.to_dict() | {"rope_theta": ours.args.rope_theta})
    plain.load_state_dict(ours.state_dict())
    expected, found = seconds(plain, ASKED), seconds(ours, ASKED)
    for pair, value in expected.items():
        assert value.any() and (found[pair] - value).abs().max() <= 1e-4 * value.abs().max(), pair


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_and_of_adapters_those_of_differences(mode: str) -> None:
    model = model_of(torch.float64, lora_rank=2, mode=mode)
    name = "layers.0.feed_forward.w1.lora_a"
    by, other = model.get_parameter(f"{name}.weight"), model.get_parameter("layers.1.attention.wo.lora_b.weight")
    v, step = drawn(*by.shape), 1e-5

    def first(at: float) -> Tensor:
        with torch.no_grad():
            by.add_(v, alpha=at)
        [found] = grad(loss_of(model(TOKENS)), other)
        with torch.no_grad():
            by.sub_(v, alpha=at)
        return found

    [found] = grad(loss_of(model(TOKENS)), other, create_graph=True)
    direction = drawn(*found.shape)
    [found] = grad((found * direction).sum(), by)
    expected = ((first(step) - first(-step)) * direction).sum() / (2 * step)
    torch.testing.assert_close((found * v).sum(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_functional_transforms(lora_rank: int) -> None:
    """grad, per-sample gradients, forward mode and its derivative: those of backward and of create_graph."""
    model = model_of(lora_rank=lora_rank)
    name = "layers.0.feed_forward.w1" + (".lora_a" if lora_rank else "") + ".weight"
    weight = model.get_parameter(name)

    def loss(w: Tensor, tokens: Tensor) -> Tensor:
        logits = functional_call(model, {name: w}, (tokens.unsqueeze(0),))[0]
        return F.cross_entropy(logits[:-1], tokens[1:])

    def labelled(w: Tensor) -> Tensor:
        return functional_call(model, {name: w}, (TOKENS,), {"labels": TOKENS})[0]

    rows, v = [grad(loss(weight, row), weight)[0] for row in TOKENS], drawn(*weight.shape, dtype=weight.dtype)
    near: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}
    samples = vmap(torch.func.grad(loss), (None, 0))(weight.detach(), TOKENS)
    torch.testing.assert_close(samples, torch.stack(rows), **near)
    torch.testing.assert_close(torch.func.grad(labelled)(weight.detach()), sum(rows) * 6, **near)
    along = jvp(lambda w: loss(w, TOKENS[0]), (weight.detach(),), (v,))[1]
    torch.testing.assert_close(along, (rows[0] * v).sum(), **near)
    [first] = grad(loss(weight, TOKENS[0]), weight, create_graph=True)
    [expected] = grad((first * v).sum(), weight)
    twice = jvp(torch.func.grad(lambda w: loss(w, TOKENS[0])), (weight.detach(),), (v,))[1]
    torch.testing.assert_close(twice, expected, **near)
    assert jacrev(labelled)(weight.detach()).shape == weight.shape


# --- where there is none ----------------------------------------------------------------------------------------------


def test_the_loss_of_labels_has_none_and_says_so() -> None:
    model = model_of()
    loss = model(TOKENS, labels=TOKENS)[0]
    with pytest.raises(RuntimeError, match="through the loss of labels=..: compute it from the logits"):
        grad(loss, model.output.weight, create_graph=True)


def test_nor_has_a_lora_b_that_is_trained_alone() -> None:
    model = model_of(lora_rank=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_b" in name)
    model(TOKENS).sum().backward()
    with pytest.raises(RuntimeError, match="a trained lora_b beside a frozen lora_a: train both"):
        model(TOKENS).sum().backward(create_graph=True)


def test_nor_have_blocks_of_16_bit(monkeypatch) -> None:
    monkeypatch.setitem(products.CPU_MULTIPLIES, torch.bfloat16, True)
    model = model_of(torch.bfloat16)
    logits = model(TOKENS[:1], cu_seqlens=torch.tensor([0, 3, 7]))
    with pytest.raises(RuntimeError, match="attention over packed sequences in bf16: give each sequence a row"):
        logits.float().sum().backward(create_graph=True)
