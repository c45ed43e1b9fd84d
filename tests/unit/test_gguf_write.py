"""GGUF out: the gguf library and transformers read it back; types, keys, rows of q and k; in again bit-equal."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from accessory.checkpoint import gguf_write
from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.formats_write import write_meta
from accessory.data import carried
from accessory.model import Transformer, rope
from accessory.model.args import ModelArgs
from accessory.weights import TensorSource, expected_shapes, hf
from accessory.weights import gguf as layout
from accessory.weights.gguf_rope import rope_factors
from accessory.weights.gguf_vocab import vocabulary
from tests.unit.test_reshard import random_tensors
from tools import gguf_to_meta, meta_to_gguf

gguf = pytest.importorskip("gguf")

STORIES = Path(__file__).resolve().parents[2].parent / "shared/assets/stories260K"
SIZES = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=280, norm_eps=1e-6)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
KINDS = {
    "llama": {},
    "llama tied, biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama mqa, odd widths": {"n_kv_heads": 1, "head_dim": 24, "hidden_dim": 112},
    "qwen2": {"qkv_bias": True, "rope_theta": 1e6},
    "qwen3": {"qk_norm": True, "head_dim": 128, "tie_word_embeddings": True, "rope_theta": 1e6},
}


def make(**keys) -> ModelArgs:
    return ModelArgs.from_dict(SIZES | {"tie_word_embeddings": False, "max_position_embeddings": 128} | keys)


def write_tokenizer(directory: Path) -> Path:
    """A byte-level BPE of 262 tokens with SmolLM's pre-tokeniser."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "th", "the", "Ġt", "Ġthe"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e"), ("Ġ", "t"), ("Ġ", "the")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": "{{ messages }}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory / "tokenizer.json"


def write_checkpoint(directory: Path, args: ModelArgs, dtype=torch.float32, scale=0.2, **keys) -> dict:
    """A Meta directory of random weights with its tokenizer; returns the weights."""
    directory.mkdir(parents=True)
    tensors = {n: t * scale for n, t in random_tensors(args, dtype=dtype).items()}
    write_meta(directory, TensorSource(tensors), args.to_dict(), **keys)
    write_tokenizer(directory)
    return tensors


def reader_of(path: Path):
    reader = gguf.GGUFReader(path)
    return {k: f.contents() for k, f in reader.fields.items()}, {t.name: t for t in reader.tensors}


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("keys", KINDS.values(), ids=KINDS)
def test_the_gguf_library_reads_back_what_it_would_have_written(tmp_path: Path, keys: dict, dtype: str) -> None:
    args = make(**keys)
    tensors = write_checkpoint(tmp_path / "in", args)
    meta_to_gguf.main(src=str(tmp_path / "in"), dst=str(tmp_path / "m.gguf"), dtype=dtype)
    metadata, found = reader_of(tmp_path / "m.gguf")
    assert len(found) == len(tensors)
    rotated = {n: halves(n, t, args) if metadata["general.architecture"] != "llama" else t for n, t in tensors.items()}
    for name, tensor in rotated.items():
        stored = found[layout.gguf_name(name)]
        vector = tensor.ndim == 1
        kind = "F32" if vector else "F16" if dtype == "q8_0" and tensor.shape[1] % 32 else dtype.upper()
        assert stored.tensor_type.name == kind and stored.shape.tolist() == list(tensor.shape[::-1]), name
        wanted = gguf.quants.quantize(tensor.numpy(), stored.tensor_type)
        assert np.array_equal(stored.data.view(np.uint8).ravel(), wanted.view(np.uint8).ravel()), name
    assert metadata["general.file_type"] == {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}[dtype]
    if dtype == "q8_0":
        kinds = {t.tensor_type.name for t in found.values()}
        assert kinds == ({"F32", "Q8_0", "F16"} if args.ffn_dim == 112 else {"F32", "Q8_0"})


def halves(name: str, tensor: torch.Tensor, args: ModelArgs) -> torch.Tensor:
    """Meta's rows of q and k as Hugging Face's, head by head: even rows first, then odd ones."""
    if name.split(".")[-2] not in ("wq", "wk", "q_norm", "k_norm"):
        return tensor
    return torch.cat([part for head in tensor.split(args.head_size) for part in (head[0::2], head[1::2])])


