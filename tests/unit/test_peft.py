"""PEFT's adapters in and out, against peft itself: logits equal both ways, round trips bit-equal, old field sets, refusals."""

import json
from pathlib import Path

import pytest
import torch

from accessory.checkpoint.adapter import base_record, model_args, open_adapter, with_adapter, write_adapter
from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.formats_write import save_safetensors, write_hf
from accessory.model import Transformer
from accessory.model.args import ModelArgs
from accessory.model.lora import LINEARS, TuningArgs, mark_trainable
from accessory.model.pretrained import build, carried_tuning, fill
from accessory.weights import TensorSource, expected_shapes, is_lora
from accessory.weights.peft import FromPEFT, ToPEFT
from accessory.weights.peft_config import check_config, config_from_terms, is_targeted
from tools import lora_to_peft, merge_lora, peft_to_lora

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 37, "hidden_dim": 48}
TOKENS = torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(0))


def hf_base(directory: Path, tie: bool = False, **keys) -> Path:
    """A random model as transformers saves it."""
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=37, tie_word_embeddings=tie, **keys,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    randomise(model.named_parameters(), 0.3, 0)
    model.save_pretrained(directory)
    return directory


def randomise(parameters, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, p in parameters:
        p.data.add_(torch.randn(p.shape, generator=generator) * scale)


def made_by_peft(directory: Path, base: Path, safe: bool = True, **keys) -> tuple[Path, torch.nn.Module]:
    """(an adapter that peft has saved, its model), every trained weight away from where it started."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4} | keys)).eval()
    randomise(((n, p) for n, p in model.named_parameters() if p.requires_grad), 0.2, 1)
    model.save_pretrained(directory, safe_serialization=safe)
    return directory, model


def read_all(file: Path) -> dict[str, torch.Tensor]:
    """By the safetensors library, in memory: the file may be written again."""
    from safetensors.torch import load

    return load(file.read_bytes())


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 2e-5) -> None:
    difference = (ours - theirs).abs().max() / theirs.abs().max()
    assert difference <= tolerance, f"{difference:.2e}"


KINDS = {
    "all linears": {"target_modules": "all-linear"},
    "no alpha like it": {"target_modules": ["k_proj", "down_proj"], "lora_alpha": 7},
    "rank and alpha patterns, rslora": {
        "target_modules": "all-linear",
        "rank_pattern": {"k_proj": 2, "layers.0.mlp.down_proj": 3},
        "alpha_pattern": {"k_proj": 5, r".*\.1\.self_attn\.o_proj": 3},
        "use_rslora": True,
    },
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "lora_alpha": 3},
    "embedding and head alone": {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
    "embedding, tied": {"target_modules": ["embed_tokens", "q_proj"], "tie": True},
    "head, tied": {"target_modules": ["lm_head", "q_proj"], "tie": True},
    "both, tied together": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True, "tie": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "input_layernorm"]},
    "saved norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "saved linears": {"target_modules": ["q_proj"], "modules_to_save": ["k_proj", "layers.1.self_attn.o_proj"]},
    "saved embedding, tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "tie": True},
    "saved head, tied": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "tie": True},
    "saved, tied together": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "tie": True,
    },
    "biases": {"target_modules": ["q_proj"], "bias": "all", "attention_bias": True, "mlp_bias": True},
    "biases of its linears": {"target_modules": ["q_proj"], "bias": "lora_only", "attention_bias": True},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "a regular expression": {"target_modules": r".*\.1\.self_attn\.[qk]_proj", "exclude_modules": ["k_proj"]},
}  # fmt: skip
OF_THE_BASE = ("tie", "attention_bias", "mlp_bias")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_peft_saves_gives_the_same_logits_here(tmp_path: Path, kind: str) -> None:
    """Opened as it is, converted, and merged; and a second conversion, back to PEFT, in peft."""
    keys = KINDS[kind]
    base = hf_base(tmp_path / "base", **{k: v for k, v in keys.items() if k in OF_THE_BASE})
    own = {k: v for k, v in keys.items() if k not in OF_THE_BASE}
    directory, model = made_by_peft(tmp_path / "adapter", base, **own)
    expected, untouched = model(TOKENS).logits, Transformer.from_pretrained(base)(TOKENS)
    assert_near(Transformer.from_pretrained(directory)(TOKENS), expected)
    assert (untouched - expected).abs().max() > 0.01 * expected.abs().max()
    peft_to_lora.main(src=str(directory), dst=str(tmp_path / "ours"), base=str(base))
    assert_near(Transformer.from_pretrained(tmp_path / "ours")(TOKENS), expected)
    merge_lora.main(adapters=[str(directory)], dst=str(tmp_path / "merged"), format="hf")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_near(merged(TOKENS).logits, expected)
    if "alone" in kind:
        with pytest.raises(ValueError, match="PEFT has no adapters without LoRA"):
            lora_to_peft.main(src=str(tmp_path / "ours"), dst=str(tmp_path / "back"))
        return
    lora_to_peft.main(src=str(tmp_path / "ours"), dst=str(tmp_path / "back"))
    back = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "back")
    assert_near(back.eval()(TOKENS).logits, expected)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
@torch.no_grad()
def test_a_tied_base_whose_weight_was_not_saved_along(tmp_path: Path, module: str) -> None:
    """Old versions save no base_layer beside a LoRA on the embedding or the head: it is the base's."""
    base = hf_base(tmp_path / "base", tie=True)
    directory, model = made_by_peft(tmp_path / "adapter", base, target_modules=["q_proj", module])
    tensors = read_all(directory / "adapter_model.safetensors")
    kept = {k: t for k, t in tensors.items() if "base_layer" not in k}
    assert len(kept) == len(tensors) - 1
    save_safetensors(kept, directory / "adapter_model.safetensors")
    assert_near(Transformer.from_pretrained(directory)(TOKENS), model(TOKENS).logits)


# --- ours, out and back -----------------------------------------------------------------------------------------------


def ours(directory: Path, base: Path, dtype: torch.dtype = torch.float32, **keys) -> Path:
    """An adapter as a run saves it, over `base`, with every trained weight away from where it started."""
    checkpoint = open_checkpoint(base)
    args = model_args(checkpoint)
    terms = {
        "lora_rank": 3,
        "lora_alpha": 5.0,
        "lora_dropout": 0.1,
        "lora_targets": list(LINEARS),
        "modules_to_save": [],
    }
    terms |= {"bias_tuning": False, "norm_tuning": False, "base": base_record(checkpoint)} | keys
    tuning = TuningArgs.from_terms(terms)
    model = build(checkpoint, args, tuning)
    fill(model, checkpoint, lambda name: None)
    trained = mark_trainable(model, tuning)
    randomise(((n, p) for n, p in model.named_parameters() if p.requires_grad), 0.2, 2)
    tensors = {n: model.get_parameter(n).detach().to(dtype) for n in trained}
    directory.mkdir()
    write_adapter(directory, tensors, terms, args=args)
    return directory


def random_base(directory: Path, **keys) -> Path:
    """A model in Hugging Face's files that this library has written."""
    directory.mkdir()
    args = ModelArgs.from_dict(SIZES | {"tie_word_embeddings": False} | keys)
    generator = torch.Generator().manual_seed(0)
    shapes = expected_shapes(args, bool(args.tie_word_embeddings))
    write_hf(directory, TensorSource({n: torch.randn(s, generator=generator) * 0.3 for n, s in shapes.items()}), args)
    return directory


CASES = {
    "kv 1": ({"n_kv_heads": 1}, {}),
    "kv 2": ({"n_kv_heads": 2}, {"lora_targets": ["wq", "wk"]}),
    "kv 4": ({"n_kv_heads": 4}, {"lora_alpha": 6.0}),
    "kv 4 of 8": ({"n_heads": 8, "n_kv_heads": 4}, {"use_rslora": True}),
    "patterns": (
        {"n_layers": 12},
        {
            "rank_pattern": {"w2": 5, "layers.1": 2, "layers.11.attention.wk": 0, "layers.1.attention.wq": 0},
            "alpha_pattern": {"layers.1.attention.wv": 2.0, "w1": 8.0, "layers.10.attention.wv": 0.5},
        },
    ),
    "head and norms": ({}, {"modules_to_save": ["output", "tok_embeddings"], "norm_tuning": True}),
    "tied": ({"tie_word_embeddings": True}, {"modules_to_save": ["tok_embeddings"]}),
    "Qwen2": ({"qkv_bias": True}, {"modules_to_save": ["wq.bias", "wk.bias", "wv.bias", "norm"]}),
    "Qwen3": ({"qk_norm": True, "head_dim": 16}, {"norm_tuning": True}),
    "a linear in full": (
        {},
        {"lora_targets": ["wq"], "modules_to_save": ["wk.weight", "layers.1.feed_forward.w1.weight"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_out_and_back_is_bit_equal_and_peft_agrees(tmp_path: Path, case: str) -> None:
    params, keys = CASES[case]
    base = random_base(tmp_path / "base", **params)
    adapter = ours(tmp_path / "adapter", base, **keys)
    lora_to_peft.main(src=str(adapter), dst=str(tmp_path / "peft"))
    peft_to_lora.main(src=str(tmp_path / "peft"), dst=str(tmp_path / "back"), base=str(base))
    (before, first), (after, second) = open_adapter(adapter), open_adapter(tmp_path / "back")
    assert sorted(first.names()) == sorted(second.names())
    for name in first.names():
        assert torch.equal(first.read(name), second.read(name)) and first.dtype(name) == second.dtype(name), name
    old, new = TuningArgs.from_terms(before), TuningArgs.from_terms(after)
    linears = {n.rsplit(".", 1)[0] for n in open_checkpoint(base).source.names() if n.split(".")[-2] in LINEARS}
    assert [(old.rank_of(n), old.scale_of(n)) for n in linears] == [(new.rank_of(n), new.scale_of(n)) for n in linears]
    assert (old.lora_dropout, old.norm_tuning, before["base"]) == (new.lora_dropout, new.norm_tuning, after["base"])
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    assert_near(Transformer.from_pretrained(adapter)(TOKENS), model(TOKENS).logits)


@torch.no_grad()
def test_dtypes_rows_and_files_of_an_export(tmp_path: Path) -> None:
    base = random_base(tmp_path / "base")
    adapter = ours(tmp_path / "adapter", base, torch.bfloat16)
    lora_to_peft.main(src=str(adapter), dst=str(tmp_path / "peft"))
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    modules = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config == {
        **{"base_model_name_or_path": str(base), "bias": "none", "fan_in_fan_out": False, "inference_mode": True},
        **{
            "init_lora_weights": True,
            "lora_alpha": 5,
            "lora_dropout": 0.1,
            "modules_to_save": None,
            "peft_type": "LORA",
        },
        **{"r": 3, "target_modules": modules, "task_type": "CAUSAL_LM"},
    }

    written, (_, own) = read_all(tmp_path / "peft" / "adapter_model.safetensors"), open_adapter(adapter)
    stem = "base_model.model.model.layers.1.self_attn.k_proj"
    assert all(t.dtype == torch.bfloat16 for t in written.values()) and len(written) == 2 * 7 * 2
    assert torch.equal(written[f"{stem}.lora_A.weight"], own.read("layers.1.attention.wk.lora_a.weight"))
    rows = [
        head * 8 + pair * 2 + half for head in range(2) for half in range(2) for pair in range(4)
    ]  # Meta's, in HF's order
    assert torch.equal(written[f"{stem}.lora_B.weight"], own.read("layers.1.attention.wk.lora_b.weight")[rows])


def test_what_peft_has_no_place_for(tmp_path: Path) -> None:
    base = random_base(tmp_path / "base")
    for keys, message in (
        ({"bias_tuning": True}, r"layers\.0\.attention\.wk\.bias \(14 such\): PEFT has no place for biases"),
        ({"lora_rank": 0, "norm_tuning": True}, "PEFT has no adapters without LoRA"),
        ({"modules_to_save": ["wq.weight"]}, r"layers\.0\.attention\.wq has a LoRA and is trained in full"),
    ):
        adapter = ours(tmp_path / f"adapter{len(message)}", base, **keys)
        with pytest.raises(ValueError, match=message):
            lora_to_peft.main(src=str(adapter), dst=str(tmp_path / "peft"))
        assert not list(tmp_path.glob("peft*"))


# --- what peft wrote over the years -----------------------------------------------------------------------------------

COMMON = {
    **{"base_model_name_or_path": "/models/llama-7b", "bias": "none", "fan_in_fan_out": False, "inference_mode": True},
    **{
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "task_type": "CAUSAL_LM",
    },
    "target_modules": ["q_proj", "v_proj"],
}
FIELD_SETS = {
    "13e53fc": COMMON | {"enable_lora": None, "merge_weights": False},
    "0.3.0": COMMON | {"init_lora_weights": True},
    "0.7.1": COMMON
    | {"init_lora_weights": True, "alpha_pattern": {}, "rank_pattern": {}, "auto_mapping": None, "layers_pattern": None}
    | {"layers_to_transform": None, "loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"}
    | {"revision": None},
}


@pytest.mark.parametrize("name", FIELD_SETS)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@torch.no_grad()
def test_field_sets_and_files_of_older_versions(tmp_path: Path, name: str, suffix: str) -> None:
    base = hf_base(tmp_path / "base")
    made, model = made_by_peft(tmp_path / "made", base, target_modules=["q_proj", "v_proj"], lora_alpha=16)

    tensors, directory = read_all(made / "adapter_model.safetensors"), tmp_path / "old"
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(FIELD_SETS[name]))
    if suffix == "bin":
        torch.save(tensors, directory / "adapter_model.bin")
    else:  # keys as they are in memory
        save_safetensors(
            {k.replace(".weight", ".default.weight"): t for k, t in tensors.items()},
            directory / "adapter_model.safetensors",
        )
    assert_near(Transformer.from_pretrained(directory, base=base)(TOKENS), model(TOKENS).logits)
    with pytest.raises(ValueError, match=r"adapter_config\.json: its base /models/llama-7b is not there: .*--base"):
        open_checkpoint(directory)
    with pytest.raises(ValueError, match="--base is missing"):
        peft_to_lora.main(src=str(directory), dst=str(tmp_path / "dst"))
    terms, source = open_adapter(directory)  # names and shapes need no base
    assert terms["lora_targets"] == ["wq", "wv"] and source.shape("layers.1.attention.wq.lora_b.weight") == (32, 4)
    with pytest.raises(ValueError, match="the size of a head is not known without its base"):
        source.read("layers.1.attention.wq.lora_b.weight")


def test_the_fields_of_the_installed_peft_are_all_known() -> None:
    check_config(peft.LoraConfig(task_type="CAUSAL_LM").to_dict(), "here")


REFUSED = [
    {"use_dora": True}, {"lora_bias": True}, {"fan_in_fan_out": True}, {"megatron_config": {"a": 1}},
    {"layer_replication": [[0, 2]]}, {"trainable_token_indices": [1, 2]}, {"alora_invocation_tokens": [1]},
    {"target_parameters": ["w"]}, {"use_qalora": True}, {"arrow_config": {"top_k": 2}}, {"kasa_config": {"beta": 1}},
    {"use_bdlora": {"nblocks": 2}}, {"monteclora_config": {"n": 1}}, {"enable_lora": [True, False, True]},
    {"some_new_kind": "yes"}, {"peft_type": "IA3"}, {"task_type": "SEQ_CLS"}, {"r": 0}, {"lora_alpha": None},
    *({"init_lora_weights": v} for v in ("pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq")),
]  # fmt: skip


@pytest.mark.parametrize("change", REFUSED, ids=str)
def test_what_would_be_computed_differently_is_refused_by_name(change: dict) -> None:
    [(key, value)] = change.items()
    with pytest.raises(ValueError, match="here: ") as caught:
        check_config(COMMON | change, "here")
    assert key in str(caught.value) and repr(value) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"rank_pattern": ["q_proj"]},
        {"target_modules": "(q_proj"},
        {"alpha_pattern": {"[": 3}},
        {"modules_to_save": "lm_head"},
    ],
    ids=str,
)
def test_fields_that_peft_never_writes_so(change: dict) -> None:
    with pytest.raises(ValueError, match="here: .*copy the file again"):
        check_config(COMMON | change, "here")


def test_harmless_fields_pass() -> None:
    harmless = [{"init_lora_weights": v} for v in (True, False, "gaussian", "eva", "orthogonal")]
    harmless += [
        {"unsloth_fixed": True},
        {"auto_mapping": {"base_model_class": "x"}},
        {"some_new_kind": None},
        {"x": []},
    ]
    for change in [*harmless, {"revision": "main"}, {"peft_version": "9"}, {"loftq_config": {"loftq_bits": 4}}]:
        check_config(COMMON | change, "here")


TARGETS = [
    {"target_modules": ["q_proj", "mlp.up_proj"]}, {"target_modules": r".*\.(q|gate)_proj"}, {"target_modules": ["proj"]},
    {"target_modules": ["q_proj"], "layers_to_transform": 1}, {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1, 11], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.1\..*"}, {"target_modules": ["model.layers.1.mlp.up_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "modules_to_save": ["lm_head", "self_attn"]},
]  # fmt: skip


