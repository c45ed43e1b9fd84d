"""What goes wrong in a notebook: one line that names the argument, and a model that works as before; and adapters for a loaded model."""

from pathlib import Path

import pytest
import torch

from accessory.generation.engine import generate
from accessory.model import Transformer
from accessory.model.lora import TuningArgs, add_tuning, mark_trainable
from accessory.parallel import groups
from tests.helpers import tiny_args, write_tiny_checkpoint


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tiny_args(vocab_size=101))


TOKENS = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_may_be_a_name(path: Path, name) -> None:
    assert Transformer.from_pretrained(path, dtype=name).norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "half8"}, "dtype 'half8': expected torch.float32"),
        ({"dtype": torch.int8}, "dtype torch.int8: expected"),
        ({"dtype": 32}, "dtype 32: expected"),
        ({"dtype": "Tensor"}, "dtype 'Tensor': expected"),
        ({"device": "gpu"}, "device 'gpu': expected 'cpu', 'cuda'"),
        ({"device": "meta"}, "device 'meta': expected"),
        ({"device": "cuda:99"}, "device 'cuda:99': torch sees"),
        ({"llama_config": "nowhere.json"}, "nowhere.json"),
    ],
    ids=str,
)
def test_arguments_of_from_pretrained(path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transformer.from_pretrained(path, **options)
    assert groups.device() == groups.default_device()  # as before
    Transformer.from_pretrained(path)


@pytest.mark.parametrize("nothing", [None, ""])
def test_no_path(nothing) -> None:
    with pytest.raises(ValueError, match="path .*: name the checkpoint"):
        Transformer.from_pretrained(nothing)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda m: m(TOKENS, positions=torch.zeros(1, 1, dtype=torch.long)),
            r"positions \(1, 1\) of torch.int64 for tokens \(2, 12\)",
        ),
        (lambda m: m(TOKENS, positions=torch.zeros(2, 1, dtype=torch.long)), r"positions \(2, 1\)"),
        (lambda m: m(TOKENS, positions=torch.arange(12)), r"positions \(12,\)"),
        (lambda m: m(TOKENS, positions=torch.zeros(3, 12, dtype=torch.long)), r"positions \(3, 12\)"),
        (lambda m: m(TOKENS, positions=[[0, 1]]), r"positions list for tokens \(2, 12\)"),
        (lambda m: m(TOKENS.tolist()), "tokens list: whole numbers"),
        (lambda m: m(TOKENS[0]), r"tokens \(12,\) of torch.int64"),
        (lambda m: m(TOKENS.float()), r"of torch.float32: whole numbers"),
        (lambda m: m(TOKENS, labels=TOKENS.float()), "labels of torch.float32"),
        (lambda m: m(TOKENS, labels=TOKENS > 5), "labels of torch.bool"),
        (lambda m: m(TOKENS, labels=TOKENS.tolist()), "labels of list"),
        (lambda m: m(TOKENS[:1], labels=TOKENS[:1], cu_seqlens=[0, 12]), "cu_seqlens: a tensor"),
        (lambda m: m(TOKENS[:1], cu_seqlens=torch.tensor([])), "cu_seqlens: a tensor"),
        (lambda m: m(TOKENS[:1], cu_seqlens=torch.tensor(12)), "cu_seqlens: a tensor"),
        (lambda m: m(TOKENS[:1], cu_seqlens=torch.tensor([[0, 12]])), "cu_seqlens: a tensor"),
        (lambda m: generate(m, None, 3), "prompts: a list of token ids for each"),
        (lambda m: generate(m, 5, 3), "prompts: a list of token ids for each"),
        (lambda m: generate(m, ["a b"], 3), "prompts: a list of token ids for each"),
        (lambda m: generate(m, TOKENS[0], 3), "prompts: a list of token ids for each"),
        (lambda m: generate(m, [[1.0]], 3), "prompts: a list of token ids for each"),
        (lambda m: generate(m, [[[1]]], 3), "prompts: a list of token ids for each"),
        (lambda m: generate(m, [], 3), "a prompt is empty"),
        (lambda m: generate(m, [[1], []], 3), "a prompt is empty"),
        (lambda m: generate(m, [[1]], -1), "max_new_tokens -1"),
        (lambda m: generate(m, [[1]], 2.5), "max_new_tokens 2.5"),
        (lambda m: generate(m, "a b", 3), "prompts: a list of token ids for each"),
        (lambda m: generate(m, [1, 2], 3), "prompts: a list of token ids for each"),
        (lambda m: generate(m, [[1]], 3, top_p=0.0), "top_p 0.0"),
        (lambda m: generate(m, [[1]], 3, temperature=float("nan")), "temperature nan"),
    ],
)
def test_arguments_of_a_model(path: Path, call, message: str) -> None:
    model = Transformer.from_pretrained(path)
    before = model(TOKENS)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("call", [lambda m: m(TOKENS), lambda m: m.hidden(TOKENS), lambda m: generate(m, [[1]], 3)])
