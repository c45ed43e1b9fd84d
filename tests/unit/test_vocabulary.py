"""Vocabularies trained, merged and grown: the two published merges to the byte, sentencepiece's own protobuf as reference,
and BPE held against its definition (every pair counted again for every merge)."""

import gzip
import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.data import bpe, merging, vocabulary
from accessory.tokenizer import SentencePiece, Tokenizer
from tests.helpers import assets, tiny_tokenizer
from tools import merge_tokenizer, train_tokenizer

TEXT = [
    "Le chat dort sur le tapis rouge.",
    "La chatte boit le lait, puis le chat dort.",
    "人工智能改变世界。人工智能是什么？",
    "def f(x):\n\treturn x ** 2",
    "123 456 789, and 123 again; 🙂🙂",
] * 4
ENGLISH = ["grass is green, the sky is blue and snow is white", "What colour is the grass? Tell me: it is green."] * 6


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("base") / "tokenizer.model"
    path.write_bytes(vocabulary.train(ENGLISH, 320))
    return Tokenizer.open(path)


def sentencepiece_of(directory: Path, pieces: Sequence[tuple[str, float, int]]) -> Tokenizer:
    """A model of exactly these (piece, score, type), by sentencepiece's own protobuf."""
    from sentencepiece import sentencepiece_model_pb2 as pb2

    proto = pb2.ModelProto.FromString(tiny_tokenizer())
    del proto.pieces[:]
    proto.trainer_spec.byte_fallback = False
    for piece, score, kind in pieces:
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.vocab_size = len(pieces)
    path = directory / f"{hashlib.sha256(repr(pieces).encode()).hexdigest()[:8]}.model"
    path.write_bytes(proto.SerializeToString())
    return Tokenizer.open(path)


def proto_of(raw: bytes):
    from sentencepiece import sentencepiece_model_pb2 as pb2

    return pb2.ModelProto.FromString(raw)


# --- merging sentencepiece --------------------------------------------------------------------------------------------

CLA_TEXT = """白日依山尽，黄河入海流。欲穷千里目，更上一层楼。
The primary use of LLaMA is research on large language models, including"""
MINIMA_TEXT = (
    "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。Let's democratize large language models! 101+102=203. "
    "Bravo, Assistant!"
)
MINIMA_TRASH = "...... )、 ?< :< QQ iPhone NBA HK !< )< ◆ formula CEO GDP MV VR -{ SUV Vi CPU mg".split()


def llama_and_chinese() -> tuple[Tokenizer, Tokenizer]:
    return Tokenizer.open(assets("tok_llama", "tokenizer.model")), Tokenizer.open(
        assets("tok_chinese", "chinese_sp.model")
    )


