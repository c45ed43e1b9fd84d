"""Each kind of tokenizer against golden ids, and what all kinds promise alike. Real files where they are at hand."""

import base64
import hashlib
import json
import random
import shutil
import sys
import threading
from pathlib import Path

import pytest

from accessory.tokenizer import KNOWN_PAIRS, Tokenizer, llama3_parts

CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\nName three primary colours.\n\n### Response:The three primary colours are red, yellow and blue.",
    "def f(x):\n\treturn x ** 2  # twice :: the power",
    "Numbers 0 1 2 3 4 5 6 7 8 9, and 12345; (brackets) [too] {and these} <s> </s> <|eot_id|>!",
]
TRICKY = [
    "",
    " ",
    "\n",
    "a  b",
    " leading",
    "trailing ",
    "\r\n\ttab",
    "你好，世界 🙂",
    "👩‍👩‍👧é\u0301 ñ",
    "a\x00b",
    ":",
    "::",
    "{x}",
    "</s>",
]
KINDS = ("sentencepiece", "tiktoken", "hf")


def asset(*names: str) -> Path:
    """A file of the shared assets; the test is skipped where they are not there."""
    path = Path(__file__).parents[3].joinpath("shared", "assets", *names)
    if not path.exists():
        pytest.skip(f"no {path}")
    return path


def write_sentencepiece(directory: Path, **extra) -> Path:
    import sentencepiece

    options = {"vocab_size": 360, "model_type": "bpe", "character_coverage": 1.0, "byte_fallback": True}
    lossless = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **extra}
    corpus = iter([part for line in CORPUS for part in line.split("\n")] * 4)
    prefix = directory / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus, model_prefix=str(prefix), minloglevel=2, num_threads=1, **options, **lossless
    )
    return prefix.with_suffix(".model")


def write_tiktoken(directory: Path) -> Path:
    tokens = [bytes([b]) for b in range(256)] + [b"in", b"is", b"ion", b"on", b" t", b" th", b" the", b"::", b":\n"]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    path = directory / "tokenizer.model"
    path.write_bytes(b"".join(lines))
    return path


