"""LoRA and what trains: counts at the published sizes (on the meta device), the formula, dropout, and the rules of names."""

import contextlib
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from accessory import config
from accessory.data.sft import Example
from accessory.flags import ParallelArgs
from accessory.model import ModelArgs, Transformer, quant, shard_dim
from accessory.model.args import allowed_model_parallel_sizes, check_model_parallel
from accessory.model.llama import global_shape, set_parameter
from accessory.model.lora import (
    LINEARS,
    ColumnLinear,
    TuningArgs,
    add_tuning,
    folded,
    initial_value,
    linears,
    mark_trainable,
    partial_grad,
    saved_names,
    saved_terms,
)
from accessory.model.lora_function import lora_linear
from accessory.parallel import groups
from accessory.train import loop, optim, plan
from tests.unit.test_llama import assert_near, carry, peer, tokens_of

CONFIGS = Path(__file__).parents[2] / "model_configs"
ALL = list(LINEARS)
SIZES = {  # model: parameters, and trained with r=8 on all seven linears: 8 * layers * sum of (in + out)
    "llama2_7b": (6_738_415_616, 8 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))),
    "llama2_13b": (13_015_864_320, 8 * 40 * (4 * (5120 + 5120) + 3 * (5120 + 13824))),
    "llama2_70b": (68_976_648_192, 8 * 80 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672))),
    "llama3_8b": (8_030_261_248, 8 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))),
}


def shaped(name: str, tuning: TuningArgs) -> tuple[Transformer, list[str]]:
    """A model of a published size, all on meta, with its tuning. -> (model, trained names)"""
    params = ModelArgs.from_files([CONFIGS / f"{name}.json"]).to_dict()
    with torch.device("meta"):
        model = Transformer(ModelArgs.from_dict(params | ({"vocab_size": 32000} if params["vocab_size"] == -1 else {})))
    add_tuning(model, tuning)
    names = mark_trainable(model, tuning)
    assert all(p.is_meta for p in model.parameters())
    return model, names


def trained_of(model: Transformer) -> list:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("name", SIZES)
def test_counts_at_the_published_sizes(name: str) -> None:
    model, names = shaped(name, TuningArgs(lora_rank=8))
    total, trained = SIZES[name]
    assert sum(p.numel() for _, p in trained_of(model)) == trained
    assert plan.whole_counts(model, trained_of(model)) == (total + trained, trained)
    assert len(names) == 2 * 7 * len(model.layers) and all(".lora_" in n for n in names)


def test_7b_trains_19_988_480_by_peft_too_and_says_so() -> None:
    assert SIZES["llama2_7b"][1] == 19_988_480
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(num_hidden_layers=2)
        )  # the defaults are 7B's; two layers count the rest
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=8, target_modules="all-linear"))
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) * 32 // 2 == 19_988_480

    tuning = TuningArgs(lora_rank=8)
    model, _ = shaped("llama2_7b", tuning)
    source = SimpleNamespace(
        names=lambda: [n for n, _ in model.named_parameters() if ".lora_" not in n], dtype=lambda name: torch.bfloat16
    )
    examples = [Example(np.zeros(n, np.int32), 1) for n in (10, 30, 20)]
    data = type("Data", (list,), {"report": SimpleNamespace(tokens=60, supervised_tokens=57)})(examples)
    figures = plan.plan(
        model,
        SimpleNamespace(source=source, kind="tensors"),
        ParallelArgs(),
        loop.LoopArgs(batch_size=2),
        optim.OptimArgs(),
        data,
        10,
    )
    text = "\n".join(plan.lines(figures))
    assert "19,988,480 (0.30%)" in text and figures["largest_micro_batch"] == 50
    frozen, trained = 6_738_415_616, 19_988_480
    assert figures["gigabytes"]["weights"] == pytest.approx((2 * frozen + 4 * trained) / 1e9)
    assert figures["gigabytes"]["optimizer"] == pytest.approx(8 * trained / 1e9)