def test_a_model_without_weights_says_so_and_tells_its_shapes(call) -> None:
    model = Transformer(tiny_args())
    with pytest.raises(ValueError, match="the model has no weights yet: init_weights"):
        call(model)
    assert model(TOKENS.to("meta")).shape == (2, 12, 101)


def test_no_tokens_at_all(path: Path) -> None:
    model, none = Transformer.from_pretrained(path), TOKENS[:, :0]
    assert model(none).shape == (2, 0, 101) and model(none, labels=none)[:2] == (0, 0)


def test_one_row_of_positions_serves_all(path: Path) -> None:
    model = Transformer.from_pretrained(path)
    assert torch.equal(model(TOKENS, positions=torch.arange(12).unsqueeze(0)), model(TOKENS))


def test_prompts_may_be_tensors_and_the_end_one_id(path: Path) -> None:
    model = Transformer.from_pretrained(path)
    expected = generate(model, TOKENS.tolist(), 6)
    assert generate(model, TOKENS, 6) == generate(model, list(TOKENS), 6) == expected
    assert generate(model, TOKENS[:1], 6, eos_ids=expected[0][2]) == generate(
        model, TOKENS[:1], 6, eos_ids=[expected[0][2]]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_gets_adapters_that_change_nothing_yet_and_learn(path: Path, dtype: torch.dtype) -> None:
    model = Transformer.from_pretrained(path, dtype=dtype)
    before = model(TOKENS).detach()
    tuning = TuningArgs(lora_rank=4, bias_tuning=True)
    add_tuning(model, tuning)
    trained = mark_trainable(model, tuning)
    assert torch.equal(model(TOKENS), before) and not any(p.is_meta for p in model.parameters())
    assert {p.dtype for n, p in model.named_parameters() if n in trained and "norm" not in n} == {torch.float32}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss, count, _ = model(TOKENS, labels=TOKENS)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.requires_grad == (n in trained) for n, p in model.named_parameters())


def test_adapters_are_not_put_in_the_place_of_others(path: Path) -> None:
    model, tuning = Transformer.from_pretrained(path), TuningArgs(lora_rank=4)
    add_tuning(model, tuning)
    model.layers[0].attention.wq.lora_b.weight.data.add_(1)
    expected = model(TOKENS)
    with pytest.raises(ValueError, match="the model has adapters already: mark_trainable alone"):
        add_tuning(model, tuning)
    assert torch.equal(model(TOKENS), expected) and len(mark_trainable(model, tuning)) == 28


def test_built_on_meta_by_its_user_it_takes_weights(path: Path) -> None:
    model = Transformer.from_pretrained(path)
    with torch.device("meta"):
        other = Transformer(model.args)
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_a_save_that_failed_asks_for_room_only_where_it_helps(tmp_path) -> None:
    from accessory.checkpoint.save import _readable

    own = str(_readable(ValueError("every lora_b is zero: check --lr"), tmp_path, tmp_path / "step_1"))
    full = str(_readable(OSError(28, "No space left on device"), tmp_path, tmp_path / "step_1"))
    assert "check --lr; earlier checkpoints are untouched" in own and "make room" not in own and "MB free" not in own
    assert "No space left on device" in full and "MB free there" in full and "make room" in full
