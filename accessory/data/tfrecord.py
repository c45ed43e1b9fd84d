"""TFRecord files of tf.train.Example, without TensorFlow or protobuf.

    file     record after record:  length, 8 bytes | its CRC, 4 | payload | the payload's CRC, 4     all little-endian
    CRC      masked CRC-32C: rotate right by 15, add 0xa282ead8                (tensorflow/core/lib/io/record_writer.h)
    payload  tf.train.Example: {name: int64 list | float list | bytes list}    (tensorflow/core/example/feature.proto)
    index    FILE.index beside it: a line "offset bytes" a record, what the readers of MiniMA's files ask for

Every CRC is checked on reading. numpy only: no torch. Test: pytest tests/unit/test_tfrecord.py
"""

import functools
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

Feature = np.ndarray | list[bytes]  # int64 or float32 array, or byte strings
HEAD, FOOT = struct.Struct("<QI"), struct.Struct("<I")
POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), bits reversed
SPAN = 1024  # bytes of a CRC that are looked up at once
MAX_RECORD = 2**31  # protobuf's own limit; a longer length is not believed even where its CRC is right


# --- CRC --------------------------------------------------------------------------------------------------------------


@functools.cache
def crc_tables() -> np.ndarray:
    """(SPAN * 256,) uint32: entry k * 256 + b is what byte b does to the CRC when k zero bytes follow it."""
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = np.where(values & 1, values >> 1 ^ np.uint32(POLYNOMIAL), values >> 1)
    tables = [values]
    for _ in range(SPAN - 1):
        tables.append(values[tables[-1] & 0xFF] ^ tables[-1] >> 8)
    return np.concatenate(tables)


def crc32c(data: bytes) -> int:
    """CRC-32C of `data`. A CRC is linear: that of a span is the XOR of what each of its bytes does alone, and the state
    before the span is XORed into its first four bytes."""
    tables, state = crc_tables(), 0xFFFFFFFF
    for start in range(0, len(data), SPAN):
        span = np.frombuffer(data, np.uint8, min(SPAN, len(data) - start), start).astype(np.intp)
        head = min(4, len(span))
        span[:head] ^= np.frombuffer(state.to_bytes(4, "little"), np.uint8)[:head]
        places = span + np.arange(len(span) - 1, -1, -1) * 256
        state = state >> 8 * head ^ int(np.bitwise_xor.reduce(tables[places]))
    return state ^ 0xFFFFFFFF


def masked_crc(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# --- records ----------------------------------------------------------------------------------------------------------


class Writer:
    """Writes FILE and FILE.index. Byte-identical to TensorFlow's writer without compression.

    with Writer(path) as writer: writer.write({"indices": [1, 300, 2]})"""

    def __init__(self, path: str | Path):
        self.file, self.index = open(path, "wb"), open(index_path(path), "w", encoding="ascii")
        self.offset = self.count = 0

    def write(self, features: Mapping[str, Sequence[int] | np.ndarray]) -> None:
        payload = encode_example(features)
        length = struct.pack("<Q", len(payload))
        self.file.write(length + FOOT.pack(masked_crc(length)) + payload + FOOT.pack(masked_crc(payload)))
        size = len(payload) + HEAD.size + FOOT.size
        self.index.write(f"{self.offset} {size}\n")
        self.offset, self.count = self.offset + size, self.count + 1

    def close(self) -> None:
        for file in (self.file, self.index):
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Records:
    """Random access to the examples of a file, through its index, or without one through the lengths in it."""

    def __init__(self, path: str | Path):
        self.path, self.file = Path(path), open(path, "rb")
        self.places = self._read_index() if index_path(path).is_file() else self._scan()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> dict[str, Feature]:
        offset, size = self.places[i]
        self.file.seek(offset)
        payload = read_payload(self.file, f"{self.path}: record {i}")
        if payload is None or len(payload) + HEAD.size + FOOT.size != size:
            raise ValueError(f"{index_path(self.path)}:{i + 1}: does not fit {self.path.name}: remove it, or copy both")
        return decode_example(payload, f"{self.path}: record {i}")

    def _read_index(self) -> list[tuple[int, int]]:
        places, end = [], 0
        for number, line in enumerate(index_path(self.path).read_bytes().splitlines(), 1):
            words = line.split()
            if len(words) != 2 or not all(w.isdigit() for w in words) or int(words[0]) != end:
                raise ValueError(f"{index_path(self.path)}:{number}: not 'offset bytes' of the next record: remove it")
            places.append((end, int(words[1])))
            end += int(words[1])
        if end != self.path.stat().st_size:
            raise ValueError(f"{index_path(self.path)}: covers {end} bytes of another file: remove it, or copy both")
        return places

    def _scan(self) -> list[tuple[int, int]]:
        places, offset, end = [], 0, self.path.stat().st_size
        while offset < end:
            where = f"{self.path}: record {len(places)}"
            self.file.seek(offset)
            size = read_length(self.file, where) + HEAD.size + FOOT.size
            if offset + size > end:
                raise ValueError(f"{where}: cut off after {end - offset} of {size} bytes: copy the file again")
            places.append((offset, size))
            offset += size
        return places


def read_examples(file: BinaryIO, name: str) -> Iterator[dict[str, Feature]]:
    """The examples of a stream in their order. ValueError names the file and the record, counted from 0."""
    number = 0
    while (payload := read_payload(file, f"{name}: record {number}")) is not None:
        yield decode_example(payload, f"{name}: record {number}")
        number += 1


def read_payload(file: BinaryIO, where: str) -> bytes | None:
    """The next record's payload, None at the end of the file."""
    length = read_length(file, where)
    if length is None:
        return None
    body = file.read(length + FOOT.size)
    if len(body) != length + FOOT.size:
        raise ValueError(f"{where}: cut off after {len(body)} of {length + FOOT.size} bytes: copy the file again")
    payload = body[:length]
    if masked_crc(payload) != FOOT.unpack_from(body, length)[0]:
        raise ValueError(f"{where}: its CRC is wrong, the file is damaged: copy it again")
    return payload


def read_length(file: BinaryIO, where: str) -> int | None:
    head = file.read(HEAD.size)
    if not head:
        return None
    if len(head) < HEAD.size:
        raise ValueError(f"{where}: cut off after {len(head)} bytes: copy the file again")
    length, crc = HEAD.unpack(head)
    if masked_crc(head[:8]) != crc or length > MAX_RECORD:
        raise ValueError(f"{where}: the CRC of its length is wrong: the file is damaged, compressed or no TFRecord")
    return length


def index_path(path: str | Path) -> Path:
    return Path(f"{path}.index")


# --- tf.train.Example -------------------------------------------------------------------------------------------------


def encode_example(features: Mapping[str, Sequence[int] | np.ndarray]) -> bytes:
    """Int64 lists -> a serialised Example, features in the order of their names as protobuf's deterministic mode has it."""
    entries = []
    for name in sorted(features):
        packed = encode_varints(np.asarray(features[name], np.int64))
        value = _field(3, _field(1, packed) if packed else b"")
        entries.append(_field(1, _field(1, name.encode()) + _field(2, value)))
    return _field(1, b"".join(entries))


def decode_example(payload: bytes, where: str) -> dict[str, Feature]:
    """A serialised Example -> its features. ValueError where the bytes are none."""
    try:
        features: dict[str, Feature] = {}
        for part in (entry for number, body in _fields(payload) if number == 1 for entry in _fields(body)):
            entry = dict(_fields(part[1]))
            kinds = dict(_fields(entry.get(2, b"")))
            kind = next(iter(kinds), 3)
            features[bytes(entry.get(1, b"")).decode()] = DECODERS[kind](kinds.get(kind, b""))
        return features
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error):
        raise ValueError(f"{where}: not a tf.train.Example: only files of those are read") from None


