"""--checkpointing none, selective, full, auto: the same gradients to the bit, the memory that the plan says, and what auto
chooses. Memory is measured: the bytes of all storages that a forward made and that still live when backward begins."""

import functools
import gc
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._functorch import config as functorch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accessory import config
from accessory.flags import ParallelArgs
from accessory.model import Transformer, blocks
from accessory.model.llama import local_slice, set_parameter
from accessory.model.lora import TuningArgs, add_tuning, mark_trainable
from accessory.model.pretrained import build, fill, quantise
from accessory.model.recompute import Remade
from accessory.parallel import products
from accessory.train import loop, optim, plan
from accessory.weights import TensorSource
from tests.helpers import random_weights, tiny_args

MODES = ("none", "selective", "full")
TOKENS = 256


class Living(TorchDispatchMode):
    """Notes every storage made while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[StorageWeakRef, int, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.seen.append((StorageWeakRef(storage), storage.data_ptr(), storage.nbytes()))
        return result

    def bytes(self, model: torch.nn.Module) -> int:
        """Of those still alive, once each, without the model's own. The thread that communicates lets go of its tensors
        shortly after the ranks have gone on."""
        if dist.is_initialized():
            time.sleep(0.2)
        gc.collect()
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum({at: size for ref, at, size in self.seen if not ref.expired() and at not in own}.values())


def tiny(lora_rank: int = 0, dropout: float = 0.0, **keys: Any) -> Transformer:
    """A model of this rank's slices, random, with adapters that are not zero."""
    model = Transformer(tiny_args(**keys))
    tuning = TuningArgs(lora_rank=lora_rank, lora_dropout=dropout)
    add_tuning(model, tuning)
    weights = random_weights(model.args)

    def drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        made = torch.Generator().manual_seed(sum(map(ord, name)))
        return weights[name] if name in weights else torch.randn(shape, generator=made) * 0.1

    for name in [n for n, _ in model.named_parameters()]:
        set_parameter(model, name, local_slice(model, name, functools.partial(drawn, name)))
    mark_trainable(model, tuning)
    return model


def set_mode(model: Transformer, mode: str) -> None:
    for layer in model.layers:
        layer.checkpointing = mode


def kept_per_layer(
    mode: str, sequence_parallel: bool = False, dtype: torch.dtype = torch.float32, wide: int = 4, **keys: Any
) -> tuple[float, float]:
    """Bytes a layer keeps for backward: (measured, planned), as the difference between three layers and one."""
    measured, planned = [], []
    for layers in (1, 3):
        model = tiny(n_layers=layers, n_heads=4, dim=64, hidden_dim=192, **keys)
        model.sequence_parallel, model.tok_embeddings.compute_dtype = sequence_parallel, dtype
        set_mode(model, mode)
        tokens = torch.arange(TOKENS).remainder(101).view(1, -1)
        with Living() as living:
            loss, _, _ = model(tokens, labels=tokens)
        measured.append(living.bytes(model))
        planned.append(plan.activations(model, TOKENS, dtype.itemsize, mode, sequence_parallel, wide))
        loss.backward()
    return (measured[1] - measured[0]) / 2, (planned[1] - planned[0]) / 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_layer_keeps_what_the_plan_says(lora_rank: int, mode: str) -> None:
    measured, planned = kept_per_layer(mode, n_kv_heads=4, lora_rank=lora_rank)
    assert measured == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("instructions", [True, False])
def test_and_in_bf16_with_and_without_instructions_for_it(mode: str, instructions: bool, monkeypatch) -> None:
    monkeypatch.setitem(products.CPU_MULTIPLIES, torch.bfloat16, instructions)
    measured, planned = kept_per_layer(mode, dtype=torch.bfloat16, wide=2 if instructions else 4, n_kv_heads=4)
    assert measured == pytest.approx(planned, rel=0.07)


def test_the_ways_are_far_apart() -> None:
    sizes = [kept_per_layer(mode, n_kv_heads=4)[0] for mode in MODES]
    # what torch's own would keep beside: its norms on CPU their results before the weight, autograd silu's
    beside = (2 * 64 + 192) * TOKENS * 4
    assert sizes[1] < 0.56 * (sizes[0] + beside) and sizes[2] < 0.1 * sizes[1]