@pytest.mark.parametrize(
    "tuning, trained, share",  # as Chinese-LLaMA's paper and arithmetic have them, for 7B with 49,953 tokens
    [
        (TuningArgs(trainable=["tok_embeddings"]), 204_607_488, "2.97%"),
        (TuningArgs(lora_rank=8, modules_to_save=["tok_embeddings", "output"]), 19_988_480 + 2 * 204_607_488, "6.22%"),
    ],
)
def test_shares_of_a_7b_with_a_chinese_vocabulary(tuning: TuningArgs, trained: int, share: str) -> None:
    args = replace(ModelArgs.from_files([CONFIGS / "llama2_7b.json"]), vocab_size=49_953)
    with torch.device("meta"):
        model = Transformer(args)
    add_tuning(model, tuning)
    mark_trainable(model, tuning)
    total, counted = plan.whole_counts(model, trained_of(model))
    assert counted == trained and f"{counted / total:.2%}" == share


@contextlib.contextmanager
def rank_of(world: int, rank: int, mp: int):
    """This process as one rank of a world that is not there: torch's fake process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    groups.destroy()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        groups.init(mp, on="cpu")
        yield
    finally:
        groups.forget_model_parallel()
        dist.destroy_process_group()


@pytest.mark.parametrize("mp, rank", [(8, 0), (8, 7), (16, 5), (2, 1)])
def test_one_ranks_slice_of_70b(mp: int, rank: int) -> None:
    total, trained = SIZES["llama2_70b"]
    with rank_of(16, rank, mp):
        model, _ = shaped("llama2_70b", TuningArgs(lora_rank=8))
        norms, d, r, kv = (2 * 80 + 1) * 8192, 8192, 8, max(1024 // mp, 128)
        linears = (2 * d * d + 3 * d * 28672) // mp + 2 * d * kv
        assert (
            sum(p.numel() for p in model.parameters() if not p.requires_grad)
            == norms + 2 * 32000 // mp * d + 80 * linears
        )
        column_a, column_b = 5 * r * d, r * (d // mp + 2 * kv + 2 * 28672 // mp)
        row_a, row_b = r * (d + 28672) // mp, 2 * r * d
        assert sum(p.numel() for _, p in trained_of(model)) == 80 * (column_a + column_b + row_a + row_b)
        assert plan.whole_counts(model, trained_of(model)) == (total + trained, trained)  # whatever the cut


def test_sizes_at_which_70b_can_be_cut() -> None:
    args = ModelArgs.from_files([CONFIGS / "llama2_70b.json"])
    assert allowed_model_parallel_sizes(args) == [1, 2, 4, 8, 16, 32, 64]
    for size, message in {3: "n_heads is 64", 128: "n_heads is 64"}.items():
        with pytest.raises(
            ValueError, match=rf"--model_parallel_size {size} but {message}: use 1, 2, 4, 8, 16, 32 or 64"
        ):
            check_model_parallel(args, size)
    odd = ModelArgs(dim=48, n_heads=24, n_kv_heads=6, hidden_dim=72)
    assert allowed_model_parallel_sizes(odd) == [1, 2, 3, 6, 12, 24]
    with pytest.raises(ValueError, match="--model_parallel_size 4 but n_kv_heads is 6"):
        check_model_parallel(odd, 4)


# --- the formula ------------------------------------------------------------------------------------------------------


def tuned(tuning: TuningArgs, trained: bool = False, **keys) -> tuple[Transformer, Transformer]:
    """(a model with its tuning, its base). `trained`: with B and the biases away from zero."""
    base = carry(peer(n_kv_heads=2, **keys), **{k: v for k, v in keys.items() if k.endswith("_bias")})
    model = Transformer(base.args)
    add_tuning(model, tuning)
    state, generator = base.state_dict(), torch.Generator().manual_seed(7)
    for name in [n for n, _ in model.named_parameters()]:
        if name in state:
            set_parameter(model, name, state[name].clone())
        else:
            value = initial_value(model, name, seed=0)
            set_parameter(model, name, torch.randn(value.shape, generator=generator) * 0.2 if trained else value)
    return model.eval(), base


@pytest.mark.parametrize("targets", [ALL, ["wq", "wv"], ["w2"], ["wo", "w1"]], ids="-".join)
@torch.no_grad()
def test_step_0_is_the_base(targets: list[str]) -> None:
    model, base = tuned(TuningArgs(lora_rank=4, lora_alpha=32.0, lora_targets=targets, bias_tuning=True))
    assert torch.equal(model(tokens_of(2, 12)), base(tokens_of(2, 12)))
    added = {n for n, _ in model.named_parameters()} - set(base.state_dict())
    assert {n.split(".")[-3] for n in added if ".lora_" in n} == set(targets)
    assert sum(n.endswith(".bias") for n in added) == 7 * 2


@pytest.mark.parametrize("rank, alpha, scale", [(4, None, 1.0), (4, 16.0, 4.0), (2, 1.0, 0.5), (1, 8.0, 8.0)])
@torch.no_grad()
def test_it_adds_alpha_over_rank_times_b_a(rank: int, alpha: float | None, scale: float) -> None:
    tuning = TuningArgs(lora_rank=rank, lora_alpha=alpha)
    model, base = tuned(tuning, trained=True)
    assert tuning.scale_of("layers.1.attention.wq") == scale
    tokens, state = tokens_of(2, 12), model.state_dict()
    untouched = base(tokens)
    for name, weight in base.named_parameters():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_b.weight" in state:
            weight += scale * state[f"{stem}.lora_b.weight"] @ state[f"{stem}.lora_a.weight"]
    assert_near(model(tokens), base(tokens))
    assert (base(tokens) - untouched).abs().max() > 0.1


def test_dropout_works_on_the_adapters_input_in_training_only() -> None:
    groups.ensure()
    linear = ColumnLinear(6, 5)
    linear.add_lora(2, scale=3.0, dropout=0.4)
    linear = linear.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for p in linear.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    x = torch.randn(4, 6, generator=generator)
    w, a, b = linear.weight, linear.lora_a.weight, linear.lora_b.weight
    for training in (True, False):
        linear.train(training)
        torch.manual_seed(5)
        y = linear(x)
        torch.manual_seed(5)
        dropped = F.dropout(x, 0.4, training)
        torch.testing.assert_close(y, x @ w.t() + 3.0 * dropped @ a.t() @ b.t())
    model, _ = tuned(TuningArgs(lora_rank=4, lora_dropout=0.5), trained=True)
    tokens = tokens_of(1, 9)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_a_starts_as_pefts_and_depends_on_seed_and_name_alone() -> None:
    model, _ = tuned(TuningArgs(lora_rank=16))
    names = [n for n, _ in model.named_parameters() if ".lora_" in n]
    values = {n: initial_value(model, n, seed=3) for n in names}
    for name, value in values.items():
        if ".lora_b." in name:
            assert not value.any()
            continue
        bound = value.shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5)) over the inputs
        assert value.abs().max() <= bound and value.std() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert torch.equal(value, initial_value(model, name, seed=3)) and not torch.equal(
            value, initial_value(model, name, seed=4)
        )
    same_shape = [v for n, v in values.items() if n.endswith(("wq.lora_a.weight", "wk.lora_a.weight"))]
    assert len(same_shape) == 4 and not any(torch.equal(a, b) for i, a in enumerate(same_shape) for b in same_shape[:i])


# --- as one function --------------------------------------------------------------------------------------------------


def step_by_step(x, weight, bias, a, b, scale, dropout=0.0, packed=None):
    """What lora_linear replaces, each operation autograd's own."""
    if packed is not None:
        weight = quant.dequantise(weight, *packed, x.dtype)
    return F.linear(x, weight, bias) + F.linear(F.linear(F.dropout(x, dropout), a), b) * scale