def write_hf(directory: Path, specials: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")) -> Path:
    from tokenizers import Tokenizer as HF
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = HF(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(CORPUS, trainer)
    path = directory / "tokenizer.json"
    model.save(str(path))
    return path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    make = {"sentencepiece": write_sentencepiece, "tiktoken": write_tiktoken, "hf": write_hf}
    return {kind: write(tmp_path_factory.mktemp(kind)) for kind, write in make.items()}


def random_text(rng: random.Random) -> str:
    pools = ("abc XYZ 019", "  \n\t", ".,:;#*(){}<>|/", "éüñß", "你好世界", "🙂👩‍👧🇫🇷", "\u0301\u200d\xa0")
    return "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(40)))


# --- what all kinds promise -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_decode_inverts_encode(files: dict[str, Path], kind: str) -> None:
    tokenizer, rng = Tokenizer.open(files[kind]), random.Random(0)
    for text in [*TRICKY, *CORPUS, *(random_text(rng) for _ in range(200))]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("kind", KINDS)
def test_bos_and_eos_are_put_once_and_have_no_text(files: dict[str, Path], kind: str) -> None:
    tokenizer = Tokenizer.open(files[kind])
    plain, both = tokenizer.encode("one two"), tokenizer.encode("one two", bos=True, eos=True)
    assert both == [tokenizer.bos_id, *plain, tokenizer.eos_id]
    assert tokenizer.decode(both) == "one two"
    assert tokenizer.eos_ids[0] == tokenizer.eos_id


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_a_text_are_text(files: dict[str, Path], kind: str) -> None:
    tokenizer = Tokenizer.open(files[kind])
    for text in ("<s>hi</s>", "<|begin_of_text|>hi<|eot_id|>", "<|im_start|>user\nhi<|im_end|>", "<|endoftext|>"):
        ids = tokenizer.encode(text)
        assert not set(ids) & {tokenizer.bos_id, *tokenizer.eos_ids}
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_adds_exactly_its_text(files: dict[str, Path], kind: str) -> None:
    tokenizer, rng = Tokenizer.open(files[kind]), random.Random(1)
    head = tokenizer.encode("### Response:", bos=True)
    for text in [*TRICKY, *(random_text(rng) for _ in range(100))]:
        ids = tokenizer.encode_continuation(text)
        assert tokenizer.decode(ids, after=head) == text
        assert tokenizer.decode([*head, *ids]) == "### Response:" + text


def test_sentencepiece_decodes_a_first_space_only_with_what_stood_before(files: dict[str, Path]) -> None:
    tokenizer = Tokenizer.open(files["sentencepiece"])
    ids = tokenizer.encode_continuation(" red")
    assert tokenizer.decode(ids) == "red" and tokenizer.decode(ids, after=tokenizer.encode("is:")) == " red"


@pytest.mark.parametrize("kind", KINDS)
def test_saved_copy_is_found_by_directory_and_is_the_same(files: dict[str, Path], kind: str, tmp_path: Path) -> None:
    renamed = tmp_path / "some.file"
    shutil.copyfile(files[kind], renamed)
    first = Tokenizer.open(renamed)
    assert first.kind == kind  # by content: the name says nothing
    saved = first.save(tmp_path / "run")
    second = Tokenizer.open(tmp_path / "run")
    assert saved.name == ("tokenizer.json" if kind == "hf" else "tokenizer.model")
    assert saved.read_bytes() == files[kind].read_bytes()
    assert second.save(tmp_path / "run") == saved  # onto itself: nothing happens
    for name in ("fingerprint", "vocab_size", "bos_id", "eos_id", "eos_ids", "pad_id", "add_bos"):
        assert getattr(first, name) == getattr(second, name), name


def test_fingerprints_differ_by_kind_and_by_pieces(files: dict[str, Path], tmp_path: Path) -> None:
    prints = {Tokenizer.open(files[kind]).fingerprint for kind in KINDS}
    other = Tokenizer.open(write_hf(tmp_path, ("<|endoftext|>", "<|im_end|>", "<|im_start|>"))).fingerprint
    assert len(prints | {other}) == 4 and all(len(p) == 64 for p in prints)
    renamed = Tokenizer.open(files["tiktoken"])
    renamed.kind = "hf"  # the same pieces, cut by other rules
    assert renamed.fingerprint not in prints


@pytest.mark.parametrize("kind", KINDS)
def test_threads_get_the_same_ids(files: dict[str, Path], kind: str) -> None:
    tokenizer, texts = Tokenizer.open(files[kind]), [f"{line} {i}" for i in range(30) for line in CORPUS]
    expected, got = [tokenizer.encode(t) for t in texts], {}
    threads = [
        threading.Thread(target=lambda n=n: got.update({n: [tokenizer.encode(t) for t in texts]})) for n in range(4)
    ]
    [t.start() for t in threads], [t.join() for t in threads]
    assert [got[n] for n in range(4)] == [expected] * 4


# --- finding and refusing ---------------------------------------------------------------------------------------------


def test_a_directory_with_both_gives_the_model_file(files: dict[str, Path], tmp_path: Path) -> None:
    shutil.copyfile(files["hf"], tmp_path / "tokenizer.json")
    assert Tokenizer.open(tmp_path).kind == "hf"
    shutil.copyfile(files["tiktoken"], tmp_path / "tokenizer.model")
    assert Tokenizer.open(str(tmp_path)).kind == "tiktoken"


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "no complete tokenizer file|holds no tokens"),
        (b"hello world, no tokenizer at all", "no complete tokenizer file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b'{"version": "1.0"', "not a complete tokenizer.json"),
        (b'{"dim": 64}', "not a complete tokenizer.json"),
        (b"IQ== 0\nIg== one\n", ":2: not a line"),
        (b"IQ== 0\nIg=x 1\n", ":2: not a line"),
        (b"IQ== 0\nIg== 1\nIw== 3\n", "rank 2 is missing"),
        (b"IQ== 0\nIg== 1\n", "a single byte is missing"),
    ],
)
def test_what_is_no_tokenizer_is_refused_by_name(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        Tokenizer.open(tmp_path)
    assert str(tmp_path / "tokenizer.model") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_refused(files: dict[str, Path], kind: str, tmp_path: Path) -> None:
    raw = files[kind].read_bytes()
    (tmp_path / "t").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match="copy the file again"):
        Tokenizer.open(tmp_path / "t")