@pytest.mark.parametrize("shards, embedding_dim", [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("keys", KINDS.values(), ids=KINDS)
def test_in_again_is_bit_equal(tmp_path: Path, keys: dict, shards: int, embedding_dim: int) -> None:
    args = make(**keys)
    tensors = write_checkpoint(tmp_path / "in", args, shards=shards, embedding_dim=embedding_dim)
    meta_to_gguf.main(src=str(tmp_path / "in"), dst=str(tmp_path / "m.gguf"))
    gguf_to_meta.main(src=str(tmp_path / "m.gguf"), dst=str(tmp_path / "out"), mp=shards, embedding_dim=embedding_dim)
    back = open_checkpoint(tmp_path / "out")
    assert ModelArgs.from_dict(back.params) == args and set(back.source.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(back.source.read(name), tensor), name
    first, last = ((tmp_path / d / "tokenizer_config.json").read_text() for d in ("in", "out"))
    assert json.loads(first).items() <= json.loads(last).items()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_by_default_the_weights_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = write_checkpoint(tmp_path / "in", make(), dtype)
    meta_to_gguf.main(src=str(tmp_path / "in"), dst=str(tmp_path / "m.gguf"))
    source = open_checkpoint(tmp_path / "m.gguf").source
    for name, tensor in tensors.items():
        assert source.dtype(name) == (dtype if tensor.ndim == 2 else torch.float32)
        assert torch.equal(source.read(name).to(dtype), tensor), name


def test_metadata_says_what_the_model_is(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny-model", make(head_dim=24))
    meta_to_gguf.main(src=str(tmp_path / "tiny-model"), dst=str(tmp_path / "m.gguf"))
    metadata, found = reader_of(tmp_path / "m.gguf")
    sizes = {
        "vocab_size": 280,
        "context_length": 128,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 24,
        "attention.value_length": 24,
        "rope.dimension_count": 24,
        "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
    }
    assert {k.removeprefix("llama."): v for k, v in metadata.items() if k.startswith("llama.")} == sizes
    general = {k.removeprefix("general."): v for k, v in metadata.items() if k.startswith("general.")}
    assert general == {
        "architecture": "llama",
        "type": "model",
        "name": "tiny-model",
        "file_type": 0,
        "quantization_version": 2,
    }
    words = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    tokens, types = words.pop("tokens"), words.pop("token_type")
    assert len(tokens) == len(types) == 280 and tokens[259:264] == ["Ġthe", "<s>", "</s>", "[PAD262]", "[PAD263]"]
    assert (types[:260], types[260:]) == ([1] * 260, [3, 3] + [5] * 18)
    assert words == {
        "model": "gpt2",
        "pre": "smollm",
        "merges": ["t h", "th e", "Ġ t", "Ġ the"],
        "bos_token_id": 260,
        "eos_token_id": 261,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert all(t.data_offset % 32 == 0 for t in found.values())


SCALINGS = {
    "linear": ({"rope_type": "linear", "factor": 2.5}, {"type": "linear", "factor": 2.5}),
    "yarn": (YARN, {"type": "yarn", "factor": 4.0, "original_context_length": 16}),
    "yarn, all said": (
        YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.25},
        {
            "type": "yarn",
            "factor": 4.0,
            "original_context_length": 16,
            "yarn_beta_fast": 32.0,
            "yarn_beta_slow": 1.0,
            "attn_factor": float(np.float32(1.25 / (0.1 * math.log(4) + 1))),  # llama.cpp multiplies by the rest
        },
    ),
    "llama3": (LLAMA3, {}),
    "llama3, of a shorter text": (LLAMA3 | {"factor": 4.0, "original_max_position_embeddings": 1000}, {}),
}


@pytest.mark.parametrize("scaling, keys", SCALINGS.values(), ids=SCALINGS)
def test_scaled_rope_there_and_back(tmp_path: Path, scaling: dict, keys: dict) -> None:
    args = make(rope_scaling=scaling, rope_theta=500000.0, head_dim=64)
    write_checkpoint(tmp_path / "in", args)
    meta_to_gguf.main(src=str(tmp_path / "in"), dst=str(tmp_path / "m.gguf"))
    metadata, found = reader_of(tmp_path / "m.gguf")
    assert {k[len("llama.rope.scaling.") :]: v for k, v in metadata.items() if ".scaling." in k} == keys
    assert ("rope_freqs.weight" in found) == (scaling["rope_type"] == "llama3")
    back = ModelArgs.from_dict(open_checkpoint(tmp_path / "m.gguf").params)
    ours, theirs = (rope.frequencies(64, 500000.0, a.rope_scaling) for a in (args, back))
    assert torch.equal(ours[0], theirs[0]) and ours[1] == pytest.approx(theirs[1], rel=1e-6)
    assert back.rope_scaling["factor"] == scaling["factor"]


def test_a_yarn_ramp_that_llama_cpp_would_not_read_is_refused(tmp_path: Path) -> None:
    args = make(rope_scaling=YARN | {"original_max_position_embeddings": 4096, "beta_slow": 2.0}, head_dim=64)
    write_checkpoint(tmp_path / "in", args)
    with pytest.raises(ValueError, match="yarn with beta_slow 2: llama.cpp takes 32 and 1"):
        meta_to_gguf.main(src=str(tmp_path / "in"), dst=str(tmp_path / "m.gguf"))
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("factor, old", [(8.0, 8192), (32.0, 8192), (4.0, 1000)])
def test_the_divisors_are_those_of_llama_cpp(factor: float, old: int) -> None:
    """convert_hf_to_gguf.py's LlamaModel.generate_extra_tensors, its loop over the frequencies."""
    scaling = LLAMA3 | {"factor": factor, "original_max_position_embeddings": old}
    wanted = []
    for freq in 1.0 / (500000.0 ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128)):
        wavelen = 2 * math.pi / freq
        smooth = (old / wavelen - 1.0) / (4.0 - 1.0)
        wanted.append(1 if wavelen < old / 4 else factor if wavelen > old else 1 / ((1 - smooth) / factor + smooth))
    found = rope_factors(128, 500000.0, scaling)
    assert torch.equal(found, torch.tensor(wanted, dtype=torch.float32)) and len(set(found.tolist())) > 4
    plain, scaled = (rope.frequencies(128, 500000.0, s)[0] for s in (None, scaling))
    torch.testing.assert_close(plain / scaled, found, rtol=1e-6, atol=0)


def test_ntk_is_a_larger_base(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", make(rope_scaling={"rope_type": "ntk", "factor": 3.0}))
    meta_to_gguf.main(src=str(tmp_path / "in"), dst=str(tmp_path / "m.gguf"))
    metadata, _ = reader_of(tmp_path / "m.gguf")
    assert metadata["llama.rope.freq_base"] == pytest.approx(10000.0 * 3.0 ** (16 / 14), rel=1e-7)
    assert "rope_scaling" not in open_checkpoint(tmp_path / "m.gguf").params


@torch.no_grad()
def logits_of(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    return Transformer.from_pretrained(path)(tokens)


HF_MODELS = {
    "llama gqa": ("Llama", {"num_key_value_heads": 2}),
    "llama mqa tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen3 tied": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("family, keys", HF_MODELS.values(), ids=HF_MODELS)
def test_transformers_computes_the_same_from_our_file(tmp_path: Path, family: str, keys: dict) -> None:
    """A model made by transformers, exported by us from its own directory, loaded by its GGUF loader and by ours."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=280)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, **keys)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name), 0.15)
    model.save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    meta_to_gguf.main(src=str(tmp_path / "hf"), dst=str(tmp_path / "out/m.gguf"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="m.gguf").eval()
    assert type(theirs).__name__ == f"{family}ForCausalLM"
    tokens = torch.randint(0, 280, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        truth, loaded = model(tokens).logits, theirs(tokens).logits
    ours = logits_of(tmp_path / "out/m.gguf", tokens)
    assert truth.std() > 0.5
    for other in (loaded, ours):
        assert (other - truth).abs().max() <= 2e-5 * truth.abs().max()


@pytest.mark.skipif(not STORIES.is_dir(), reason="real checkpoints are not here")
@pytest.mark.parametrize("source", ["meta", "meta-mp2-llama2style", "hf"])
def test_stories_computes_the_same_in_transformers(tmp_path: Path, source: str) -> None:
    transformers = pytest.importorskip("transformers")
    meta_to_gguf.main(src=str(STORIES / source), dst=str(tmp_path / "m.gguf"))
    there, here = open_checkpoint(STORIES / "gguf/stories260K-f32.gguf"), open_checkpoint(tmp_path / "m.gguf")
    assert all(torch.equal(there.source.read(n), here.source.read(n)) for n in there.source.names())
    for key in ("tokens", "token_type", "scores", "bos_token_id", "eos_token_id"):
        assert here.metadata[f"tokenizer.ggml.{key}"] == there.metadata[f"tokenizer.ggml.{key}"], key
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").eval()
    tokens = torch.tensor([[1, *range(260, 300), 403, 407]])
    with torch.no_grad():
        theirs = model(tokens).logits
    ours = logits_of(STORIES / "meta", tokens)
    assert (theirs - ours).abs().max() <= 2e-5 * ours.abs().max()


def test_a_gguf_keeps_its_own_tokenizer(tmp_path: Path, monkeypatch) -> None:
    write_checkpoint(tmp_path / "in", make())
    monkeypatch.setattr(
        meta_to_gguf, "vocabulary", lambda *_: vocabulary(*_) | {"ggml.precompiled_charsmap": b"\x01\xff"}
    )
    meta_to_gguf.main(src=str(tmp_path / "in"), dst=str(tmp_path / "a.gguf"))
    (tmp_path / "b").mkdir()
    meta_to_gguf.main(src=str(tmp_path / "a.gguf"), dst=str(tmp_path / "b/b.gguf"), dtype="f16")
    (first, _), (second, _) = reader_of(tmp_path / "a.gguf"), reader_of(tmp_path / "b/b.gguf")
    words = {k: v for k, v in first.items() if k.startswith("tokenizer.")}
    assert len(words) > 9 and words == {k: v for k, v in second.items() if k.startswith("tokenizer.")}
    assert second["general.name"] == "a" and second["tokenizer.ggml.precompiled_charsmap"] == [1, 255]
    field = gguf.GGUFReader(tmp_path / "b/b.gguf").fields["tokenizer.ggml.precompiled_charsmap"]
    assert field.types[-1] == gguf.GGUFValueType.UINT8
    with pytest.raises(ValueError, match="the tokenizer has 2 tokens, but the embedding 280 rows"):
        source = open_checkpoint(tmp_path / "a.gguf").source
        gguf_write.write_gguf(tmp_path / "c.gguf", source, make().to_dict(), {"ggml.tokens": ["a", "b"]}, "f32", "c")


class Watched(TensorSource):
    """Notes the largest slice that is read."""

    largest = 0

    def read(self, name, dim=None, start=0, stop=None):
        out = super().read(name, dim, start, stop)
        self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("keys", KINDS.values(), ids=KINDS)
def test_blocks_of_rows_change_nothing_and_bound_what_is_read(tmp_path: Path, monkeypatch, keys: dict) -> None:
    args = make(**keys)
    source = Watched(random_tensors(args))
    words = {"ggml.model": "llama", "ggml.tokens": [f"t{i}" for i in range(280)]}
    gguf_write.write_gguf(tmp_path / "whole.gguf", source, args.to_dict(), words, "q8_0", "m")
    assert source.largest == max(t.numel() for t in source.tensors.values())
    monkeypatch.setattr(gguf_write, "BLOCK", 500)
    source.largest = 0
    gguf_write.write_gguf(tmp_path / "parts.gguf", source, args.to_dict(), words, "q8_0", "m")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "parts.gguf").read_bytes()
    # whole heads of q and k are read where rows are reordered
    assert source.largest <= 500 + 2 * args.head_size * 64 * (args.qkv_bias or args.qk_norm)


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    args = make()
    write_checkpoint(tmp_path / "in", args)
    before = set(tmp_path.rglob("*"))

    def refused(match: str, **keys) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            meta_to_gguf.main(**({"src": str(tmp_path / "in"), "dst": str(tmp_path / "m.gguf")} | keys))
        assert "\n" not in str(caught.value) and set(tmp_path.rglob("*")) == before

    refused("--dtype q4_0: choose one of f32, f16, bf16, q8_0", dtype="q4_0")
    refused(r"--dst .*m\.bin: name a file that ends in \.gguf", dst=str(tmp_path / "m.bin"))
    refused("--tokenizer_path .*nowhere: no such file", tokenizer_path=str(tmp_path / "nowhere"))
    monkeypatch.setattr(gguf_write.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**16}))
    refused("MiB are needed, 0 are free")
    monkeypatch.undo()
    (tmp_path / "in/tokenizer.json").rename(tmp_path / "elsewhere")
    before = set(tmp_path.rglob("*"))
    refused("has no tokenizer: give the model's with --tokenizer_path FILE")
    write_tokenizer(tmp_path / "in")
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr(gguf_write, "_append_data", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        meta_to_gguf.main(src=str(tmp_path / "in"), dst=str(tmp_path / "m.gguf"))
    assert set(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    meta_to_gguf.main(src=str(tmp_path / "in"), dst=str(tmp_path / "m.gguf"))
    before = set(tmp_path.rglob("*"))
    refused(r"--dst .*m\.gguf is already there")


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"qk_norm": True, "attention_bias": True}, "qk_norm and attention_bias together have no architecture"),
        ({"qkv_bias": True, "mlp_bias": True}, "qkv_bias and mlp_bias together"),
        ({"qkv_bias": True, "head_dim": 24}, "qkv_bias and a head_dim that is not dim / n_heads together"),
        ({"qk_norm": True, "rope_scaling": LLAMA3}, "qk_norm and rope_scaling llama3 together"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate false has no key in GGUF"),
    ],
)
def test_models_that_llama_cpp_has_no_place_for(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.metadata_from_args(make(**keys))


def test_what_llama_cpp_will_do_otherwise_is_said(tmp_path: Path, capsys) -> None:
    write_checkpoint(tmp_path / "in", make())
    config = tmp_path / "in/tokenizer_config.json"
    said = json.loads(config.read_text())

    def notes(name: str) -> list[str]:
        capsys.readouterr()
        meta_to_gguf.main(src=str(tmp_path / "in"), dst=str(tmp_path / f"{name}.gguf"))
        return [line for line in capsys.readouterr().out.splitlines() if "llama.cpp" in line]

    assert notes("plain") == []
    (tmp_path / "in/template.json").write_text(json.dumps({"template": "alpaca", "sequences": {"alpaca": 3}}))
    (line,) = notes("alpaca")
    assert line.startswith("trained in the template alpaca; llama.cpp's chat asks in the chat template beside")
    del said["chat_template"]
    config.write_text(json.dumps(said))
    (line,) = notes("without")
    assert line.startswith("trained in the template alpaca; llama.cpp's chat asks in ChatML")
    record = {"template": "checkpoint", "chat_template": "{{ messages }}", "sequences": {"checkpoint": 3}}
    carried.write(record, tmp_path / "in")
    assert notes("jinja") == []
    for file in ("template.json", "chat_template.jinja"):
        (tmp_path / "in" / file).unlink()
    (line,) = notes("neither")
    assert line.startswith("no chat template: llama.cpp's chat asks in ChatML")
    config.write_text("{}")
    tokenizer = json.loads((tmp_path / "in/tokenizer.json").read_text())
    (tmp_path / "in/tokenizer.json").write_text(json.dumps(tokenizer | {"added_tokens": []}))
    with pytest.raises(ValueError, match="the tokenizer names no EOS, .* eos_token in a tokenizer_config.json beside"):
        notes("endless")
    assert not (tmp_path / "endless.gguf").exists()


def test_names_go_both_ways() -> None:
    for name in expected_shapes(make(attention_bias=True, mlp_bias=True, qk_norm=True), tied=False):
        assert layout.meta_name(layout.gguf_name(name)) == name
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)  # the library's own table, from Hugging Face's names
    for name in expected_shapes(make(qk_norm=True), tied=False):
        assert names.get_name(hf.hf_name(name), try_suffixes=(".weight",)) == layout.gguf_name(name)
    with pytest.raises(
        ValueError, match=r"layers\.0\.attention\.wq\.lora_a\.weight has no name in GGUF: run tools/merge"
    ):
        layout.gguf_name("layers.0.attention.wq.lora_a.weight")
