"""A sentencepiece model (tokenizer.model) as plain values: the protobuf read and written field by field, without protobuf.

    ModelProto   1 pieces: 1 text 2 score 3 type     2 trainer: 3 model type, 35 byte fallback, 40.. ids, 45.. their pieces
                 3 normalizer: 1 name, 2 charsmap, 3 space before a text, 4 merges spaces, 5 escapes spaces

Only what decides how a text is encoded is kept. Format: sentencepiece_model.proto. Tests: tests/unit/test_gguf_tokenizer.py
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of pieces; GGUF's numbers are the same
BPE = 2
IDS = {"unk": 40, "bos": 41, "eos": 42, "pad": 43}


@dataclass
class SentencePieceModel:
    """The parts of a model. An id of -1 means that there is no such token."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    ids: dict[str, int] = field(default_factory=dict)  # unk, bos, eos, pad
    add_space_prefix: bool = True
    remove_extra_whitespaces: bool = True
    charsmap: bytes = b""
    model_type: int = BPE
    whitespace_as_suffix: bool = False
    escape_whitespaces: bool = True


def read(raw: bytes) -> SentencePieceModel:
    """The model in `raw`. Raises ValueError when it is no complete sentencepiece model."""
    try:
        parts = list(_fields(raw))
        pieces = [dict(_fields(value)) for number, value in parts if number == 1]
        trainer = {n: v for number, value in parts if number == 2 for n, v in _fields(value)}
        normalizer = {n: v for number, value in parts if number == 3 for n, v in _fields(value)}
        model = SentencePieceModel(
            pieces=[piece[1].decode() for piece in pieces],
            scores=[struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces],
            types=[piece.get(3, NORMAL) for piece in pieces],
            ids={name: _signed(trainer.get(n, default)) for (name, n), default in zip(IDS.items(), (0, 1, 2, -1))},
            add_space_prefix=bool(normalizer.get(3, 1)),
            remove_extra_whitespaces=bool(normalizer.get(4, 1)),
            charsmap=normalizer.get(2, b""),
            model_type=trainer.get(3, 1),
            whitespace_as_suffix=bool(trainer.get(24, 0)),
            escape_whitespaces=bool(normalizer.get(5, 1)),
        )
    except (IndexError, KeyError, struct.error, AttributeError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"not a complete sentencepiece model ({type(error).__name__})") from error
    if not model.pieces or not trainer:
        raise ValueError("not a complete sentencepiece model (no pieces, or nothing about them)")
    return model


def write(model: SentencePieceModel) -> bytes:
    """The bytes that sentencepiece opens."""
    pieces = b"".join(
        _message(1, _message(1, text.encode()) + _float(2, score) + _number(3, kind))
        for text, score, kind in zip(model.pieces, model.scores, model.types, strict=True)
    )
    trainer = _number(3, model.model_type) + _number(4, len(model.pieces)) + _number(35, int(BYTE in model.types))
    for name, number in IDS.items():
        token = model.ids.get(name, -1)
        trainer += _number(number, token)
        if token >= 0:
            trainer += _message(number + 5, model.pieces[token].encode())  # its piece: 45 to 48
    normalizer = _message(1, b"identity") + (_message(2, model.charsmap) if model.charsmap else b"")
    normalizer += _number(3, int(model.add_space_prefix)) + _number(4, int(model.remove_extra_whitespaces))
    normalizer += _number(5, int(model.escape_whitespaces))
    return pieces + _message(2, trainer) + _message(3, normalizer)


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one message: an int for a varint, bytes for everything else."""
    at = 0
    while at < len(raw):
        key, at = _read_varint(raw, at)
        wire = key & 7
        if wire == 0:
            value, at = _read_varint(raw, at)
        elif wire in (1, 5):
            value, at = raw[at : at + (8 if wire == 1 else 4)], at + (8 if wire == 1 else 4)
        elif wire == 2:
            length, at = _read_varint(raw, at)
            value, at = raw[at : at + length], at + length
        else:
            raise IndexError(f"wire type {wire}")
        if at > len(raw):
            raise IndexError("cut short")
        yield key >> 3, value


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
        if shift > 63:
            raise IndexError("a number of more than 64 bits")


def _signed(value: int) -> int:
    """An int32 field: negative numbers are stored as 64-bit two's complement."""
    return value - 2**64 if value >= 2**63 else value


def _varint(value: int) -> bytes:
    value, out = value & 0xFFFFFFFFFFFFFFFF, bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out + bytes([value]))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content
