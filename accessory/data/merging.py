"""Two sentencepiece vocabularies as one: the base's file with the pieces of another behind its own, ids unchanged.

    tokenizer.model (32000) + chinese_sp.model (20000) -> 49953, 2047 pieces being known to the base

The file is the base's ModelProto with more `pieces`, byte for byte what protobuf would write; everything else in it
(normaliser, trainer settings) stays. `weights/vocab.py` grows the model to the new size. Two published rules:

    append   score 0 each: they outrank every merge of the base     Chinese-LLaMA-Alpaca, merge_tokenizers.py
    scored   scores go on below the base's last, Chinese pieces     MiniMA, run_expanding_vocab_llama.py
             only, none with a digit, filled up to a multiple of 64

append makes the most of the new pieces, but changes how old text is cut ("10" is one token); scored leaves the base's
merges first. Format: sentencepiece's sentencepiece_model.proto. Test: pytest tests/unit/test_vocabulary.py
"""

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from accessory.tokenizer import SentencePiece, Tokenizer

RULES = ("append", "scored")
MULTIPLE = 64  # of the vocabulary, under the rule "scored"
# A character of Chinese to that rule: the block as it was in Unicode 1.1, and this punctuation.
CHINESE = re.compile("[\u4e00-\u9fa5。，？！；：“”‘’《》〈〉【】『』—…「」]")
PIECES, SENTENCE_PIECE, SCORE = 1, 1, 2  # fields of ModelProto and of SentencePiece


@dataclass
class Merged:
    """A merged vocabulary: its file, and what became of the extra's pieces."""

    model: bytes
    added: list[str]  # in the order of their ids, from the base's size on
    known: int = 0  # pieces of the extra that the base has
    left_out: list[str] = field(default_factory=list)  # by the rule


def merge(base: Tokenizer, extra: Tokenizer, rule: str = "append") -> Merged:
    """The base with the extra's pieces behind its own, in their order; a piece that the base has is left out.

    ValueError for an unknown rule, for anything but two sentencepiece models, and where nothing would be added."""
    if rule not in RULES:
        raise ValueError(f"--rule {rule}: choose one of {', '.join(RULES)}")
    for flag, tokenizer in (("--base", base), ("--extra", extra)):
        if not isinstance(tokenizer, SentencePiece):
            raise ValueError(
                f"{flag} {tokenizer.path} is a {tokenizer.kind} tokenizer, not sentencepiece: byte-level BPE grows on "
                "text, give --src TEXT --vocab_size +N"
            )
    if own := [token for token, i in base.added_tokens.items() if i >= base.model.vocab_size()]:
        raise ValueError(
            f"--base {base.path} has {own[0]} as an added token, whose id a new piece would take: merge first, then "
            "add special tokens"
        )
    have = set(pieces(base))
    new = [piece for piece in text_pieces(extra) if piece not in have]
    chosen, left_out = (new, []) if rule == "append" else chinese_and_fill(new, base.model.vocab_size())
    if not chosen or (rule == "scored" and not any(map(CHINESE.search, chosen))):
        raise ValueError(f"--extra {extra.path} has no piece that --rule {rule} adds: another file, or --rule append")
    score = base.model.get_score(base.model.vocab_size() - 1)
    scores = [0.0] * len(chosen) if rule == "append" else [score - 1 - i for i in range(len(chosen))]
    model = with_pieces(base.raw, zip(chosen, scores), base.path)
    return Merged(model, chosen, len(pieces(extra)) - len(new), left_out)


def chinese_and_fill(new: list[str], size: int) -> tuple[list[str], list[str]]:
    """(pieces to add, the others) under "scored": those with a Chinese character, then others without a digit until
    the vocabulary divides by 64; where it does already, 64 more, as published."""
    chinese = [piece for piece in new if CHINESE.search(piece)]
    others = [piece for piece in new if not CHINESE.search(piece)]
    spare = [piece for piece in others if not any(c.isdigit() for c in piece)]
    fill = spare[: MULTIPLE - (size + len(chinese)) % MULTIPLE]
    taken = set(fill)
    return chinese + fill, [piece for piece in others if piece not in taken]


def pieces(tokenizer: SentencePiece) -> list[str]:
    return [tokenizer.model.id_to_piece(i) for i in range(tokenizer.model.vocab_size())]


def text_pieces(tokenizer: SentencePiece) -> list[str]:
    """The pieces that stand for text: not control, unknown, unused or single bytes (every LLaMA base has its own)."""
    model = tokenizer.model
    special = (model.is_control, model.is_unknown, model.is_unused, model.is_byte)
    return [piece for i, piece in enumerate(pieces(tokenizer)) if not any(test(i) for test in special)]


def with_pieces(model: bytes, new: Iterable[tuple[str, float]], where: object) -> bytes:
    """A ModelProto with (piece, score) pairs behind its pieces, type NORMAL by leaving it out."""
    first, rest = bytearray(), bytearray()
    for number, raw in fields(model, where):
        (first if number == PIECES else rest).extend(raw)
    for piece, score in new:
        content = message(SENTENCE_PIECE, piece.encode()) + bytes([SCORE << 3 | 5]) + struct.pack("<f", score)
        first += message(PIECES, content)
    return bytes(first + rest)


def fields(raw: bytes, where: object) -> Iterator[tuple[int, bytes]]:
    """(number, tag and content) of every field of a protobuf message. ValueError where it ends too early."""
    at = 0
    while at < len(raw):
        start = at
        tag, at = varint(raw, at)
        if tag & 7 == 2:
            size, at = varint(raw, at)
            at += size
        elif tag & 7 == 0:
            _, at = varint(raw, at)
        elif tag & 7 in (1, 5):
            at += 8 if tag & 7 == 1 else 4
        else:
            at = len(raw) + 1
        if at > len(raw):
            raise ValueError(f"{where}: is no complete sentencepiece model: copy the file again")
        yield tag >> 3, raw[start:at]


def varint(raw: bytes, at: int) -> tuple[int, int]:
    """(value, where it ends) of the variable-length number at `at`; past the end of `raw` where it is cut off."""
    value = shift = 0
    while at < len(raw):
        value |= (raw[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if raw[at - 1] < 0x80:
            return value, at
    return value, len(raw) + 1


def message(number: int, content: bytes) -> bytes:
    """A field of bytes with its length."""
    size, head = len(content), bytearray([number << 3 | 2])
    while size > 0x7F:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes(head + bytes([size])) + content


def unreachable(merged: Tokenizer, added: list[str]) -> list[str]:
    """The added pieces that their own text does not give: BPE has no way of merges to them, so their rows stay
    untrained."""
    first = merged.vocab_size - len(added)
    return [piece for i, piece in enumerate(added, first) if merged.split_token(piece.encode()) != [i]]
