"""A training loop, a head, a loss of one's own, and a model that is taken apart: hooks and replaced modules are heard, layers may
be moved, adapters switched off, the whole copied, pickled, cast and compiled."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from accessory.generation.engine import generate
from accessory.model import Transformer
from accessory.model.llama import set_parameter
from accessory.model.lora import TuningArgs, add_tuning, mark_trainable, without_adapters
from tests.helpers import random_weights, tiny_args

TOKENS = torch.randint(101, (2, 12), generator=torch.Generator().manual_seed(0))
BOUNDS = torch.tensor([0, 5, 12])


def model_of(lora_rank: int = 0, dropout: float = 0.0, **keys) -> Transformer:
    model = Transformer(tiny_args(**keys))
    weights, tuning = random_weights(model.args), TuningArgs(lora_rank=lora_rank, lora_dropout=dropout)
    add_tuning(model, tuning)
    torch.manual_seed(1)
    for name in [n for n, _ in model.named_parameters()]:
        adapter = torch.randn(model.get_parameter(name).shape) * 0.1
        set_parameter(model, name, weights.get(name, adapter))
    mark_trainable(model, tuning)
    return model


def cross_entropy(logits: torch.Tensor, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def greedy(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Without a cache."""
    row = list(prompt)
    for _ in range(count):
        row.append(model(torch.tensor([row]))[0, -1].argmax().item())
    return row[len(prompt) :]


# --- hidden, and the head ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_is_what_the_head_is_given(tied: bool) -> None:
    model = model_of(tie_word_embeddings=tied)
    same, shifted = model.hidden(TOKENS), torch.arange(3, 15).unsqueeze(0)
    assert same.shape == (2, 12, 48) and torch.equal(F.linear(same, model.head), model(TOKENS))
    packed = model.hidden(TOKENS[:1], cu_seqlens=BOUNDS)
    assert torch.equal(F.linear(packed, model.head), model(TOKENS[:1], cu_seqlens=BOUNDS))
    assert torch.equal(model.hidden(TOKENS, shifted) @ model.head.t(), model(TOKENS, positions=shifted))
    with pytest.raises(ValueError, match="whole numbers in"):
        model.hidden(TOKENS[0])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [7, 101, 120])
def test_a_head_of_ones_own_is_heard_with_labels_and_without(rows: int, tied: bool) -> None:
    model, tokens = model_of(tie_word_embeddings=tied), TOKENS % 7
    model.output = nn.Linear(48, rows)
    logits = model(tokens)
    assert torch.equal(logits, model.output(model.hidden(tokens))) and logits.shape == (2, 12, rows)
    loss, count, metrics = model(tokens, labels=tokens)
    torch.testing.assert_close(loss, cross_entropy(logits, tokens))
    assert count == 22 and metrics["correct"] == (logits[:, :-1].argmax(-1) == tokens[:, 1:]).sum()
    loss.backward()
    assert all(p.grad.any() for p in model.output.parameters()) and model.layers[0].attention.wq.weight.grad.any()


def test_a_bias_and_hooks_of_the_head_count_with_labels_too() -> None:
    model = model_of()
    model.output.bias = nn.Parameter(torch.linspace(-2, 2, 101))
    torch.testing.assert_close(model(TOKENS, labels=TOKENS)[0], cross_entropy(model(TOKENS)))
    model.output.bias = None
    handle = model.output.register_forward_hook(lambda module, inputs, output: output / 3)
    torch.testing.assert_close(
        model(TOKENS, labels=TOKENS)[0], cross_entropy(model.hidden(TOKENS) @ model.head.t() / 3)
    )
    handle.remove()
    assert model._fuses()


def test_no_target_at_all_is_a_loss_of_zero_with_such_a_head_too() -> None:
    model = model_of()
    model.output = nn.Linear(48, 5)
    loss, count, _ = model(TOKENS, labels=torch.full_like(TOKENS, -100))
    loss.backward()
    assert loss == 0 == count and not model.output.weight.grad.any()


# --- taken apart ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[2, 0, 1], [1], [0, 1, 1, 2]], ids=str)
def test_layers_may_be_moved_removed_and_repeated(order: list[int]) -> None:
    model = model_of(n_layers=3)
    model.layers = nn.ModuleList(model.layers[i] for i in order)
    assert generate(model, [[5, 9, 3]], 6) == [greedy(model, [5, 9, 3], 6)]