def adapted_tensors(dtype: torch.dtype, trains: str = "xab", packed: bool = False) -> tuple[dict, tuple | None]:
    """({argument of lora_linear: tensor}, its `packed`); those whose letters are in `trains` want a gradient."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (2, 33, 96), "weight": (160, 96), "bias": (160,), "a": (8, 96), "b": (160, 8)}
    values = {n: (torch.randn(s, generator=generator) * 0.2).to(dtype) for n, s in shapes.items()}
    where = None
    if packed:
        groups.ensure()
        layout = quant.Layout(160, 96, 0, 0, 160, 96)
        where = layout, quant.tables(torch.device("cpu"))
        values["weight"] = quant.pack(values["weight"], layout, dtype)
    return {
        n: t.requires_grad_(n[0] in trains and n != "bias" or n == "bias" and "c" in trains) for n, t in values.items()
    }, where


def outputs_and_gradients(function, tensors: dict, **options) -> dict[str, torch.Tensor]:
    leaves = {n: t if t is None else t.detach().clone().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    torch.manual_seed(3)
    y = function(*leaves.values(), 1.5, **options)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    return {"y": y.detach()} | {n: t.grad for n, t in leaves.items() if t is not None and t.grad is not None}


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("trains", ["xab", "ab", "xb", "xa", "xabwc", "w"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_one_function_gives_what_its_steps_give(dtype, bound, trains: str, dropout: float, bias: bool) -> None:
    """Output and every gradient; with dropout the very same mask."""
    tensors, _ = adapted_tensors(dtype, trains)
    tensors |= {} if bias else {"bias": None}
    expected = outputs_and_gradients(step_by_step, tensors, dropout=dropout)
    found = outputs_and_gradients(lora_linear, tensors, dropout=dropout)
    assert found.keys() == expected.keys() and len(found) == 1 + len(trains) - ("c" in trains and not bias)
    for name, value in expected.items():
        error = (found[name].double() - value.double()).abs().max() / value.double().abs().max()
        assert found[name].dtype == dtype and found[name].shape == value.shape and error <= bound, (name, error)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_function_over_packed_weights(dtype, bound, dropout: float) -> None:
    tensors, packed = adapted_tensors(dtype, packed=True)
    expected = outputs_and_gradients(step_by_step, tensors, dropout=dropout, packed=packed)
    found = outputs_and_gradients(lora_linear, tensors, dropout=dropout, packed=packed)
    assert found.keys() == expected.keys() == {"y", "x", "a", "b"}
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= bound * value.abs().max(), name


def kept(function, dropout: float) -> int:
    """Bytes that autograd keeps of three linears over one x, beside x and the weights themselves."""
    tensors, _ = adapted_tensors(torch.float32)
    known = {t.untyped_storage().data_ptr() for t in tensors.values()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ys = [function(*tensors.values(), 1.5, dropout=dropout) for _ in range(3)]
    assert len(ys) == 3
    return sum(found.values())


def test_what_it_keeps_for_backward() -> None:
    """x once for all; of dropout a byte an element, where the steps keep the dropped x and its factors, four bytes each."""
    tokens, low, size = 66, 3 * 66 * 8 * 4, 96
    assert kept(lora_linear, 0.0) == low
    assert kept(lora_linear, 0.3) == low + 3 * tokens * size
    assert kept(step_by_step, 0.3) >= low + 3 * tokens * size * 8


def test_nothing_is_kept_that_nobody_wants() -> None:
    tensors, _ = adapted_tensors(torch.float32)
    with torch.no_grad():
        assert lora_linear(*tensors.values(), 1.5).grad_fn is None


def test_under_autocast_the_steps_are_taken() -> None:
    """Autocast does not reach a function's backward."""
    model, _ = tuned(TuningArgs(lora_rank=4), trained=True)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens_of(1, 9)).float().square().mean().backward()
    gradients = [p.grad for n, p in model.named_parameters() if ".lora_" in n]
    assert len(gradients) == 28 and all(g.isfinite().all() and g.any() for g in gradients)