def test_a_path_without_a_tokenizer_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--tokenizer_path .*no tokenizer.model or tokenizer.json"):
        Tokenizer.open(tmp_path)
    with pytest.raises(ValueError, match="--tokenizer_path .*no such file"):
        Tokenizer.open(tmp_path / "absent")
    with open(tmp_path / "consolidated.00.pth", "wb") as file:
        file.truncate(2**29)  # sparse
    with pytest.raises(ValueError, match="too large for a tokenizer"):
        Tokenizer.open(tmp_path / "consolidated.00.pth")


def test_an_absent_library_is_named(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ValueError, match="pip install tiktoken"):
        Tokenizer.open(files["tiktoken"])


# --- sentencepiece ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder, name",
    [
        ("tok_llama", "tokenizer.model"),
        ("tok_mistral", "tokenizer.model.v1"),
        ("tok_chinese", "merged_tokenizer.model"),
    ],
)
def test_real_sentencepiece_golden_ids(folder: str, name: str) -> None:
    golden = json.loads(asset(folder, "golden.json").read_text())
    tokenizer = Tokenizer.open(asset(folder, name))
    assert (tokenizer.kind, tokenizer.vocab_size) == ("sentencepiece", golden["vocab"])
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids, tokenizer.pad_id) == (1, 2, (2,), None)
    assert tokenizer.add_bos
    for item in golden["items"]:
        assert tokenizer.encode(item["text"]) == item["ids"]
        assert tokenizer.decode(item["ids"]) == item["decode"]


def test_llama_continuation_is_the_joint_tokenisation() -> None:
    tokenizer = Tokenizer.open(asset("tok_llama", "tokenizer.model"))
    assert tokenizer.encode("### Response:Hello") == [
        *tokenizer.encode("### Response:"),
        10994,
    ]  # 'Hello', not '▁Hello'
    assert tokenizer.encode_continuation("Hello") == [10994] and tokenizer.encode("Hello") == [15043]


def test_add_bos_token_beside_a_sentencepiece_model_wins(files: dict[str, Path], tmp_path: Path) -> None:
    shutil.copyfile(files["sentencepiece"], tmp_path / "tokenizer.model")
    assert Tokenizer.open(tmp_path).add_bos
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert not Tokenizer.open(tmp_path).add_bos
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": ')
    with pytest.raises(ValueError, match="tokenizer_config.json: not JSON"):
        Tokenizer.open(tmp_path)


def test_a_continuation_where_newlines_are_normalised_away(tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    tokenizer = Tokenizer.open(path)
    assert tokenizer.encode("\n") == []
    head, ids = tokenizer.encode("task:"), tokenizer.encode_continuation("Write")
    assert tokenizer.decode([*head, *ids]) == "task:Write" and ids != tokenizer.encode("Write")


# --- Llama 3 ----------------------------------------------------------------------------------------------------------

LLAMA3_GOLDEN = {  # by llama-models 0.3.0
    "Hello world! 12345  double  space\n你好，世界 🙂": [
        *(9906, 1917, 0, 220, 4513, 1774, 220, 2033, 220, 3634, 198, 57668, 53901, 3922, 102616, 28584)
    ],
    "The capital of France is": [791, 6864, 315, 9822, 374],
    "def f(x):\n\treturn x**2\n": [755, 282, 2120, 997, 862, 865, 334, 17, 198],
    "   leading spaces": [256, 6522, 12908],
    "I'm you're WE'LL": [40, 2846, 499, 2351, 20255, 6, 4178],
    "<|eot_id|>": [27, 91, 68, 354, 851, 91, 29],
}


def test_real_llama3_golden_ids_and_special_tokens() -> None:
    tokenizer = Tokenizer.open(asset("tok_llama3"))
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.add_bos) == ("tiktoken", 128256, True)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (128000, 128001, 128004)
    assert tokenizer.eos_ids == (128001, 128008, 128009)
    special = tokenizer.special_tokens
    assert (special["<|image|>"], special["<|reserved_special_token_2|>"]) == (128011, 128012)
    assert special["<|reserved_special_token_245|>"] == 128255 and len(special) == 256
    for text, ids in LLAMA3_GOLDEN.items():
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text