def test_modules_are_replaced_and_activations_patched() -> None:
    model = model_of()
    before, [seen] = model(TOKENS), [[]]
    handle = model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(TOKENS)
    handle.remove()
    handle = model.layers[0].register_forward_hook(lambda module, inputs, output: seen[0])
    model.tok_embeddings.weight.data.zero_()
    assert torch.equal(model(TOKENS), before)  # the first layer's output decides
    handle.remove()
    model.norm, model.layers[1].attention_norm = nn.Identity(), nn.LayerNorm(48)
    model.tok_embeddings, model.layers[0].attention.wq = nn.Embedding(101, 48), nn.Linear(48, 48)
    cross_entropy(model(TOKENS)).backward()
    assert generate(model, [[5, 9]], 4) == [greedy(model, [5, 9], 4)] and model.tok_embeddings.weight.grad.any()


def test_it_tells_its_sizes() -> None:
    told = repr(model_of())
    assert "ColumnLinear(48, 16, bias=False)" in told and "RowLinear(72, 48, bias=False)" in told
    assert "VocabParallelEmbedding(101, 48)" in told and "RMSNorm(48, eps=1e-05)" in told


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same_and_are_apart(copied) -> None:
    model = model_of(lora_rank=2)
    model(TOKENS, labels=TOKENS)[0].backward()
    other = copied(model)
    assert torch.equal(other(TOKENS), model(TOKENS))
    other.layers[0].attention.wq.lora_b.weight.data.add_(1)
    assert not torch.equal(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=str)
def test_cast_and_loaded_in_another_dtype(dtype: torch.dtype, bound: float) -> None:
    model = model_of()
    expected = model(TOKENS).detach()
    state = {n: t.to(dtype) for n, t in model.state_dict().items()}
    loaded = Transformer(model.args)
    loaded.load_state_dict(state, assign=True)
    logits = model.to(dtype)(TOKENS)
    assert logits.dtype == dtype and torch.equal(loaded(TOKENS), logits)
    assert (logits - expected).abs().max() <= bound * expected.abs().max()
    model(TOKENS, labels=TOKENS)[0].backward()
    assert {p.grad.dtype for p in model.parameters()} == {dtype}


def test_compiled_by_its_user_it_is_one_graph_with_the_same_logits() -> None:
    torch._dynamo.reset()
    model = model_of(lora_rank=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
    cross_entropy(compiled(TOKENS)).backward()
    torch._dynamo.reset()
    assert model.layers[0].attention.wq.lora_a.weight.grad.any()


# --- loops ------------------------------------------------------------------------------------------------------------


def test_distilled_from_a_bigger_teacher_by_logits_and_hidden() -> None:
    teacher, student = model_of(dim=96, n_layers=3), model_of()
    up, losses = nn.Linear(48, 96), []
    optimizer = torch.optim.AdamW([*student.parameters(), *up.parameters()], lr=3e-3)
    with torch.no_grad():
        goal, far = teacher(TOKENS).log_softmax(-1), teacher.hidden(TOKENS)
    for _ in range(12):
        x = student.hidden(TOKENS)
        kl = F.kl_div(student.output(x).log_softmax(-1), goal, reduction="batchmean", log_target=True)
        loss = kl / 12 + F.mse_loss(up(x), far)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_preferences_are_learnt_against_the_model_without_its_adapters(checkpointing: str) -> None:
    base, model = model_of(), model_of(lora_rank=4)
    for layer in model.layers:
        layer.checkpointing = checkpointing
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with without_adapters(model):
        reference = model(TOKENS)
    assert torch.equal(reference, base(TOKENS)) and not reference.requires_grad
    assert not torch.equal(model(TOKENS), reference) and model(TOKENS).requires_grad
    losses = []
    for _ in range(5):
        chosen, rejected = [-F.cross_entropy(a, b) for a, b in zip(model(TOKENS), TOKENS)]
        with without_adapters(model):
            less, more = [-F.cross_entropy(a, b) for a, b in zip(model(TOKENS), TOKENS)]
        loss = -F.logsigmoid(chosen - less - (rejected - more))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    with pytest.raises(ValueError), without_adapters(model):
        model(TOKENS[0])
    assert not torch.equal(model(TOKENS), reference) and torch.is_grad_enabled()


def test_generation_leaves_each_module_in_its_mode_after_an_error_too() -> None:
    model = model_of(lora_rank=2, dropout=0.5).train()
    model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    assert len(set(modes)) == 2 and generate(model, [[1, 2]], 5) == generate(model, [[1, 2]], 5)
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(ValueError, match="102 is none"):
        generate(model, [[102]], 5)
    assert [m.training for m in model.modules()] == modes