@pytest.mark.parametrize("keys", TARGETS, ids=str)
def test_targets_are_chosen_as_peft_chooses_them(keys: dict) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    config, plain = peft.LoraConfig(**keys), {"target_modules": None} | keys
    modules = [
        f"model.layers.{i}.{m}"
        for i in (0, 1, 11)
        for m in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.gate_proj")
    ]
    found = [m for m in [*modules, "model.embed_tokens", "lm_head"] if is_targeted(plain, m)]
    theirs = [m for m in [*modules, "model.embed_tokens", "lm_head"] if check_target_module_exists(config, m)]
    assert found == [m for m in theirs if "Excluded" not in type(check_target_module_exists(config, m)).__name__]


# --- adapters that are not whole --------------------------------------------------------------------------------------

Q = "base_model.model.model.layers.1.self_attn.q_proj"
DAMAGES = {
    "empty": (lambda t, c: t.clear() or t.update({"base_model.model.lm_head.weight": torch.ones(37, 32)}), "holds no LoRA weights"),
    "half": (lambda t, c: t.pop(f"{Q}.lora_A.weight"), r"has no layers\.1\.attention\.wq\.lora_a\.weight: one half"),
    "part": (
        lambda t, c: [t.pop(f"{Q}.lora_{x}.weight") for x in "AB"],
        r"has no LoRA for model\.layers\.1\.self_attn\.q_proj \(1 such\), which target_modules names",
    ),
    "saved module": (lambda t, c: t.pop("base_model.model.lm_head.weight"), "has no weight of lm_head, which modules_to_save"),
    "rank": (lambda t, c: c.update(r=5), r"r is 5 for model\.layers\..*, but its lora_A in the file has rank 4"),
    "dora": (lambda t, c: t.update({f"{Q}.lora_magnitude_vector": torch.ones(32)}), "lora_magnitude_vector has no counterpart"),
    "lora_bias": (lambda t, c: t.update({f"{Q}.lora_B.bias": torch.ones(32)}), r"lora_B\.bias has no counterpart"),
    "other model": (lambda t, c: t.update({"base_model.model.transformer.h.0.weight": torch.ones(3)}), "has no counterpart in a LLaMA"),
    "twice": (lambda t, c: t.update({f"{Q}.lora_A.default.weight": torch.ones(4, 32)}), "are the same weight: remove one"),
    "no weights": (lambda t, c: t.clear(), "is empty|holds|neither|no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    base = hf_base(tmp_path / "base")
    directory, _ = made_by_peft(
        tmp_path / "adapter", base, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]
    )

    tensors, config = (
        read_all(directory / "adapter_model.safetensors"),
        json.loads((directory / "adapter_config.json").read_text()),
    )
    config["target_modules"] = ["q_proj", "v_proj"]
    change, message = DAMAGES[damage]
    change(tensors, config)
    save_safetensors(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(directory)
    assert str(directory) in str(caught.value) and "\n" not in str(caught.value)
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(
        ValueError, match="holds adapter_config.json, but neither adapter_model.safetensors nor adapter_model.bin"
    ):
        open_checkpoint(directory)


def test_an_adapter_with_fewer_layers_than_its_base(tmp_path: Path) -> None:
    """Only its base tells how many layers there are."""
    adapter = FromPEFT(TensorSource({f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight": torch.ones(s) for x, s in (("A", (4, 32)), ("B", (32, 4)))}), COMMON | {"target_modules": ["q_proj"]}, None, "adapter")  # fmt: skip
    args = ModelArgs.from_dict(SIZES | {"tie_word_embeddings": False})
    base = TensorSource({n: torch.ones(s) for n, s in expected_shapes(args, False).items()})
    with pytest.raises(ValueError, match=r"has no LoRA for model\.layers\.1\.self_attn\.q_proj"):
        adapter.over(base, args)
    adapter.config = COMMON | {"target_modules": ["q_proj"], "layers_to_transform": [0]}
    tuning = TuningArgs.from_terms(adapter.over(base, args).terms)
    assert [tuning.rank_of(f"layers.{i}.attention.wq") for i in (0, 1)] == [4, 0]


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ours", "peft"])
@torch.no_grad()
def test_training_goes_on_where_the_adapter_stopped(tmp_path: Path, kind: str) -> None:
    """--lora_path: the first step's model is the adapter's; the terms are its own; the base is recorded as it was."""
    base = hf_base(tmp_path / "base")
    if kind == "peft":
        keys = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "use_rslora": True}
        adapter, model = made_by_peft(tmp_path / "adapter", base, rank_pattern={"layers.1.self_attn.q_proj": 2}, **keys)
        expected = model(TOKENS).logits
    else:
        adapter = ours(tmp_path / "adapter", base, modules_to_save=["output"], norm_tuning=True)
        expected = Transformer.from_pretrained(adapter)(TOKENS)
    checkpoint, tuning = with_adapter(open_checkpoint(base), adapter, TuningArgs(lora_dropout=0.25))
    model = build(checkpoint, model_args(checkpoint), tuning)
    trained = mark_trainable(model, tuning)
    fill(model, checkpoint, lambda name: torch.float32 if name in trained else None)
    assert_near(model.eval()(TOKENS), expected)
    assert tuning.lora_dropout == 0.25 and base_record(checkpoint) == base_record(open_checkpoint(base))
    saved = [n for n in trained if not is_lora(n)]
    norms = [n for n in model.state_dict() if "norm." in n]
    assert sorted(saved) == sorted(["output.weight"] + (["tok_embeddings.weight"] if kind == "peft" else norms))
    assert carried_tuning(checkpoint).rank_of("layers.1.attention.wq") == (2 if kind == "peft" else 3)


def test_flags_that_contradict_the_adapter(tmp_path: Path) -> None:
    base = hf_base(tmp_path / "base")
    adapter = ours(tmp_path / "adapter", base, modules_to_save=["output"], lora_targets=["wq", "wk"])

    def going_on(**flags) -> TuningArgs:
        tuning = TuningArgs(**flags)
        tuning.given = frozenset(flags)  # type: ignore[attr-defined]
        return with_adapter(open_checkpoint(base), adapter, tuning)[1]

    for flags, message in (
        ({"lora_rank": 8}, f"--lora_rank 8, but {adapter} was trained with lora_rank 3"),
        ({"lora_alpha": 16.0}, f"--lora_alpha 16.0, but {adapter} was trained with lora_alpha 5.0"),
        ({"lora_targets": ["wq"]}, f"--lora_targets wq, but {adapter} was trained with lora_targets wk,wq"),
        ({"use_rslora": True}, "--use_rslora True, but .* was trained with use_rslora False"),
        ({"modules_to_save": []}, "--modules_to_save , but .* was trained with modules_to_save output"),
        ({"modules_to_save": ["tok_embeddings"]}, "--modules_to_save tok_embeddings, but .* modules_to_save output"),
        ({"trainable": ["!layers.0"]}, "--trainable with --lora_path .* would be missing in the next adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            going_on(**flags)
    same = going_on(lora_rank=3, lora_alpha=5.0, lora_targets=["wk", "wq"])
    assert (same.lora_rank, same.alpha, same.modules_to_save) == (3, 5.0, ["output"]) and "lora_rank" in same.given
    more = going_on(modules_to_save=["output", "tok_embeddings"], norm_tuning=True)
    assert more.modules_to_save == ["output", "tok_embeddings"] and more.norm_tuning
    with pytest.raises(ValueError, match="--lora_path .*base: holds no adapter.json and no adapter_config.json"):
        with_adapter(open_checkpoint(base), base, TuningArgs())
    with pytest.raises(ValueError, match="has LoRA inside: merge it"):
        with_adapter(open_checkpoint(adapter), adapter, TuningArgs())


# --- several, with a LoRA on the embedding ----------------------------------------------------------------------------


@torch.no_grad()
def test_peft_merges_the_same_two_adapters(tmp_path: Path) -> None:
    """The second one's LoRA on embedding and head adds to what the first one made of them."""
    base = hf_base(tmp_path / "base")
    one, _ = made_by_peft(
        tmp_path / "one", base, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    first = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), one
    ).merge_and_unload()
    first.save_pretrained(tmp_path / "first")
    two, model = made_by_peft(
        tmp_path / "two", tmp_path / "first", target_modules=["embed_tokens", "lm_head", "q_proj"]
    )

    tensors = {
        k: t for k, t in read_all(two / "adapter_model.safetensors").items() if "base_layer" not in k
    }  # as 0.3 saves it
    save_safetensors(tensors, two / "adapter_model.safetensors")
    merge_lora.main(adapters=[str(one), str(two)], base=str(base), dst=str(tmp_path / "merged"), mp=2)
    assert_near(Transformer.from_pretrained(tmp_path / "merged")(TOKENS), model(TOKENS).logits)


def test_the_maps_alone() -> None:
    """Names one by one, without files."""
    args = ModelArgs.from_dict(SIZES | {"tie_word_embeddings": False})
    tensors = {
        "layers.1.attention.wq.lora_a.weight": torch.randn(2, 32),
        "layers.1.attention.wq.lora_b.weight": torch.randn(32, 2),
    }
    tensors["norm.weight"] = torch.randn(32)
    target = ToPEFT(TensorSource(tensors), args)
    assert target.names() == [f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", "base_model.model.model.norm.weight"]
    terms = {"lora_rank": 2, "lora_alpha": 3.0, "rank_pattern": {"layers.0.attention.wq": 0}, "lora_targets": ["wq"]}
    config = config_from_terms(terms, args, list(tensors), None)
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"] and config["modules_to_save"] == [
        "model.norm"
    ]
    back = FromPEFT(target, config, args)
    assert all(torch.equal(back.read(n), t) and back.shape(n) == tuple(t.shape) for n, t in tensors.items())
    name = "layers.1.attention.wq.lora_b.weight"
    assert torch.equal(back.read(name, 0, 5, 13), tensors[name][5:13]) and torch.equal(
        back.read(name, 1, 1, 2), tensors[name][:, 1:]
    )
    assert back.terms["lora_alpha"] == 3.0 and back.terms["modules_to_save"] == ["norm"]