def test_real_llama3_long_text_is_cut_as_meta_cuts_it() -> None:
    tokenizer = Tokenizer.open(asset("tok_llama3"))
    text = "x" * 60_000 + " " * 30_000 + "ab " * 200_000
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert len(ids) == 207_740
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    assert digest == "610a96be0887844bec0587e69addbc2ed1681e3f926c4b97027a4f69eed5d766"  # by llama-models 0.3.0
    assert tokenizer.decode(ids) == text


def test_llama3_parts_by_hand() -> None:
    assert list(llama3_parts("short")) == ["short"] and "".join(llama3_parts("")) == ""
    assert [len(p) for p in llama3_parts("x" * 25_000 + " ")] == [25_001]
    assert [len(p) for p in llama3_parts("x" * 25_001)] == [25_000, 1]
    assert [len(p) for p in llama3_parts("a b" + "x" * 50_000)] == [25_002, 25_000, 1]
    assert [len(p) for p in llama3_parts("a b " * 100_001)] == [400_000, 4]


# --- tokenizer.json ---------------------------------------------------------------------------------------------------


def test_real_smollm2() -> None:
    expected = json.loads(asset("smollm2-135m", "expected.json").read_text())
    tokenizer = Tokenizer.open(asset("smollm2-135m"))
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.add_bos) == ("hf", 49152, False)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (1, 2, (2,))
    assert tokenizer.encode(expected["paragraph"]) == expected["paragraph_ids"]
    for prompt in expected["prompts"]:
        assert tokenizer.encode(prompt["text"]) == prompt["ids"]
        assert tokenizer.decode(prompt["greedy16"], after=prompt["ids"]) == prompt["greedy16_text"]
    rng = random.Random(2)
    for text in [*TRICKY, *(random_text(rng) for _ in range(200))]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def with_bos_post_processor(path: Path, token: str) -> None:
    from tokenizers import Tokenizer as HF
    from tokenizers.processors import TemplateProcessing

    model = HF.from_file(str(path))
    model.post_processor = TemplateProcessing(f"{token} $A", special_tokens=[(token, model.token_to_id(token))])
    model.enable_padding(length=16)
    model.enable_truncation(4)
    model.save(str(path))