def test_append_is_the_published_49953() -> None:
    llama, chinese = llama_and_chinese()
    merged = merging.merge(llama, chinese, "append")
    digest = hashlib.sha256(merged.model).hexdigest()  # in Chinese-LLaMA-Alpaca's SHA256.md
    assert digest == "e2676d4ca29ca1750f6ff203328d73b189321dc5776ceede037cbd36541d70c0"
    assert (len(merged.added), merged.known, merged.left_out) == (17953, 2047, [])
    assert merged.added[:6] == ["但", "一个", "中国", "可以", "10", "着"]
    tokenizer = SentencePiece(llama.path, merged.model)
    assert tokenizer.vocab_size == 49953 and (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert (len(llama.encode(CLA_TEXT)), len(tokenizer.encode(CLA_TEXT))) == (53, 37)
    assert tokenizer.decode(tokenizer.encode(CLA_TEXT)) == CLA_TEXT
    assert len(tokenizer.encode("10")) < len(llama.encode("10"))  # what score 0 does to old text
    vocabulary.check_extension(llama, tokenizer)


def test_scored_is_the_published_49216() -> None:
    llama, chinese = llama_and_chinese()
    merged = merging.merge(llama, chinese, "scored")
    tokenizer = SentencePiece(llama.path, merged.model)
    assert tokenizer.vocab_size == 49216 and len(merged.added) == 17195 + 21
    assert merged.added[-21:] == MINIMA_TRASH
    assert sum(any(c.isdigit() for c in piece) for piece in merged.left_out) == 578
    scores = [tokenizer.model.get_score(i) for i in range(32000, 49216)]
    assert scores == [-31740.0 - 1 - i for i in range(17216)] and scores[-1] == -48956
    pieces = [tokenizer.model.id_to_piece(i) for i in tokenizer.encode(MINIMA_TEXT)]  # printed in MiniMA's source
    assert " ".join(pieces) == (
        "▁白 日 依 山 尽 ， 黄河 入 海 流 。 欲 穷 千里 目 ， 更 上 一层 楼 。 Let ' s ▁dem ocrat ize ▁large ▁language ▁models ! ▁ "
        "1 0 1 + 1 0 2 = 2 0 3 . ▁Bra vo , ▁Ass istant !"
    )
    english = assets("text_en", "tinyshakespeare.txt").read_text()[:20000]
    assert tokenizer.encode(english) == llama.encode(english)


def test_the_merged_file_is_what_protobuf_writes(base: Tokenizer, tmp_path: Path) -> None:
    extra = sentencepiece_of(
        tmp_path, [("<unk>", 0, 2), ("<s>", 0, 3), ("▁i", -1, 1), ("chat", -2, 1), ("人" * 70, -3, 1)]
    )
    merged = merging.merge(base, extra)
    proto = proto_of(base.raw)
    for piece in ("chat", "人" * 70):
        proto.pieces.add(piece=piece, score=0.0)
    assert merged.model == proto.SerializeToString() and merged.known == 3
    assert proto_of(merged.model).trainer_spec == proto_of(base.raw).trainer_spec


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6), max_size=20, unique=True
    )
)
def test_append_keeps_ids_and_order(
    base: Tokenizer, tmp_path_factory: pytest.TempPathFactory, words: list[str]
) -> None:
    """Row 1 of the table: the base's pieces, then those of the extra that it lacks, scores 0, text still exact."""
    known = [base.model.id_to_piece(i) for i in range(base.vocab_size)]
    dups = [known[i] for i in (300, 270, 280, 290, 265)]
    fresh = [word for word in words if word not in known]
    pieces = [("<unk>", 0.0, 2)] + [(p, -1.0 - i, 1) for i, p in enumerate([*dups, *fresh])]
    extra = sentencepiece_of(tmp_path_factory.mktemp("extra"), pieces)
    if not fresh:
        with pytest.raises(ValueError, match="has no piece that --rule append adds"):
            merging.merge(base, extra)
        return
    merged = merging.merge(base, extra)
    tokenizer = SentencePiece(base.path, merged.model)
    assert merged.added == fresh and merged.known == 6
    assert [tokenizer.model.id_to_piece(i) for i in range(tokenizer.vocab_size)] == known + fresh
    assert all(tokenizer.model.get_score(i) == 0 for i in range(len(known), tokenizer.vocab_size))
    for text in ("grass is green", "".join(fresh), " ".join(fresh)):
        assert tokenizer.decode(tokenizer.encode(text)) == base.decode(base.encode(text))
    assert not set(merging.unreachable(tokenizer, merged.added)) - set(fresh)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.lists(st.text("中文字。ab1②xyz", min_size=1, max_size=3), max_size=120, unique=True))