# --- nothing else changes ---------------------------------------------------------------------------------------------


def first_gradients(model: Transformer, mode: str, cut: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    set_mode(model, mode)
    model.zero_grad()
    torch.manual_seed(4)  # of dropout
    tokens = torch.randint(101, (1, 60) if cut else (3, 20), generator=torch.Generator().manual_seed(1))
    loss, _, _ = model(tokens, labels=tokens, cu_seqlens=torch.tensor([0, 7, 38, 60]) if cut else None)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("cut", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("keys", [{}, {"lora_rank": 4}, {"lora_rank": 4, "dropout": 0.3}, {"qk_norm": True}], ids=str)
def test_gradients_are_the_same_to_the_bit(keys: dict, cut: bool) -> None:
    model = tiny(**keys)
    expected = first_gradients(model, "none", cut)
    assert all(g.any() for g in expected[1])
    for mode in MODES[1:]:
        found = first_gradients(model, mode, cut)
        assert torch.equal(found[0], expected[0])
        assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True)), mode


def test_a_base_in_4_bits_too() -> None:
    args, tuning = tiny_args(), TuningArgs(lora_rank=4, modules_to_save=["tok_embeddings"])
    checkpoint = SimpleNamespace(source=TensorSource(random_weights(args)), path="random", kind="tensors", adapter=None)
    model = build(checkpoint, args, tuning)
    mark_trainable(model, tuning)
    quantise(model, ParallelArgs(quant="nf4", precision="fp32"))
    fill(model, checkpoint, lambda name: torch.float32)
    expected, found = (first_gradients(model, mode, True) for mode in ("none", "selective"))
    assert expected[1][0].any() and all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


def compiled_step(budget: float) -> tuple[int, list[torch.Tensor]]:
    """(bytes that autograd keeps, gradients) of a compiled layer at this budget of its partitioner."""
    torch._dynamo.reset()
    model = tiny(n_layers=1, n_heads=4, n_kv_heads=4, dim=64, hidden_dim=192)
    layer = model.layers[0]
    layer.checkpointing = "selective"
    layer.compute = torch.compile(layer.compute, backend="aot_eager_decomp_partition", dynamic=False)
    own, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.arange(TOKENS).remainder(101).view(1, -1)
    with functorch.patch(activation_memory_budget=budget):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _, _ = model(tokens, labels=tokens)
        loss.backward()
    return sum(seen.values()), [p.grad for p in model.parameters()]


def test_compiled_selective_layers_keep_less_and_learn_the_same() -> None:
    """Compiled, the partitioner chooses; what it keeps passes through the hooks that autograd has for it."""
    from accessory.train.start import SELECTIVE_BUDGET

    (most, expected), (less, found) = (compiled_step(budget) for budget in (1.0, SELECTIVE_BUDGET))
    assert less < 0.8 * most, (less, most)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * a.abs().max().item())


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_a_recipe_is_run_once_for_all_that_want_it_and_again_for_a_second_backward() -> None:
    x, made = torch.randn(5, 8, requires_grad=True), []
    weights = [torch.randn(8, 8, requires_grad=True) for _ in range(3)]

    def make() -> torch.Tensor:
        made.append(1)
        assert not torch.is_grad_enabled()
        return x.tanh()

    with Remade() as remade:
        h = x.tanh()
        remade.note(h, make)
        y = sum(h @ w for w in weights) + (h.t() @ h).sum()  # a transposed view is kept as it is
    expected = torch.autograd.grad(
        sum((x.tanh() @ w).sum() for w in weights) + 5 * 8 * (x.tanh().t() @ x.tanh()).sum(), [x, *weights]
    )
    found = torch.autograd.grad(y.sum(), [x, *weights], retain_graph=True)
    assert len(made) == 1 and all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found, expected))
    again = torch.autograd.grad(y.sum(), [x, *weights])
    assert len(made) > 1 and all(torch.equal(a, b) for a, b in zip(found, again))