def test_a_post_processor_says_add_bos_and_does_not_add_it(tmp_path: Path) -> None:
    path = write_hf(tmp_path, ("<pad>", "<s>", "</s>"))
    assert not Tokenizer.open(path).add_bos
    with_bos_post_processor(path, "<s>")
    tokenizer = Tokenizer.open(path)
    assert tokenizer.add_bos and (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    ids = tokenizer.encode(CORPUS[0], bos=tokenizer.add_bos)
    assert ids.count(1) == 1 and ids[0] == 1 and ids[1] != 1
    assert tokenizer.decode(ids) == CORPUS[0]  # the file's truncation and padding are not applied either
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert not Tokenizer.open(path).add_bos


def test_a_post_processor_with_a_bos_of_its_own_name(tmp_path: Path) -> None:
    path = write_hf(tmp_path, ("[START]", "[END]"))
    tokenizer = Tokenizer.open(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids, tokenizer.add_bos) == (None, None, (), False)
    with pytest.raises(ValueError, match="names no EOS token: put its tokenizer_config.json beside it"):
        tokenizer.encode("x", eos=True)
    with_bos_post_processor(path, "[START]")
    assert Tokenizer.open(path).bos_id == 0 and Tokenizer.open(path).eos_id is None
    (tmp_path / "config.json").write_text('{"eos_token_id": 1, "bos_token_id": null}')
    assert (Tokenizer.open(path).bos_id, Tokenizer.open(path).eos_id) == (0, 1)


@pytest.mark.parametrize("pair", KNOWN_PAIRS)
def test_known_pairs(tmp_path: Path, pair: tuple[str, str]) -> None:
    names = tuple(dict.fromkeys(["<unk>", *pair]))
    tokenizer = Tokenizer.open(write_hf(tmp_path, names))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (names.index(pair[0]), names.index(pair[1]))


def test_the_base_pair_comes_before_chatml_but_both_stop(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_hf(tmp_path, ("<|im_start|>", "<|im_end|>", "<s>", "</s>")))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (2, 3, (3, 1))


def test_files_beside_a_tokenizer_json_name_its_special_tokens(tmp_path: Path) -> None:
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<pad>")
    path = write_hf(tmp_path, names)
    assert Tokenizer.open(path).eos_ids == (1, 2, 3)
    config = {"eos_token": {"content": "<|eot_id|>", "lstrip": False}, "pad_token": "<pad>", "bos_token": names[0]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 3, 999999], "bos_token_id": 2}')
    tokenizer = Tokenizer.open(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.eos_ids) == (0, 3, 4, (3, 1, 2))
    tokenizer.save(tmp_path / "copy")
    assert Tokenizer.open(tmp_path / "copy").eos_ids == (3, 1, 2)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.open(path).bos_id == 2 and Tokenizer.open(path).eos_id == 1
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<|begin_of_text|>", "eos_token": "<|eom_id|>"}')
    assert Tokenizer.open(path).bos_id == 0 and Tokenizer.open(path).eos_id == 2
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|eot_id|>"}')  # the strongest of them
    assert Tokenizer.open(path).bos_id == 0 and Tokenizer.open(path).eos_id == 3