def _bytes_list(body: bytes) -> list[bytes]:
    return [value for number, value in _fields(body) if number == 1]


def _float_list(body: bytes) -> np.ndarray:
    parts = [value for number, value in _fields(body) if number == 1]  # packed, or one by one: the same bytes
    return np.frombuffer(b"".join(parts), "<f4")


def _int64_list(body: bytes) -> np.ndarray:
    parts = [np.array([v]) if isinstance(v, int) else decode_varints(v) for number, v in _fields(body) if number == 1]
    return np.concatenate([np.zeros(0, np.int64), *(p.astype(np.int64) for p in parts)])


DECODERS = {1: _bytes_list, 2: _float_list, 3: _int64_list}


def _field(number: int, body: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return bytes([number << 3 | 2]) + encode_varints(np.array([len(body)])) + body


def _fields(body: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(number, value) of a message's fields: bytes of a length-delimited or fixed one, the number of a varint."""
    place = 0
    while place < len(body):
        tag, place = _varint(body, place)
        if tag & 7 == 0:
            value, place = _varint(body, place)
            yield tag >> 3, value - (value >> 63 << 64)
            continue
        size, place = _varint(body, place) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], place)
        if place + size > len(body):
            raise ValueError("a field longer than its message")
        yield tag >> 3, body[place : place + size]
        place += size


def _varint(body: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = body[place]
        value, place, shift = value | (byte & 0x7F) << shift, place + 1, shift + 7
        if byte < 0x80:
            return value & 2**64 - 1, place


def encode_varints(values: np.ndarray) -> bytes:
    """int64 values one after the other, 7 bits a byte, lowest first; a negative one takes 10 bytes."""
    if not len(values):
        return b""
    unsigned = values.astype(np.int64).view(np.uint64)
    count = max(1, -(-int(unsigned.max()).bit_length() // 7))
    groups = unsigned[:, None] >> np.arange(0, 7 * count, 7, dtype=np.uint64)
    more = groups >= 0x80  # another byte follows
    wanted = np.concatenate([np.ones((len(values), 1), bool), more[:, :-1]], axis=1)
    return ((groups & np.uint64(0x7F)).astype(np.uint8) | more.astype(np.uint8) << 7)[wanted].tobytes()


def decode_varints(body: bytes) -> np.ndarray:
    """The inverse -> int64. ValueError where the last one is cut off, or one is longer than 10 bytes."""
    data = np.frombuffer(body, np.uint8)
    if not len(data):
        return np.zeros(0, np.int64)
    stops = np.flatnonzero(data < 0x80) + 1
    lengths = np.diff(stops, prepend=0)
    if not len(stops) or stops[-1] != len(data) or lengths.max() > 10:
        raise ValueError("not a list of varints")
    starts = stops - lengths
    shifts = (np.arange(len(data)) - np.repeat(starts, lengths)).astype(np.uint64) * np.uint64(7)
    return np.add.reduceat((data & 0x7F).astype(np.uint64) << shifts, starts).view(np.int64)