def test_what_has_a_recipe_is_not_kept() -> None:
    x, w = torch.randn(5, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    with Remade() as remade:
        h = F.dropout(x, 0.5)
        remade.note(h, lambda: torch.zeros(5, 8))
        y = h @ w
    storage = StorageWeakRef(h.untyped_storage())
    del h
    assert storage.expired()
    y.sum().backward()
    assert not w.grad.any()  # made of the recipe's zeros, not of what was kept


# --- flags and auto ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, mode",
    [([], "none"), (["--checkpointing"], "full"), (["--checkpointing", "Yes"], "full"), (["--checkpointing=0"], "none")]
    + [(["--checkpointing", word], {"true": "full", "false": "none"}.get(word, word)) for word in ("true", "false", *MODES, "auto")],
)  # fmt: skip
def test_old_and_new_words(words: list[str], mode: str) -> None:
    assert config.parse(words, ParallelArgs)[0].checkpointing == mode
    assert ParallelArgs(checkpointing=True).checkpointing == "full" and ParallelArgs().checkpointing == "none"


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="--checkpointing some: choose one of none, selective, full, auto"):
        config.parse(["--checkpointing", "some"], ParallelArgs)


def planned(checkpointing: str) -> dict[str, Any]:
    model = tiny(n_layers=4)
    checkpoint = SimpleNamespace(source=TensorSource(random_weights(model.args)))
    data = [SimpleNamespace(ids=range(n)) for n in (3, 4000, 2)]
    train_set = type("Data", (list,), {"report": SimpleNamespace(tokens=9, supervised_tokens=5)})(data)
    parallel = ParallelArgs(checkpointing=checkpointing, precision="fp32")
    return plan.plan(model, checkpoint, parallel, loop.LoopArgs(), optim.OptimArgs(), train_set, 10)


def test_auto_takes_the_fastest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {mode: planned(mode) for mode in MODES}
    totals = {m: sum(v for k, v in f["gigabytes"].items() if k != "program") for m, f in needs.items()}
    assert totals["none"] > totals["selective"] > totals["full"]
    for mode in MODES:
        assert needs[mode]["checkpointing"] == mode and not any("chosen" in line for line in plan.lines(needs[mode]))
    lower = {"none": "selective", "selective": "full", "full": "full"}
    for mode, less in lower.items():
        for free, expected in ((1.01, mode), (0.99, less)):
            room = free * totals[mode] * 1e9 / plan.FILLED
            monkeypatch.setattr(plan, "free_bytes", functools.partial(float, room))
            figures = planned("auto")
            assert figures["checkpointing"] == expected and figures["gigabytes"] == needs[expected]["gigabytes"]
            said = f"checkpointing: {expected}, chosen for {free * totals[mode] / plan.FILLED:.2f} GB of free memory"
            assert said in plan.lines(figures)


def test_free_memory_is_shared_by_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = plan.free_bytes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 1e6 < alone < 1e14 and plan.free_bytes() == pytest.approx(alone / 4, rel=0.2)


def test_auto_wants_to_know_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(plan.Path, "read_text", missing)
    assert planned("none")["free"] is None  # which does without
    with pytest.raises(ValueError, match="--checkpointing auto: .* choose none, selective or full"):
        planned("auto")


@pytest.mark.parametrize("lora, checkpointing", [(0, "none"), (0, "selective"), (0, "full"), (4, "none")])
def test_who_has_memory_to_spare_keeps(monkeypatch: pytest.MonkeyPatch, lora: int, checkpointing: str) -> None:
    """Attention by blocks on a CPU keeps its probabilities in bf16, but for adapters, checkpointing and validation."""
    monkeypatch.setitem(products.CPU_MULTIPLIES, torch.bfloat16, True)
    model, asked = tiny(n_layers=1, lora_rank=lora), []
    model.tok_embeddings.compute_dtype = torch.bfloat16
    set_mode(model, checkpointing)
    real = blocks._forward
    monkeypatch.setattr(blocks, "_forward", lambda *x: asked.append(x[-1]) or real(*x))
    tokens = torch.arange(20)[None]
    model(tokens, labels=tokens, cu_seqlens=torch.tensor([0, 8, 20]))[0].backward()
    with torch.no_grad():
        model(tokens, labels=tokens, cu_seqlens=torch.tensor([0, 8, 20]))
    keeps = not lora and checkpointing == "none"
    assert asked == [keeps] * (2 if checkpointing == "full" else 1) + [False]