def test_no_bos_by_configuration_stays_no_bos(tmp_path: Path) -> None:
    path = write_hf(tmp_path)  # has <|im_start|>
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "<|endoftext|>"}')
    tokenizer = Tokenizer.open(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (None, 0, False)


def test_metaspace_tokenizer_json_is_exact_as_a_continuation(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as HF
    from tokenizers import decoders, models, normalizers, trainers

    model = HF(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )  # as transformers converts Llama 2's
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    model.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False))
    content = json.loads(model.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # the bytes are ordinary pieces
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer.open(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    head, rng = tokenizer.encode("is:"), random.Random(3)
    for text in ["red", " red", *(random_text(rng) for _ in range(100))]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode_continuation(text), after=head) == text


# --- special tokens ---------------------------------------------------------------------------------------------------

NEW = ("<START_Q>", "<END_Q>", "<START_A>", "<END_A>")  # tokens.json of Ray's fine-tuning template


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_are_atomic_and_old_ids_stay(files: dict[str, Path], kind: str) -> None:
    base = Tokenizer.open(files[kind])
    size, grown = base.vocab_size, base.with_special_tokens(NEW)
    assert grown.vocab_size == size + 4 and base.vocab_size == size  # the base is not touched
    assert [grown.special_tokens[name] for name in NEW] == [size, size + 1, size + 2, size + 3]
    ids = grown.encode_with_specials("<START_Q>hi<END_Q>")
    assert ids == [size, *base.encode("hi"), size + 1]
    assert grown.decode_with_specials(ids) == "<START_Q>hi<END_Q>" and grown.decode(ids) == "hi"
    assert grown.encode("<START_Q>hi<END_Q>") == base.encode("<START_Q>hi<END_Q>")  # typed by a user: plain text
    assert grown.tokens() == base.tokens() + [name.encode() for name in NEW]
    assert grown.with_special_tokens(NEW[:2]).fingerprint == grown.fingerprint != base.fingerprint
    rng = random.Random(5)
    for text in [*TRICKY, *CORPUS, *(random_text(rng) for _ in range(100))]:
        for spacing in ("legacy", "plain"):
            marked = f"<START_Q>{text}<END_Q><START_A>{text}"
            assert grown.decode_with_specials(grown.encode_with_specials(marked, spacing), spacing) == marked
        assert grown.encode(text) == base.encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_are_saved_and_opened_again(files: dict[str, Path], kind: str, tmp_path: Path) -> None:
    grown = Tokenizer.open(files[kind]).with_special_tokens(["<|im_end|>", *NEW])
    grown.save(tmp_path / "run")
    again = Tokenizer.open(tmp_path / "run")
    again.save(tmp_path / "copy")
    for other in (again, Tokenizer.open(tmp_path / "copy")):
        assert other.fingerprint == grown.fingerprint and other.special_tokens == grown.special_tokens
        assert other.vocab_size == grown.vocab_size and other.eos_ids == grown.eos_ids
        assert other.encode_with_specials("<END_A>a<|im_end|>") == grown.encode_with_specials("<END_A>a<|im_end|>")
    assert grown.special_tokens["<|im_end|>"] in grown.eos_ids  # ends an answer, wherever it came from
    later = again.with_special_tokens(["<MORE>"])
    assert later.special_tokens["<MORE>"] == grown.vocab_size


def test_both_spacings_after_a_special_token(files: dict[str, Path]) -> None:
    tokenizer = Tokenizer.open(files["sentencepiece"]).with_special_tokens(["<A>"])
    a, hi, bare = tokenizer.special_tokens["<A>"], tokenizer.encode("is"), tokenizer.encode_continuation("is")
    assert hi != bare
    assert tokenizer.encode_with_specials("<A>is", "legacy") == [a, *hi]
    assert tokenizer.encode_with_specials("<A>is", "plain") == [a, *bare]
    assert tokenizer.encode_with_specials("is<A>is", "plain") == [*hi, a, *bare]
    assert tokenizer.encode_with_specials("<A>is", "legacy", bos=True, eos=True) == [1, a, *hi, 2]
    assert tokenizer.encode_with_specials("<s><A></s>") == [1, a, 2]
    longer = tokenizer.with_special_tokens(["<A><B>", "<A"])  # the longest name at a place wins
    a, ab, start = (longer.special_tokens[name] for name in ("<A>", "<A><B>", "<A"))
    assert longer.encode_with_specials("<A><B><A><A") == [ab, a, start]
    with pytest.raises(ValueError, match="spacing 'new': choose one of legacy, plain"):
        tokenizer.encode_with_specials("a", "new")


def test_the_configuration_says_the_spacing(files: dict[str, Path], tmp_path: Path) -> None:
    Tokenizer.open(files["sentencepiece"]).with_special_tokens(["<A>"]).save(tmp_path)
    assert Tokenizer.open(tmp_path).spacing == "legacy"
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.spacing == "plain"
    assert tokenizer.encode_with_specials("<A>is") == tokenizer.encode_with_specials("<A>is", "plain")


def test_hugging_faces_files_name_added_tokens(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    shutil.copyfile(files["sentencepiece"], path)
    size = Tokenizer.open(path).vocab_size
    decoder = {"1": {"content": "<s>"}, str(size): {"content": "[PAD]", "special": True, "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, "pad_token": "[PAD]"}))
    tokenizer = Tokenizer.open(path)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.added_tokens) == (size + 1, size, {"[PAD]": size})
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<A>": size + 1}))
    tokenizer = Tokenizer.open(path)
    assert tokenizer.encode_with_specials("<A>[PAD]") == [size + 1, size]
    assert tokenizer.decode([size, *tokenizer.encode("is"), size + 1]) == "is"


def test_transformers_reads_what_is_saved(tmp_path: Path) -> None:
    from transformers import LlamaTokenizer

    tokenizer = Tokenizer.open(asset("tok_llama", "tokenizer.model")).with_special_tokens(NEW)
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == {name: 32000 + i for i, name in enumerate(NEW)}
    reference = LlamaTokenizer.from_pretrained(str(tmp_path), legacy=True)
    text = "<START_Q>How many?<END_Q><START_A>Two<END_A>"
    assert tokenizer.encode_with_specials(text, "legacy") == reference(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("added_tokens.json", "[1]", "added_tokens.json: not a JSON object"),
        ("added_tokens.json", '{"<A>": "x"}', "'<A>': 'x' is not the id of a token"),
        ("added_tokens.json", '{"<A>": -1}', "'<A>': -1 is not the id of a token"),
        ("added_tokens.json", '{"<A>": 99999999999}', "is not the id of a token"),
        ("added_tokens.json", '{"<A>": 5}', "id 5 is '<0x02>' here and '<A>' in added_tokens.json"),
        ("added_tokens.json", '{"<A>": 400, "<B>": 400}', "id 400 has two names"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "<A>"}}}', "added_tokens_decoder is not"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"400": "<A>"}}', "added_tokens_decoder is not"),
    ],
)
def test_wrong_added_tokens_are_refused(files: dict, tmp_path: Path, name: str, content: str, said: str) -> None:
    shutil.copyfile(files["sentencepiece"], tmp_path / "tokenizer.model")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said) as error:
        Tokenizer.open(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_placeholder_of_the_file_takes_the_added_name(tmp_path: Path) -> None:
    """InternLM2's and Yi's way: the model's own piece keeps an id free, Hugging Face's files name it."""
    write_sentencepiece(tmp_path, user_defined_symbols=["[UNUSED_TOKEN_141]", "<|reserved_3|>"])
    size = Tokenizer.open(tmp_path).vocab_size
    (tmp_path / "tokenizer_config.json").write_text(
        '{"added_tokens_decoder": {"3": {"content": "<|plugin|>"}, "4": {"content": "<|im_end|>"}}}'
    )
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.vocab_size == size and tokenizer.encode_with_specials("<|plugin|><|im_end|>") == [3, 4]
    assert 4 in tokenizer.eos_ids and tokenizer.decode([3, *tokenizer.encode("is"), 4]) == "is"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token", ["", " ", " <A>", "<A>\n", 7])
def test_a_special_token_is_a_name(files: dict[str, Path], kind: str, token: str) -> None:
    with pytest.raises(ValueError, match="special token .*: expected a text without spaces around it"):
        Tokenizer.open(files[kind]).with_special_tokens([token])


def test_a_piece_of_the_vocabulary_becomes_special_where_it_is(files: dict[str, Path]) -> None:
    for kind in ("sentencepiece", "hf"):
        base = Tokenizer.open(files[kind])
        [piece] = [p for p in base.tokens() if p.decode(errors="replace") == "re"]
        tokenizer = base.with_special_tokens(["re"])
        assert tokenizer.vocab_size == base.vocab_size
        assert tokenizer.special_tokens["re"] == base.tokens().index(piece)


def test_llama3_and_its_tokenizer_json_have_the_same_tokens() -> None:
    from accessory.data.bpe import llama3_content
    from accessory.tokenizer import HuggingFace

    base = Tokenizer.open(asset("tok_llama3", "tokenizer.model"))
    other = HuggingFace(base.path, json.dumps(llama3_content(base)).encode())
    assert other.tokens() == base.tokens() and other.fingerprint != base.fingerprint
    assert (other.bos_id, other.eos_ids, other.add_bos) == (base.bos_id, base.eos_ids, base.add_bos)
    rng = random.Random(6)
    for text in [*TRICKY, *CORPUS, *LLAMA3_GOLDEN, *(random_text(rng) for _ in range(300))]:
        assert other.encode(text) == base.encode(text) and other.decode(other.encode(text)) == text