def test_scored_fills_to_a_multiple_of_64(size: int, new: list[str]) -> None:
    taken, left = merging.chinese_and_fill(new, size)
    chinese = [p for p in new if any("\u4e00" <= c <= "\u9fa5" or c == "。" for c in p)]
    spare = [p for p in new if p not in chinese and not any(c.isdigit() for c in p)]
    assert taken[: len(chinese)] == chinese and sorted(taken + left) == sorted(new)
    n = size + len(chinese)
    assert taken[len(chinese) :] == spare[: (n // 64 + 1) * 64 - n]  # MiniMA's formula


def test_scored_adds_64_where_the_size_divides_already() -> None:
    taken, left = merging.chinese_and_fill(["中", *(f"x{'y' * i}" for i in range(100)), "9"], 63)
    assert len(taken) == 1 + 64 and len(left) == 37


def test_merging_refuses_by_name(base: Tokenizer, tmp_path: Path) -> None:
    digits = sentencepiece_of(tmp_path, [("<unk>", 0, 2), ("77", -1, 1), ("abc", -2, 1)])
    with pytest.raises(ValueError, match="--rule best: choose one of append, scored"):
        merging.merge(base, digits, "best")
    with pytest.raises(ValueError, match="has no piece that --rule scored adds"):
        merging.merge(base, digits, "scored")
    with pytest.raises(ValueError, match="<A> as an added token, whose id a new piece would take"):
        merging.merge(base.with_special_tokens(["<A>"]), digits)
    for cut in (len(base.raw) - 1, len(base.raw) // 2, 3):
        with pytest.raises(ValueError, match="no complete sentencepiece model"):
            merging.with_pieces(base.raw[:cut], [], "x.model")
    hf = Tokenizer.open(hf_file(tmp_path))
    for pair in ((hf, digits), (base, hf)):
        with pytest.raises(ValueError, match="is a hf tokenizer, not sentencepiece: .*--src TEXT"):
            merging.merge(*pair)


# --- byte-level BPE ---------------------------------------------------------------------------------------------------


def hf_file(directory: Path, vocab_size: int = 300, ignore_merges: bool = False) -> Path:
    from tokenizers import Tokenizer as HF
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = HF(models.BPE(ignore_merges=ignore_merges))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(["the cat sat on the mat, that is all there is"] * 3, trainer)
    model.add_special_tokens(["<|endoftext|>"])  # behind the vocabulary, as in Llama 3's and Qwen's
    model.save(str(directory / "tokenizer.json"))
    return directory / "tokenizer.json"


def naive_merges(words: dict[tuple[int, ...], int], names: list[str], number: int) -> list[tuple[int, int]]:
    """BPE by its definition: every pair counted anew for every merge."""
    words, names, merges = dict(words), list(names), []
    while len(merges) < number:
        counts: Counter[tuple[int, int]] = Counter()
        for ids, n in words.items():
            for pair in pairwise(ids):
                counts[pair] += n
        allowed = {p: n for p, n in counts.items() if n >= 2 and names[p[0]] + names[p[1]] not in names}
        if not allowed:
            break
        a, b = min(allowed, key=lambda p: (-allowed[p], p))
        merges.append((a, b))
        names.append(names[a] + names[b])
        merged: Counter[tuple[int, ...]] = Counter()
        for ids, n in words.items():
            out, i = [], 0
            while i < len(ids):
                hit = ids[i : i + 2] == (a, b)
                out.append(len(names) - 1 if hit else ids[i])
                i += 1 + hit
            merged[tuple(out)] += n
        words = merged
    return merges


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text("abc", min_size=1, max_size=12), st.integers(1, 9), max_size=12), st.integers(1, 12))
def test_merges_are_those_of_the_definition(texts: dict[str, int], number: int) -> None:
    words = {tuple("abc".index(c) for c in text): n for text, n in texts.items()}
    names = ["a", "b", "c"]
    assert bpe.learn([list(w) for w in words], list(words.values()), names, number) == naive_merges(
        words, ["a", "b", "c"], number
    )
    assert len(names) == len(set(names))


def test_a_pair_whose_text_is_a_token_is_passed_over() -> None:
    names = ["a", "b", "c", "bc"]
    assert bpe.learn([[0, 1, 2], [0, 3], [3, 0]], [9, 4, 3], names, 9) == [(0, 1), (4, 2), (3, 0)]
    assert names[4:] == ["ab", "abc", "bca"]


def test_merges_are_those_of_the_tokenizers_library() -> None:
    """From single characters on, where the library trains too. Its ties go to the smaller pair as well."""
    from tokenizers import Tokenizer as HF
    from tokenizers import models, pre_tokenizers, trainers

    rng = random.Random(0)
    text = " ".join("".join(rng.choices("abcde", (9, 5, 3, 2, 1), k=rng.randrange(1, 9))) for _ in range(3000))
    model = HF(models.BPE())
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.train_from_iterator([text], trainers.BpeTrainer(vocab_size=65, show_progress=False))
    expected = [tuple(m) for m in json.loads(model.to_str())["model"]["merges"]]
    words, names = Counter(text.split()), list("abcde")
    merges = bpe.learn([["abcde".index(c) for c in w] for w in words], list(words.values()), names, 60)
    assert len(expected) > 50
    got = [(names[a], names[b]) for a, b in merges]
    assert got[:40] == expected[:40]


def halved(tokenizer: Tokenizer, merges: list[tuple[int, int]], first: int, ids: list[int]) -> list[int]:
    out = []
    for i in ids:
        out += [i] if i < first else halved(tokenizer, merges, first, list(merges[i - first]))
    return out


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_a_grown_bpe_cuts_as_its_base_and_then_joins(tmp_path: Path, ignore_merges: bool) -> None:
    base = Tokenizer.open(hf_file(tmp_path, ignore_merges=ignore_merges))
    grown = bpe.grow(base, TEXT, 40)
    assert grown.vocab_size == base.vocab_size + 40
    assert grown.tokens()[: base.vocab_size] == base.tokens()
    content = json.loads(grown.raw)
    vocab, new = content["model"]["vocab"], content["model"]["merges"][-40:]
    merges = [(vocab[a], vocab[b]) for a, b in new]
    assert len(json.loads(base.raw)["model"]["merges"]) + 40 == len(content["model"]["merges"])
    rng = random.Random(1)
    unseen = ["".join(rng.choices("chat le 人工智能 rouge.\n🙂12", k=30)) for _ in range(200)]
    for text in [*TEXT, *unseen, "the cat sat on the mat"]:
        ids = grown.encode(text)
        assert grown.decode(ids) == text
        assert halved(grown, merges, base.vocab_size, ids) == base.encode(text)
    assert sum(len(grown.encode(t)) for t in TEXT) < sum(len(base.encode(t)) for t in TEXT)
    assert grown.encode("the mat") == base.encode("the mat")  # no new merge in it
    assert grown.special_tokens == base.special_tokens and grown.eos_id == base.eos_id
    assert grown.encode_with_specials("a<|endoftext|>")[-1] == base.special_tokens["<|endoftext|>"]
    assert grown.with_special_tokens(["<A>"]).special_tokens["<A>"] == grown.vocab_size


def test_grown_llama3_keeps_its_256_special_tokens(tmp_path: Path) -> None:
    base = Tokenizer.open(assets("tok_llama3", "tokenizer.model"))
    grown = bpe.grow(base, ["霜葉紅於二月花，霜葉紅於二月花。 -@-@ <@,@>"] * 3, 12)
    assert (base.vocab_size, grown.vocab_size) == (128256, 128268)
    assert grown.tokens()[:128256] == base.tokens()
    assert (grown.bos_id, grown.eos_ids, grown.add_bos) == (128000, (128001, 128008, 128009), True)
    grown.save(tmp_path)
    again = Tokenizer.open(tmp_path)
    assert again.kind == "hf" and again.fingerprint == grown.fingerprint
    assert again.decode(again.encode("霜葉紅於二月花")) == "霜葉紅於二月花"
    assert len(again.encode("霜葉紅於二月花")) < len(base.encode("霜葉紅於二月花"))
    for text in CLA_TEXT, MINIMA_TEXT, "def f(x):\n\treturn x**2\n", "<|eot_id|>":
        assert again.encode(text) == base.encode(text)


def test_merges_of_ranks_by_hand() -> None:
    ranks = {b"a": 0, b"b": 1, b"ab": 2, b"ba": 3, b"aba": 4}
    assert bpe.merges_of_ranks(ranks) == [(b"a", b"b"), (b"b", b"a"), (b"a", b"ba"), (b"ab", b"a")]


def test_growing_refuses_by_name(base: Tokenizer, tmp_path: Path) -> None:
    hf = Tokenizer.open(hf_file(tmp_path))
    with pytest.raises(ValueError, match="is a sentencepiece model, which takes no merges from text"):
        bpe.grow(base, TEXT, 3)
    with pytest.raises(ValueError, match="--src holds no text"):
        bpe.grow(hf, [], 3)
    with pytest.raises(ValueError, match="no pair of tokens occurs twice"):
        bpe.grow(hf, ["zqx"], 3)
    content = json.loads(hf.raw)
    for change, said in (
        ({"decoder": None, "pre_tokenizer": {"type": "Whitespace"}}, "its BPE is not byte-level"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "a WordLevel tokenizer"),
    ):
        path = tmp_path / "other.json"
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=said):
            bpe.grow(Tokenizer.open(path), TEXT, 3)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_trained_model_is_of_llamas_kind(model_type: str, tmp_path: Path) -> None:
    model = vocabulary.train(TEXT, 315, model_type)
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer, spec = Tokenizer.open(tmp_path), proto_of(model).trainer_spec
    assert tokenizer.vocab_size == 315 and spec.model_type == {"unigram": 1, "bpe": 2}[model_type]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None) and tokenizer._piece(0) == "<unk>"
    assert spec.byte_fallback and spec.split_digits and proto_of(model).normalizer_spec.name == "identity"
    for text in [*TEXT, "  two  spaces ", "unseen ж and 龘", "٣"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    digits = [tokenizer.model.id_to_piece(i) for i in tokenizer.encode("x123456")]
    assert digits[-6:] == list("123456")


def test_training_takes_text_as_it_comes() -> None:
    lines = iter(["abc " * 3000])  # longer than the trainer takes: cut, not left out
    assert [len(s) for s in vocabulary.sentences_of(lines)] == [4000, 4000, 4000]
    taken = []

    def several():
        for i in range(400):
            taken.append(i)
            yield f"line {i} of text"

    vocabulary.train(several(), 280, max_sentences=101)
    assert len(taken) == 400


def test_training_without_bytes_has_unknown_characters(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(vocabulary.train(TEXT, 90, byte_fallback=False, character_coverage=1.0))
    tokenizer = Tokenizer.open(tmp_path)
    assert 0 in tokenizer.encode("ж") and 0 not in tokenizer.encode("chat 人")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"vocab_size": 100000}, "--vocab_size 100000 is more than this text gives: at most [0-9]+"),
        ({"vocab_size": 20}, "--vocab_size 20 is less than the single characters take"),
        ({"vocab_size": 300, "model_type": "word"}, "--model_type word: choose bpe or unigram"),
        ({"vocab_size": 300, "character_coverage": 1.5}, "--character_coverage 1.5"),
        ({"vocab_size": 300, "texts": []}, "--src holds no text"),
        ({"vocab_size": 300, "max_sentences": 50}, "--max_sentences 50: the trainer takes more than 100"),
    ],
)
def test_training_refuses_by_name(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        vocabulary.train(**{"texts": TEXT} | options)
    assert "\n" not in str(error.value)


def test_texts_come_from_every_kind_of_file(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_bytes("één\n\nbad \xff byte".encode("latin-1"))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "two"}\nnot json\n{"other": 1}\n{"text": "three"}\n')
    assert list(vocabulary.read_texts(str(tmp_path))) == ["\ufffd\ufffdn\n\nbad \ufffd byte", "two", "three"]
    assert capsys.readouterr().out == ""
    (tmp_path / "c.pdf").write_bytes(b"a kind that is not read")
    assert len(list(vocabulary.read_texts(str(tmp_path), show_progress=True))) == 3
    assert capsys.readouterr().out.splitlines() == [
        f"1 file(s) of other kinds left out, the first: {tmp_path / 'c.pdf'}",
        '2 record(s) without text in "text" left out: if they have some, name its --field',
    ]
    with pytest.raises(ValueError, match="no such file or directory"):
        list(vocabulary.read_texts(str(tmp_path / "absent.txt")))


# --- the tools --------------------------------------------------------------------------------------------------------


def test_train_then_merge_then_specials(base: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "text.txt").write_text("\n".join(TEXT))
    (tmp_path / "tokens.json").write_text('{"tokens": ["<START_Q>", "<END_Q>"]}')
    src, extra, dst = (str(tmp_path / name) for name in ("text.txt", "extra", "merged"))
    train_tokenizer.main(src=src, dst=extra, vocab_size=330)
    assert "24 come back exactly" in capsys.readouterr().out
    merge_tokenizer.main(base=str(base.path), extra=extra, dst=dst, special_tokens=str(tmp_path / "tokens.json"))
    merged = Tokenizer.open(dst)
    assert merged.special_tokens["<END_Q>"] == merged.vocab_size - 1 > base.vocab_size
    vocabulary.check_extension(base, merged)
    assert f"{merged.vocab_size} tokens, {merged.vocab_size - base.vocab_size} of them new" in capsys.readouterr().out
    assert merged.decode(merged.encode("chat 人工智能")) == "chat 人工智能"
    with pytest.raises(ValueError, match="already there"):
        merge_tokenizer.main(base=str(base.path), extra=extra, dst=dst)
    with pytest.raises(ValueError, match="already there"):  # and not first the text, which may take hours
        train_tokenizer.main(src=str(tmp_path / "absent.txt"), dst=extra, vocab_size=330)


def test_growing_by_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hf_file(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "chat_template": "x"}')
    (tmp_path / "text.txt").write_text("\n".join(TEXT))
    arguments = {"base": str(tmp_path), "src": str(tmp_path / "text.txt")}
    size = Tokenizer.open(tmp_path).vocab_size
    merge_tokenizer.main(**arguments, vocab_size="+10", dst=str(tmp_path / "a"))
    merge_tokenizer.main(**arguments, vocab_size=str(size + 10), dst=str(tmp_path / "b"))
    assert "10 merges learned\n" in capsys.readouterr().out
    first, second = Tokenizer.open(tmp_path / "a"), Tokenizer.open(tmp_path / "b")
    assert first.fingerprint == second.fingerprint and first.vocab_size == size + 10
    assert json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())["chat_template"] == "x"
    merge_tokenizer.main(**arguments, vocab_size="+100000", dst=str(tmp_path / "c"))
    assert "the text gives no more than that of 100000" in capsys.readouterr().out
    for wrong in (None, "many", "+0", str(size), "-5"):
        with pytest.raises(ValueError, match="--vocab_size"):
            merge_tokenizer.main(**arguments, vocab_size=wrong, dst=str(tmp_path / "d"))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        ({}, "nothing to add: give --extra"),
        ({"extra": "x", "src": "y"}, "--extra and --src: give one"),
        ({"special_tokens": "bad.json"}, "bad.json: expected"),
        ({"special_tokens": "broken.json"}, "broken.json: not JSON"),
    ],
)
def test_the_merge_tool_refuses_by_name(
    base: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('{"names": []}')
    Path("broken.json").write_text("{")
    with pytest.raises(ValueError, match=said):
        merge_tokenizer.main(base=str(base.path), dst="out", **flags)
    assert not Path("out").exists()


# --- what two tokenizers share ----------------------------------------------------------------------------------------


def test_an_extension_keeps_every_id(base: Tokenizer, tmp_path: Path) -> None:
    grown = base.with_special_tokens(["<A>"])
    vocabulary.check_extension(base, grown)
    vocabulary.check_extension(base, base)
    with pytest.raises(ValueError, match="has 320 tokens and .* 321: a vocabulary only grows"):
        vocabulary.check_extension(grown, base)
    proto = proto_of(base.raw)
    name, proto.pieces[300].piece = proto.pieces[300].piece, "zzz"
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match=f"id 300 is 'zzz' in it and was '{name}': merge the vocabularies with"):
        vocabulary.check_extension(base, Tokenizer.open(tmp_path))


