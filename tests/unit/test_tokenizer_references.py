"""Each kind of tokenizer id for id against an independent one, over mixed text: several scripts, code, emoji, control
characters, bytes that are no UTF-8. 300 lines here, 10,000 by `python bench/tokenizer_ids.py`. The references are
transformers, the sentencepiece library with its model edited by protobuf, and Meta's Llama 3 encoding written out."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from accessory.tokenizer import LLAMA3_SPECIAL_TOKENS, Tokenizer
from accessory.tokenizer_files import LLAMA3_SPLIT, read_ranks
from tests.helpers import assets

LINES = 300
WORDS = (
    "the cat sat on an Uncharacteristically long mat didn't WE'LL naïve Zürich señor façade coöperate "
    "Привет мир как дела это проверка مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดีชาวโลก 你好 世界 人工智能 中文分词 "
    "白日依山尽 黄河入海流 こんにちは 世界 カタカナ 안녕하세요 세계 ελληνικά γλώσσα Tiếng Việt İstanbul ıßſŉ ﬁﬂ ①②③ Ⅷ ½ x² H₂O "
    "12345 3.14159 1,000,000 0x7fff 2024-02-29 user@example.com https://a.b/c?d=e&f=%20 <s> </s> <unk> <0x0A> [INST]"
).split()
CODE = (
    "def f(x):\n\treturn x**2\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    "    if x:\r\n        pass",
    "$\\frac{a}{b}$",
)
EMOJI = ("🙂", "👩‍👩‍👧", "🇫🇷", "👍🏽", "☃️", "e\u0301", "\u200d", "\ufeff", "\u00a0", "\u3000", "\u202e", "▁", "��")
CONTROL = tuple(map(chr, (0, 1, 7, 8, 9, 11, 12, 13, 27, 127, 128, 133, 159, 0x2028, 0x10FFFF)))


def mixed_lines(count: int, seed: int = 0) -> list[str]:
    """`count` different lines, the same on every machine."""
    rng = random.Random(seed)

    def broken() -> str:
        raw = "".join(rng.choice(WORDS) for _ in range(3)).encode()
        at = rng.randrange(len(raw))
        return (raw[:at] + rng.randbytes(rng.randrange(1, 4)) + raw[at + 1 :]).decode(errors="replace")

    make: tuple[Callable[[], str], ...] = (
        *(lambda: rng.choice(WORDS),) * 8,
        lambda: rng.choice(CODE),
        lambda: rng.choice(EMOJI),
        lambda: rng.choice(CONTROL),
        lambda: chr(rng.choice((rng.randrange(0x20, 0xD800), rng.randrange(0xE000, 0x110000)))),
        broken,
    )
    gaps = (*(" ",) * 9, "", "", "  ", "\n", "\t", "   ", "\n\n")
    return ["".join(rng.choice(make)() + rng.choice(gaps) for _ in range(rng.randrange(1, 24))) for _ in range(count)]


def test_the_lines_are_mixed() -> None:
    text = "".join(mixed_lines(300))
    assert all(c in text for c in "\x00\x1b\ufffd🙂你м\u200d") and "return x**2" in text
    assert mixed_lines(5) == mixed_lines(5) != mixed_lines(5, seed=1)


# --- sentencepiece ----------------------------------------------------------------------------------------------------


def transformers_llama(path: Path, legacy: bool, tokens: tuple[str, ...] = ()):
    """transformers' LlamaTokenizer with merges by the pieces' scores, as up to 4.57. (5.23, opening a bare
    tokenizer.model, ranks merges by id; LLaMA's pieces of several spaces have low ids and the lowest scores.)"""
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    model = SentencePieceProcessor(model_file=str(path))
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    merges = generate_merges(vocab, {piece: model.get_score(i) for piece, i in vocab.items()}, ["<unk>", "<s>", "</s>"])
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy, add_bos_token=True)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer


def sentencepiece_without_prefix(path: Path):
    """The model with add_dummy_prefix off, which transformers 4.31 to 4.57 use for legacy=False."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = False
    return SentencePieceProcessor(model_proto=proto.SerializeToString())


def test_sentencepiece_is_transformers(count: int = LINES) -> None:
    """transformers 5 adds no "▁" before a text that starts with a space (its Metaspace); sentencepiece and transformers 4
    do. The other lines are equal, id for id, with special tokens left as text."""
    path = assets("tok_llama", "tokenizer.model")
    tokenizer, reference = Tokenizer.open(path), transformers_llama(path, legacy=True)
    lines = [line for line in mixed_lines(count) if not line.startswith((" ", "▁"))]
    assert len(lines) > 0.9 * count
    ids = reference(lines, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for line, expected in zip(lines, ids):
        assert tokenizer.encode(line) == expected, line
        assert tokenizer.decode(expected) == line.replace("▁", " ")
    assert tokenizer.encode("red", bos=True) == reference("red")["input_ids"]


def test_a_continuation_is_sentencepiece_without_its_prefix(count: int = LINES) -> None:
    path = assets("tok_llama", "tokenizer.model")
    tokenizer, reference = Tokenizer.open(path), sentencepiece_without_prefix(path)
    for line in mixed_lines(count):
        assert tokenizer.encode_continuation(line) == reference.encode(line), line


SPECIAL = ("<START_Q>", "<END_Q>", "<START_A>", "<END_A>")


def dialogs(count: int = LINES) -> list[str]:
    """Lines with special tokens in them, the text after one never starting with a space (see above)."""
    rng = random.Random(5)
    parts = [re.sub("</?s>|<unk>|▁", "", line).lstrip(" ") or "x" for line in mixed_lines(3 * count, seed=2)]
    return ["".join(rng.choice(("", *SPECIAL, "</s>")) + parts[3 * i + k] for k in range(3)) for i in range(count)]


@pytest.mark.parametrize("spacing", ["legacy", "plain"])
def test_special_tokens_and_both_spacings_are_transformers(spacing: str, count: int = LINES) -> None:
    path = assets("tok_llama", "tokenizer.model")
    tokenizer = Tokenizer.open(path).with_special_tokens(SPECIAL)
    reference = transformers_llama(path, spacing == "legacy", SPECIAL)
    lines = dialogs(count)
    for line, expected in zip(lines, reference(lines, add_special_tokens=False)["input_ids"]):
        assert tokenizer.encode_with_specials(line, spacing) == expected, line
        assert tokenizer.decode_with_specials(expected, spacing) == line


def test_spaces_around_special_tokens_are_sentencepiece() -> None:
    """Where transformers 5 differs from 4: legacy is sentencepiece on each part, plain its model without the prefix."""
    path = assets("tok_llama", "tokenizer.model")
    tokenizer, without = Tokenizer.open(path).with_special_tokens(SPECIAL), sentencepiece_without_prefix(path)
    for text in (" hi", "  hi there ", "hi", "\nhi", "▁hi", "你好"):
        plain, legacy = without.encode(text), tokenizer.model.encode(text)
        assert tokenizer.encode_with_specials(f"<END_Q>{text}</s>{text}", "legacy") == [32001, *legacy, 2, *legacy]
        assert tokenizer.encode_with_specials(f"<END_Q>{text}</s>{text}", "plain") == [32001, *plain, 2, *plain]
        assert tokenizer.encode_with_specials(f"{text}<END_Q>", "plain") == [*legacy, 32001]


# --- Llama 3 ----------------------------------------------------------------------------------------------------------


def meta_llama3(path: Path) -> Callable[[str], list[int]]:
    """llama-models' Tokenizer.encode(s, bos=False, eos=False, allowed_special="all"), written out on tiktoken: at most
    400,000 characters at once, no run of spaces or of others longer than 25,000."""
    import tiktoken

    ranks = read_ranks(path, path.read_bytes())
    names = [*LLAMA3_SPECIAL_TOKENS, *(f"<|reserved_special_token_{i}|>" for i in range(2, 246))]
    special = {name: len(ranks) + i for i, name in enumerate(names)}
    model = tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=special)

    def parts(s: str):
        run, space, start = 0, s[0].isspace() if s else False, 0
        for i, c in enumerate(s):
            if c.isspace() != space:
                run, space = 1, c.isspace()
                continue
            run += 1
            if run > 25_000:
                yield s[start:i]
                start, run = i, 1
        yield s[start:]

    def encode(s: str, special: bool) -> list[int]:
        pieces = (part for i in range(0, len(s), 400_000) for part in parts(s[i : i + 400_000]))
        allowed = "all" if special else set()
        return [t for p in pieces for t in model.encode(p, allowed_special=allowed, disallowed_special=())]

    return encode


def test_llama3_is_metas(count: int = LINES) -> None:
    path = assets("tok_llama3", "tokenizer.model")
    tokenizer, reference, rng = Tokenizer.open(path), meta_llama3(path), random.Random(3)
    for line in [*mixed_lines(count), "x" * 60_000 + " " * 30_000 + "y"]:
        # a special token in a run that Meta cuts for its length counts as part of the run there, here it ends it
        cut = rng.randrange(len(line) + 1) if len(line) < 25_000 else len(line)
        line = (
            line[:cut]
            + rng.choice(("", "<|eot_id|>", "<|start_header_id|>", "<|reserved_special_token_7|>"))
            + line[cut:]
        )
        assert tokenizer.encode(line) == reference(line, special=False), line
        assert tokenizer.encode_with_specials(line) == reference(line, special=True), line
        assert tokenizer.decode(tokenizer.encode(line)) == line
        assert tokenizer.decode_with_specials(tokenizer.encode_with_specials(line)) == line


# --- tokenizer.json ---------------------------------------------------------------------------------------------------


def test_tokenizer_json_is_transformers(count: int = LINES) -> None:
    from transformers import PreTrainedTokenizerFast

    path = assets("smollm2-135m", "tokenizer.json")
    tokenizer, reference = Tokenizer.open(path), PreTrainedTokenizerFast(tokenizer_file=str(path))
    rng, decode = (
        random.Random(4),
        reference.backend_tokenizer.decode,
    )  # SmolLM2 lacks some bytes: not every line comes back
    lines = [line + rng.choice(("", "<|im_start|>user\n", "<|im_end|>\n")) + line[::-1] for line in mixed_lines(count)]
    for line, expected in zip(lines, reference(lines, add_special_tokens=False)["input_ids"]):
        assert tokenizer.encode_with_specials(line) == expected, line
        assert tokenizer.encode_with_specials(line, "plain") == expected
        assert tokenizer.decode_with_specials(expected) == decode(expected, skip_special_tokens=False)
    ids = reference(lines, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for line, expected in zip(lines, ids):
        assert tokenizer.encode(line) == expected, line
        assert tokenizer.decode(expected) == decode(expected, skip_special_tokens=True)