# --- a rank and a scale for each linear -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, ranks, scales",
    [
        ({}, {"layers.0.attention.wq": 4, "layers.11.feed_forward.w2.lora_b.weight": 4}, {"layers.0.attention.wq": 1.0}),
        ({"lora_targets": ["wv"]}, {"layers.0.attention.wv.weight": 4, "layers.0.attention.wq": 0}, {"layers.0.attention.wq": 0.0}),
        (
            {"lora_alpha": 8.0, "use_rslora": True, "rank_pattern": {"w2": 16}},
            {"layers.3.feed_forward.w2": 16, "layers.3.feed_forward.w1": 4},
            {"layers.3.feed_forward.w2": 2.0, "layers.3.feed_forward.w1": 4.0},
        ),
        (  # the longest pattern that matches, in whatever order they stand
            {"rank_pattern": {"layers.1": 2, "wq": 3, "layers.1.attention.wq": 0, "layers.*.feed_forward.*": 5}},
            {"layers.1.attention.wk": 2, "layers.2.attention.wq": 3, "layers.1.attention.wq": 0, "layers.1.feed_forward.w1": 5,
             "layers.11.attention.wk": 4},
            {"layers.1.attention.wq": 0.0, "layers.1.attention.wk": 2.0},
        ),
        ({"alpha_pattern": {"wk": 6.0}, "lora_alpha": 2.0}, {"layers.1.attention.wk": 4}, {"layers.1.attention.wk": 1.5, "layers.1.attention.wv": 0.5}),
        ({"lora_rank": 0, "rank_pattern": {"wq": 3}}, {"layers.1.attention.wq": 0}, {"layers.1.attention.wq": 0.0}),
    ],
)  # fmt: skip
def test_rank_and_scale_of_each_linear(flags: dict, ranks: dict, scales: dict) -> None:
    tuning = TuningArgs(**{"lora_rank": 4} | flags)
    assert {n: tuning.rank_of(n) for n in ranks} == ranks
    assert {n: tuning.scale_of(n) for n in scales} == scales
    backwards = {k: dict(reversed(list(flags.get(k, {}).items()))) for k in ("rank_pattern", "alpha_pattern")}
    assert {n: TuningArgs(**{"lora_rank": 4} | flags | backwards).rank_of(n) for n in ranks} == ranks


