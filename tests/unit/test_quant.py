"""NF4 (accessory/model/quant.py) against bitsandbytes' bytes and its algorithm in numpy, what autograd keeps, and the model on it.

Golden values: bitsandbytes 0.50.2, functional.quantize_4bit(w, blocksize, compress_statistics=True, quant_type="nf4") and
dequantize_4bit of `golden_weight()`, at its default block size of 64 and at its smallest, on CPU in fp32. (Elsewhere its CPU kernel misses the nearest of the 256 levels of an absmax
about once in 500; its own reference formula, argmin, does not, and is what `reference` below does.)"""

import hashlib

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from accessory import config
from accessory.flags import ParallelArgs
from accessory.model import ModelArgs, Transformer, quant
from accessory.model.lora import TuningArgs, linears, mark_trainable, packed_weights, saved_terms
from accessory.model.pretrained import build, fill, quantise
from accessory.model.quant import NF4_LEVELS, Layout, dequantise, dynamic_levels, pack, tables
from accessory.parallel import groups
from accessory.train import loop, optim, plan
from tests.gpu import bodies
from tests.gpu.bodies import LORA, TINY, counting
from tests.unit.test_lora import shaped

GOLDEN = {  # by block size: sha256 of codes, codes of absmax, dequantised; mean; the one scale that all groups have
    64: (
        "c4e28d39bc58815d9bc26be8404fb995baef42139471c6eabe7896a4c04c7c2f",
        "f7e8008451e407b63931f92b98a4b502416f0c1d16a6f7936734c51cc381dc38",
        "d9a1b47cf2c47cdc7b8991de8940d321a5837e369cb269026ef18ed6d0f5d139",
        0.18534936010837555,
        0.15840063989162445,
    ),
    32: (
        "81c6cc958231c5b105d21cff2658e8a053d64934b167df72dd6d71f19aae614e",
        "2351d1f7502d865c75d5503ecad6ddaedfe699d5a5e8b63d515dfbf97eecabfe",
        "5cfb0745a974c96b7b58de49dc933d1784861f569b57ec23c20a26fc0841622a",
        0.18461142480373383,
        0.15913857519626617,
    ),
}
GOLDEN_FIRST = "05d19f4d18f3c17e3b06e2b06e2a05d1"  # the first block's first 16 bytes, at either size
SIZES = {"dim": 256, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 512, "vocab_size": 64}
DATA = counting([9, 5, 14, 7, 11, 6, 8, 12], TINY["vocab_size"])


@pytest.fixture(autouse=True)
def _one_rank() -> None:
    groups.ensure()