def test_pieces_of_new_tokens_say_their_text(base: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(vocabulary.train(TEXT, 400))
    grown, _ = vocabulary.merged_with(base, Tokenizer.open(tmp_path), "append")
    grown = grown.with_special_tokens(["<START_Q>"])
    pieces = vocabulary.pieces_of_new(base, grown)
    assert len(pieces) == grown.vocab_size - base.vocab_size
    for token, ids in zip(grown.tokens()[base.vocab_size :], pieces):
        assert ids and base.decode(ids, after=base.encode(":")) == token.decode().replace("▁", " ")
    hf = Tokenizer.open(hf_file(tmp_path))
    larger = bpe.grow(hf, TEXT, 40)
    tokens = hf.tokens()
    for token, ids in zip(larger.tokens()[hf.vocab_size :], vocabulary.pieces_of_new(hf, larger)):
        assert b"".join(tokens[i] for i in ids) == token  # parts of characters too


def test_counting_tokens(base: Tokenizer) -> None:
    assert (
        vocabulary.count_tokens(["grass", "is"], base, base) == [len(base.encode("grass")) + len(base.encode("is"))] * 2
    )


def test_who_exports_pieces_of_score_0_is_told(tmp_path: Path) -> None:
    """transformers 5 ranks pieces by their ids, so that appended ones come last instead of first."""
    (tmp_path / "base.model").write_bytes(tiny_tokenizer())
    base = Tokenizer.open(tmp_path / "base.model")
    assert base.note_on_export() == []
    (tmp_path / "more.model").write_bytes(merging.with_pieces(base.raw, [("▁qqq", 0.0), ("zzz", 0.0)], "base"))
    grown = Tokenizer.open(tmp_path / "more.model").with_special_tokens(["[PAD]"])
    assert "SentencePieceBackend" in grown.note_on_export()[0]
    (tmp_path / "scored.model").write_bytes(merging.with_pieces(base.raw, [("▁qqq", -900.0), ("zzz", -901.0)], "base"))
    assert Tokenizer.open(tmp_path / "scored.model").note_on_export() == []