@torch.no_grad()
def test_a_model_of_several_ranks_and_scales() -> None:
    tuning = TuningArgs(
        lora_rank=4, lora_alpha=6.0, use_rslora=True, rank_pattern={"wk": 2, "layers.0.feed_forward": 0}
    )
    model, base = tuned(tuning, trained=True)
    tokens, state = tokens_of(2, 12), model.state_dict()
    assert model.layers[0].attention.wk.lora_a.weight.shape[0] == 2 and model.layers[0].feed_forward.w1.lora_a is None
    for name, weight in base.named_parameters():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_b.weight" in state:
            weight += (
                (6.0 / (2 if stem.endswith("wk") else 4) ** 0.5)
                * state[f"{stem}.lora_b.weight"]
                @ state[f"{stem}.lora_a.weight"]
            )
    assert_near(model(tokens), base(tokens))


def test_folded_patterns_say_the_same() -> None:
    names = [f"layers.{i}.attention.{w}" for i in range(12) for w in ("wq", "wk")]
    generator = torch.Generator().manual_seed(0)
    values = {n: int(v) for n, v in zip(names, torch.randint(0, 3, (24,), generator=generator))}
    assert folded(dict.fromkeys(names, 4), 4) == {} and folded({n: 2 if "wk" in n else 4 for n in names}, 4) == {
        "wk": 2
    }
    for wanted in (values, dict.fromkeys(names, 0), {n: int("layers.1." in n) for n in names}):
        tuning = TuningArgs(lora_rank=2, rank_pattern=folded(wanted, 2))
        assert {n: tuning.rank_of(n) for n in names} == wanted