def golden_weight() -> torch.Tensor:  # (48, 384)
    r, c = torch.arange(48).view(-1, 1), torch.arange(384).view(1, -1)
    return (((r * 37 + c * 101) % 257) - 128).float() * (1 + (r * 5 + c // 64 * 3) % 11).float() / 4096


def whole(weight: torch.Tensor) -> Layout:
    return Layout(*weight.shape, 0, 0, *weight.shape)


def parts_of(packed: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean and scales, codes of absmax, codes of weights)."""
    data, count = packed.view(torch.uint8), layout.rows * layout.blocks
    head, rest = data[: 4 * layout.head].view(torch.float32), data[4 * layout.head :]
    return head, rest[:count], rest[count : count + count * quant.BLOCK // 2]


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", GOLDEN)
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bytes_are_those_of_bitsandbytes(storage: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant, "BLOCK", block)
    weight = golden_weight()
    layout = whole(weight)
    packed = pack(weight, layout, storage)
    assert packed.dtype == storage and packed.nbytes == layout.nbytes
    head, absmax, codes = parts_of(packed, layout)
    assert codes[:16].numpy().tobytes().hex() == GOLDEN_FIRST
    found = *map(sha, (codes, absmax, dequantise(packed, layout, tables("cpu"), torch.float32))), *head[:2].tolist()
    assert found == GOLDEN[block] and len(set(head[1:].tolist())) == 1


def reference(weight: np.ndarray) -> np.ndarray:
    """Published algorithm, element by element in numpy fp32: (rows, columns) -> dequantised. Each row's blocks are its own."""
    nf4, dynamic = np.array(NF4_LEVELS, np.float32), np.array(dynamic_levels(), np.float32)
    rows, columns = weight.shape
    padded = np.pad(weight.astype(np.float32), ((0, 0), (0, -columns % quant.BLOCK))).reshape(-1, quant.BLOCK)
    absmax = np.abs(padded).max(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.nan_to_num(padded * (np.float32(1) / absmax)[:, None])
    levels = nf4[np.abs(scaled[..., None] - nf4).argmin(-1)]
    mean = np.float32(absmax.astype(np.float64).mean())
    rest, again = absmax - mean, []
    for start in range(0, len(rest), 256):
        group = rest[start : start + 256]
        scale = np.abs(group).max()
        nearest = np.abs((group * (np.float32(1) / scale))[:, None] - dynamic).argmin(1)
        again.append(dynamic[nearest] * scale)
    absmax = np.concatenate(again) + mean
    return (levels * absmax[:, None]).reshape(rows, -1)[:, :columns]


@pytest.mark.parametrize("shape", [(40, 64), (33, 192), (300, 64), (7, 1000), (48, 48), (5, 72)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape_is_the_algorithm_in_numpy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    weight[2, : min(64, shape[1])] = 0  # a block of zeros
    layout = whole(weight)
    found = dequantise(pack(weight, layout, torch.bfloat16), layout, tables("cpu"), torch.float32)
    assert torch.equal(found, torch.from_numpy(reference(weight.float().numpy())))
    assert not found[2, : min(64, shape[1])].any()


def test_the_error_is_bounded_and_what_the_paper_says() -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(2)) * 0.02
    layout = whole(weight)
    error = (dequantise(pack(weight, layout, torch.bfloat16), layout, tables("cpu"), torch.float32) - weight).abs()
    blocks = weight.view(-1, quant.BLOCK)
    absmax = blocks.abs().amax(1, keepdim=True)
    steps = np.diff(NF4_LEVELS).max() / 2  # half the widest step, 0.152
    spread = (absmax - absmax.mean()).abs().max() * np.diff(dynamic_levels()).max() / 2
    assert (error.view(-1, quant.BLOCK) <= steps * absmax + spread + 1e-7).all()
    # for normal weights NF4's rms error is 0.09 of their deviation, less in small blocks: what has gone wrong is worse
    assert 0.08 < error.square().mean().sqrt() / 0.02 < 0.1


def test_the_code_book_is_the_papers() -> None:
    """Appendix E: quantiles of N(0, 1), evenly spaced in probability, 8 below and 9 above zero, scaled to 1."""
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    levels = torch.cat((above, torch.zeros(1), below)).sort().values
    assert torch.allclose(levels / levels.max(), torch.tensor(NF4_LEVELS), atol=1e-5)


def test_half_precision_is_fp32_rounded_once() -> None:
    weight = golden_weight()
    layout = whole(weight)
    packed = pack(weight, layout, torch.float32)
    exact = dequantise(packed, layout, tables("cpu"), torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantise(packed, layout, tables("cpu"), dtype), exact.to(dtype))


def test_large_matrices_are_packed_in_pieces(monkeypatch) -> None:
    weight = golden_weight()
    at_once = pack(weight, whole(weight), torch.float32)
    monkeypatch.setattr(quant, "AT_ONCE", 1000)  # two rows
    assert torch.equal(pack(weight, whole(weight), torch.float32).view(torch.uint8), at_once.view(torch.uint8))


# --- the linear -------------------------------------------------------------------------------------------------------


def test_the_product_and_its_gradient_are_those_of_the_dequantised_weight() -> None:
    weight = golden_weight()
    layout, table = whole(weight), tables("cpu")
    packed = pack(weight, layout, torch.float32)
    plain = dequantise(packed, layout, table, torch.float32)
    x = torch.randn(2, 5, 384, generator=torch.Generator().manual_seed(0))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = quant.linear(ours, packed, layout, table), F.linear(theirs, plain)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * weights).sum().backward()
    (z * weights).sum().backward()
    assert torch.equal(y, z) and torch.equal(ours.grad, theirs.grad)


def model_of(sizes: dict, precision: str = "fp32", kind: str | None = "nf4", **tuning) -> tuple[Transformer, object]:
    checkpoint, args = bodies.random_checkpoint(sizes, torch.float32)
    flags = TuningArgs(**(tuning or LORA))
    model = build(checkpoint, args, flags)
    trained = set(mark_trainable(model, flags))
    quantise(model, ParallelArgs(precision=precision, quant=kind))
    fill(model, checkpoint, lambda name: torch.float32 if name in trained else None)
    for _, linear in linears(model):  # at zero, no gradient would reach A
        if linear.lora_b is not None:
            torch.nn.init.normal_(linear.lora_b.weight, std=0.1, generator=torch.Generator().manual_seed(3))
    return model, checkpoint


def loss_and_gradients(model: Transformer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    loss, _, _ = model(tokens, labels=tokens)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_lora_trains_as_on_the_dequantised_weights() -> None:
    """To the bit: the same model, whose weights are what the packed ones stand for."""
    model, _ = model_of(SIZES, **LORA, bias_tuning=True)
    plain, _ = model_of(SIZES, kind=None, **LORA, bias_tuning=True)
    with torch.no_grad():
        for name, linear in packed_weights(model).items():
            plain.get_parameter(name).copy_(dequantise(linear.weight, linear.packed, linear.table, torch.float32))
    (loss, gradients), (expected, theirs) = loss_and_gradients(model), loss_and_gradients(plain)
    assert loss == expected and gradients.keys() == theirs.keys() and len(gradients) == 3 * 7
    for name, gradient in theirs.items():
        assert gradient.any() and torch.equal(gradients[name], gradient), name
    exact, _ = model_of(SIZES, kind=None, **LORA, bias_tuning=True)
    assert 1e-4 < abs(loss_and_gradients(exact)[0] / loss - 1) < 0.1  # and not as on the exact ones


def kept_for_backward(model: Transformer, compiled: bool) -> int:
    """Bytes that autograd keeps of a feed-forward layer beside the parameters."""
    layer, known = model.layers[0].feed_forward, {p.untyped_storage().data_ptr() for p in model.parameters()}
    run = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True) if compiled else layer
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = run(torch.ones(1, 16, 256, requires_grad=True))
    y.sum().backward()
    return sum(found.values())


@pytest.mark.parametrize("compiled", [False, True])
def test_no_unpacked_weight_waits_for_backward(compiled: bool) -> None:
    """Compiled, it is one graph, in which the partitioner would rather keep W than make it again."""
    torch._dynamo.reset()
    plain, nf4 = (
        kept_for_backward(model_of(SIZES, kind=None)[0], False),
        kept_for_backward(model_of(SIZES)[0], compiled),
    )
    silu = 16 * 512 * 4  # its result, which autograd would keep and the eager layer does not
    assert nf4 <= plain + silu + 4096, (nf4, plain)  # the look-up tables; one weight alone is 524288


# --- the model --------------------------------------------------------------------------------------------------------


def test_only_frozen_linears_are_packed() -> None:
    model, checkpoint = model_of(TINY, modules_to_save=["output", "layers.0.attention.wo"], lora_rank=4)
    packed = packed_weights(model)
    assert len(packed) == 13 and "layers.0.attention.wo.weight" not in packed
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad <= (name not in packed)
        if name in packed:
            assert parameter.ndim == 1 and parameter.nbytes == packed[name].packed.nbytes
        elif name in checkpoint.source.names():
            assert torch.equal(parameter.detach(), checkpoint.source.read(name)), name


def test_an_adapter_says_that_its_base_was_held_in_nf4() -> None:
    model, _ = model_of(TINY)
    assert saved_terms(model, TuningArgs(**LORA))["quant"] == "nf4"
    plain, _ = model_of(TINY, kind=None)
    assert "quant" not in saved_terms(plain, TuningArgs(**LORA))


def test_nothing_frozen_is_an_error() -> None:
    model = Transformer(ModelArgs.from_dict(TINY))
    mark_trainable(model, TuningArgs())
    with pytest.raises(ValueError, match="--quant nf4 is for frozen weights, and all are trained: add --lora_rank"):
        quantise(model, ParallelArgs(quant="nf4"))


def test_the_flag() -> None:
    assert config.parse(["--quant", "nf4"], ParallelArgs)[0].quant == "nf4"
    assert config.parse(["--quant", "none"], ParallelArgs)[0].quant is None
    with pytest.raises(ValueError, match="--quant int8: choose one of nf4"):
        config.parse(["--quant", "int8"], ParallelArgs)


def test_a_7b_takes_four_gigabytes() -> None:
    """Bytes of every frozen tensor of LLaMA-2-7B, embedding and head in bf16: 4.508 bits a weight of the linears."""
    model, _ = shaped("llama2_7b", TuningArgs(lora_rank=8))
    quantise(model, ParallelArgs(precision="bf16", quant="nf4"))
    packed = packed_weights(model)
    linear_bytes = sum(model.get_parameter(n).nbytes for n in packed)
    weights = sum(m.packed.rows * m.packed.columns for m in packed.values())
    others = sum(2 * p.numel() for n, p in model.named_parameters() if not p.requires_grad and n not in packed)
    assert weights == 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert linear_bytes * 8 / weights == pytest.approx(4 + 8 / 16 + 32 / (16 * 256), abs=1e-5)
    assert linear_bytes + others == pytest.approx(4.1739e9, rel=1e-3) and linear_bytes + others <= 4.2e9


def test_what_is_allocated_is_what_was_counted() -> None:
    checkpoint, args = bodies.random_checkpoint(SIZES, torch.bfloat16)
    model = build(checkpoint, args, TuningArgs(**LORA))
    mark_trainable(model, TuningArgs(**LORA))
    quantise(model, ParallelArgs(precision="bf16", quant="nf4"))
    counted = {n: p.nbytes for n, p in model.named_parameters() if not p.requires_grad}
    fill(model, checkpoint, lambda name: None if name in counted else torch.float32)
    held = {n: p.untyped_storage().nbytes() for n, p in model.named_parameters() if n in packed_weights(model)}
    assert held == {n: counted[n] for n in held} and len(held) == 7
    mapped = [m for m in model.modules() if hasattr(m, "packed") and m.packed is not None]
    assert len({id(m.table) for m in mapped}) == 1  # one table for all


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_plan_counts_packed_bytes(precision: str, monkeypatch) -> None:
    monkeypatch.setattr(groups, "dp_size", lambda: 2)  # with one rank nothing is gathered
    figures = {}
    for kind in (None, "nf4"):
        checkpoint, args = bodies.random_checkpoint(SIZES, torch.bfloat16)
        model, flags = build(checkpoint, args, TuningArgs(**LORA)), TuningArgs(**LORA)
        mark_trainable(model, flags)
        parallel = ParallelArgs(precision=precision, quant=kind)
        quantise(model, parallel)
        arguments = loop.LoopArgs(max_steps=1), optim.OptimArgs()
        figures[kind] = plan.plan(model, checkpoint, parallel, *arguments, DATA, 1)
        packed = sum(m.packed.nbytes for m in packed_weights(model).values())
    plain, nf4 = figures[None], figures["nf4"]
    linear_weights = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256
    assert plain["parameters"] == nf4["parameters"] and plain["trained"] == nf4["trained"]
    saved = plain["gigabytes"]["weights"] - nf4["gigabytes"]["weights"]
    assert saved * 1e9 == pytest.approx((2 * linear_weights - packed) / 2, abs=1)  # over two ranks
    assert nf4["gigabytes"]["unpacked"] * 1e9 == pytest.approx(6 * 512 * 256)
    assert nf4["gigabytes"]["gathered"] < plain["gigabytes"]["gathered"] / 2


@pytest.mark.parametrize("precision, weight", [("bf16", 8 * 512), ("fp32", 512 * 256)], ids=["bf16", "fp32"])
def test_one_rank_plans_the_largest_weight_that_is_cast(precision: str, weight: int) -> None:
    """The base is bf16, so in fp32 its linears are cast, in bf16 the fp32 adapters."""
    checkpoint, args = bodies.random_checkpoint(SIZES, torch.bfloat16)
    model, flags = build(checkpoint, args, TuningArgs(**LORA)), TuningArgs(**LORA)
    mark_trainable(model, flags)
    arguments = ParallelArgs(precision=precision), loop.LoopArgs(max_steps=1), optim.OptimArgs()
    figures = plan.plan(model, checkpoint, *arguments, DATA, 1)
    size = {"bf16": 2, "fp32": 4}[precision]
    assert figures["gigabytes"]["gathered"] * 1e9 == pytest.approx(size * weight)


# --- training ---------------------------------------------------------------------------------------------------------


def test_it_learns_alike_in_every_memory_mode(tmp_path, monkeypatch) -> None:
    counter, real = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: real(f, backend=counter))
    torch._dynamo.reset()
    bodies.nf4_learns_alike(tmp_path, "cpu", TINY, DATA, bound=1e-5, steps=6, precision="fp32", lr=2e-2)
    assert 4 <= counter.frame_count <= 24, counter.frame_count


def test_it_learns_what_exact_weights_learn(tmp_path) -> None:
    variants = {"exact": {}, "nf4": {"quant": "nf4"}}
    sizes, common = TINY | {"dim": 128, "n_heads": 4, "hidden_dim": 192}, {"precision": "bf16", "lr": 3e-3}
    runs = bodies.variants_learn_alike(
        tmp_path, "cpu", sizes, DATA, variants, {"nf4": 0.1}, steps=12, tuning=LORA, batch_size=8, **common
    )
    assert (runs["nf4"].losses != runs["exact"].losses).all()


def test_the_bytes_do_not_depend_on_the_device() -> None:
    bodies.nf4_bytes_are_the_cpus("cpu")