def test_patterns_as_flags() -> None:
    argv = "--lora_rank 4 --rank_pattern w2=16,layers.*.attention.wq=0 --alpha_pattern wk=1.5 --use_rslora".split()
    [tuning] = config.parse(argv, TuningArgs)
    assert tuning.rank_pattern == {"w2": 16, "layers.*.attention.wq": 0} and tuning.alpha_pattern == {"wk": 1.5}
    assert tuning.use_rslora and config.parse([], TuningArgs)[0].rank_pattern == {}
    for words, message in (
        ("wk", "--rank_pattern wk: expected name=value pairs"),
        ("wk=x", "--rank_pattern x: not a whole number"),
        ("wk=-1", "--rank_pattern wk=-1: expected a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            config.parse(["--rank_pattern", words], TuningArgs)


def test_what_is_saved_of_a_choice() -> None:
    """Under --trainable the terms say what the file holds, and no LoRA is saved by halves."""
    plain = {"lora_rank": 4, "lora_alpha": 8.0, "norm_tuning": True, "bias_tuning": True, "modules_to_save": ["output"]}
    for chosen in ([], ["!layers.0"], ["layers.1.attention.wq.lora_b", "norm"], ["tok_embeddings"]):
        tuning = TuningArgs(**plain, trainable=chosen)
        model, _ = tuned(tuning)
        trained = mark_trainable(model, tuning)
        names, terms = saved_names(model, tuning), TuningArgs.from_terms(saved_terms(model, tuning))
        assert set(trained) <= set(names) and terms.alpha == 8.0
        have = {n.rsplit(".lora_", 1)[0] for n in names if ".lora_" in n}
        assert {n for n, _ in linears(model) if terms.rank_of(n)} == have
        assert sum(".lora_" in n for n in names) == 2 * len(have)
        assert sum(n.endswith(".bias") for n in names) == 14
        if chosen:
            full = [n for n in trained if ".lora_" not in n and not n.endswith(".bias")]
            assert terms.modules_to_save == full and not terms.norm_tuning


# --- how weights are cut ----------------------------------------------------------------------------------------------


def test_cuts_and_addends_by_name() -> None:
    table = {  # cut on dim; gradient is an addend
        "tok_embeddings.weight": (0, False),
        "output.weight": (0, False),
        "norm.weight": (None, False),
        "layers.3.ffn_norm.weight": (None, False),
        "layers.3.attention.wq.weight": (0, False),
        "layers.3.attention.wv.bias": (0, False),
        "layers.3.attention.wo.weight": (1, False),
        "layers.3.attention.wo.bias": (None, False),
        "layers.3.attention.wk.lora_a.weight": (None, True),
        "layers.3.attention.wk.lora_b.weight": (0, False),
        "layers.3.feed_forward.w2.lora_a.weight": (1, False),
        "layers.3.feed_forward.w2.lora_b.weight": (None, True),
    }
    assert {n: (shard_dim(n), partial_grad(n)) for n in table} == table
    for name in ("layers.0.attention.wz.weight", "head", "rope.freqs"):
        with pytest.raises(ValueError, match=f"{name}: not a parameter of a LLaMA"):
            shard_dim(name)
    model, _ = tuned(TuningArgs(lora_rank=4, bias_tuning=True))
    for name, p in model.named_parameters():
        assert global_shape(model.args, name, lora_rank=4) == p.shape


# --- what trains ------------------------------------------------------------------------------------------------------


def names_of(tuning: TuningArgs, **keys) -> tuple[list[str], list[str]]:
    """(trained, all) parameter names of a model with 12 layers, on meta."""
    params = {
        "dim": 8,
        "n_layers": 12,
        "n_heads": 2,
        "vocab_size": 10,
        "hidden_dim": 8,
        "tie_word_embeddings": False,
    } | keys
    model = Transformer(ModelArgs.from_dict(params))
    add_tuning(model, tuning)
    names = mark_trainable(model, tuning)
    assert names == [n for n, p in model.named_parameters() if p.requires_grad]
    return names, [n for n, _ in model.named_parameters()]


def kinds_of(tuning: TuningArgs, **keys) -> set[str]:
    return {re.sub(r"\.\d+\.", ".*.", name) for name in names_of(tuning, **keys)[0]}


def test_without_flags_everything_trains() -> None:
    trained, everything = names_of(TuningArgs())
    assert trained == everything and not TuningArgs().partly


def test_tuning_flags() -> None:
    lora = {f"layers.*.attention.{w}.lora_{x}.weight" for w in ("wq", "wv") for x in "ab"}
    some = {"lora_rank": 2, "lora_targets": ["wq", "wv"]}
    norms = {"layers.*.attention_norm.weight", "layers.*.ffn_norm.weight", "norm.weight"}
    biases = {f"layers.*.attention.{w}.bias" for w in ALL[:3] + ["wo"]} | {
        f"layers.*.feed_forward.{w}.bias" for w in ("w1", "w2", "w3")
    }
    assert kinds_of(TuningArgs(**some)) == lora
    assert kinds_of(TuningArgs(**some, norm_tuning=True)) == lora | norms
    assert kinds_of(TuningArgs(norm_tuning=True)) == norms
    assert kinds_of(TuningArgs(bias_tuning=True)) == biases
    assert kinds_of(TuningArgs(**some), attention_bias=True) == lora  # the model's own biases stay frozen
    assert kinds_of(TuningArgs(bias_tuning=True), attention_bias=True, mlp_bias=True) == biases
    assert kinds_of(TuningArgs(**some, modules_to_save=["output"])) == lora | {"output.weight"}
    assert kinds_of(TuningArgs(modules_to_save=["tok_embeddings", "norm"])) == {"tok_embeddings.weight", "norm.weight"}
    assert all(
        TuningArgs(**t).partly
        for t in (
            some,
            {"norm_tuning": True},
            {"bias_tuning": True},
            {"modules_to_save": ["norm"]},
            {"trainable": ["!norm"]},
        )
    )


def test_a_tied_output_is_the_embedding() -> None:
    tied = kinds_of(TuningArgs(lora_rank=2, lora_targets=["wq"], modules_to_save=["output"]), tie_word_embeddings=True)
    assert tied == {
        "tok_embeddings.weight",
        "layers.*.attention.wq.lora_a.weight",
        "layers.*.attention.wq.lora_b.weight",
    }
    for head in ("output", "output.weight"):
        assert kinds_of(TuningArgs(trainable=[head]), tie_word_embeddings=True) == {"tok_embeddings.weight"}
        assert "tok_embeddings.weight" not in kinds_of(TuningArgs(trainable=[f"!{head}"]), tie_word_embeddings=True)
    model, _ = tuned(TuningArgs(lora_rank=2, modules_to_save=["output"]), tie_word_embeddings=True)
    mark_trainable(model, TuningArgs(lora_rank=2, modules_to_save=["output"]))
    tokens = tokens_of(1, 9)
    loss, _, _ = model(tokens, labels=tokens)
    loss.backward()
    assert (
        model.head is model.tok_embeddings.weight and model.head.grad.any(dim=1).all()
    )  # as the head, every row learns
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_patterns() -> None:
    def trained(*patterns: str, **flags) -> list[str]:
        return names_of(TuningArgs(trainable=list(patterns), **flags))[0]

    everything = names_of(TuningArgs())[1]
    assert trained("layers.1") == [n for n in everything if n.startswith("layers.1.")]  # not layers.10, layers.11
    assert (
        trained("attention.wq")
        == trained("wq")
        == trained("layers.*.attention.wq.weight")
        == [n for n in everything if ".wq." in n]
    )
    assert trained("norm") == ["norm.weight"]
    assert trained("*norm.weight") == [n for n in everything if "norm" in n]
    assert trained("layers.1?.*") == [n for n in everything if n.startswith(("layers.10.", "layers.11."))]
    assert trained("!layers.0") == [n for n in everything if not n.startswith("layers.0.")]
    assert trained("!tok_embeddings", "!output") == [n for n in everything if n.startswith(("layers", "norm"))]
    assert trained("layers.0", "output", "!layers.0.attention") == [
        n for n in everything if n.startswith(("layers.0.f", "layers.0.attention_norm", "output"))
    ]
    lora = trained("!layers.0", lora_rank=2)
    assert len(lora) == 2 * 7 * 11 and not any(n.startswith("layers.0.") for n in lora)
    assert trained("norm", lora_rank=2) == ["norm.weight"]  # exactly the names given


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"trainable": ["layers.12"]}, r"--trainable layers\.12: no parameter matches"),
        ({"trainable": ["atention"]}, r"--trainable atention: no parameter matches; did you mean attention\?"),
        ({"trainable": ["!ouptut"]}, r"--trainable ouptut: no parameter matches; did you mean output\?"),
        ({"modules_to_save": ["lm_head"], "lora_rank": 2}, "--modules_to_save lm_head: no parameter matches"),
        ({"trainable": ["wq", "!attention"]}, "--trainable wq,!attention: nothing is left to train"),
        ({"trainable": ["!*"]}, "nothing is left to train"),
    ],
)
def test_names_that_match_nothing_are_errors(flags: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        names_of(TuningArgs(**flags))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"lora_rank": -1}, "--lora_rank -1"),
        ({"lora_dropout": 1.0}, "--lora_dropout 1.0"),
        (
            {"lora_rank": 4, "lora_targets": []},
            "--lora_targets is empty with --lora_rank 4: name some of wq, wk, wv, w1, w3, wo, w2",
        ),
    ],
)
def test_terms_that_cannot_be_are_errors(flags: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TuningArgs(**flags)
