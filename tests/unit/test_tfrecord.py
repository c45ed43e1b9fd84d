"""TFRecord: TensorFlow's bytes, every CRC, index and no index, and what a damaged file says."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accessory.data.tfrecord import (
    Records,
    Writer,
    crc32c,
    decode_example,
    decode_varints,
    encode_example,
    encode_varints,
    index_path,
    read_examples,
)
from tests.helpers import assets

# {"indices": [1, 300, 2]} as TensorFlow writes it
GOLDEN = bytes.fromhex("1700000000000000e7cef81e0a150a130a07696e646963657312081a060a0401ac0202c4662d01")


def write(path: Path, rows: list) -> Path:
    with Writer(path) as writer:
        for row in rows:
            writer.write({"indices": row})
    return path


def ids(path: Path) -> list[list[int]]:
    with open(path, "rb") as file:
        return [e["indices"].tolist() for e in read_examples(file, path.name)]


def bitwise_crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_the_published_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tfrecord", [[1, 300, 2]])
    assert path.read_bytes() == GOLDEN and index_path(path).read_text() == "0 39\n"
    write(path, [[1, 300, 2]] * 3)
    assert path.read_bytes() == GOLDEN * 3 and index_path(path).read_text() == "0 39\n39 39\n78 39\n"


def test_the_crc_is_the_published_one() -> None:
    """RFC 3720, B.4: the check values of CRC-32C."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E and crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 1023, 1024, 1025, 1026, 1027, 1028, 2050, 5000])
def test_the_crc_at_any_length(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    assert crc32c(data) == bitwise_crc32c(data)


def test_two_features_stand_in_the_order_of_their_names() -> None:
    """Field by field as feature.proto says, built by hand."""
    indices = b"\x0a\x07indices\x12\x07\x1a\x05\x0a\x03\x01\xac\x02"
    mask = b"\x0a\x04mask\x12\x06\x1a\x04\x0a\x02\x00\x01"
    body = b"\x0a" + bytes([len(indices)]) + indices + b"\x0a" + bytes([len(mask)]) + mask
    expected = b"\x0a" + bytes([len(body)]) + body
    assert encode_example({"mask": [0, 1], "indices": [1, 300]}) == expected
    back = decode_example(expected, "here")
    assert {k: v.tolist() for k, v in back.items()} == {"indices": [1, 300], "mask": [0, 1]}


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_varints_there_and_back(values: list[int]) -> None:
    packed = encode_varints(np.array(values, np.int64))
    assert decode_varints(packed).tolist() == values
    by_hand = b""
    for value in (v % 2**64 for v in values):
        while value >= 0x80:
            by_hand, value = by_hand + bytes([value & 0x7F | 0x80]), value >> 7
        by_hand += bytes([value])
    assert packed == by_hand


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=50), max_size=5))
def test_examples_there_and_back(rows: list[list[int]]) -> None:
    assert [decode_example(encode_example({"indices": r}), "x")["indices"].tolist() for r in rows] == rows


def test_unpacked_numbers_and_other_kinds_are_read() -> None:
    def entry(name: bytes, value: bytes) -> bytes:
        body = b"\x0a" + bytes([len(name)]) + name + b"\x12" + bytes([len(value)]) + value
        return b"\x0a" + bytes([len(body)]) + body

    unpacked = b"\x1a\x05\x08\x07\x08\xac\x02"  # two fields 1 of the int64 list, each a varint
    floats = b"\x12\x0a\x0a\x08" + struct.pack("<2f", 1.5, -2)
    text = b"\x0a\x04\x0a\x02hi"
    body = entry(b"i", unpacked) + entry(b"f", floats) + entry(b"t", text)
    found = decode_example(b"\x0a" + bytes([len(body)]) + body, "x")
    assert found["i"].tolist() == [7, 300] and found["f"].tolist() == [1.5, -2.0] and found["t"] == [b"hi"]


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indexed", [True, False])
def test_any_record_is_found_with_and_without_an_index(tmp_path: Path, indexed: bool) -> None:
    rows = [list(range(k * 100, k * 100 + k)) for k in range(20)]
    path = write(tmp_path / "a.tfrecord", rows)
    if not indexed:
        index_path(path).unlink()
    records = Records(path)
    assert len(records) == 20
    assert [records[i]["indices"].tolist() for i in (19, 0, 7)] == [rows[19], rows[0], rows[7]] and ids(path) == rows


def test_a_real_shard(tmp_path: Path) -> None:
    path = assets("tfrecord_c4", "c4-validation-00000-of-00002.tfrecord")
    with open(path, "rb") as file:
        found = list(read_examples(file, path.name))
    assert len(found) == len(Records(path)) == 100
    assert all(len(e["text"]) == 1 and e["text"][0].decode() for e in found)
    assert found[0]["timestamp"] == [b"2019-04-21T18:54:04Z"]


@pytest.mark.parametrize("place", range(0, 39, 3))
def test_a_flipped_bit_anywhere_is_found_and_its_record_named(tmp_path: Path, place: int) -> None:
    data = bytearray(GOLDEN * 3)
    data[39 + place] ^= 4
    (tmp_path / "a.tfrecord").write_bytes(data)
    with pytest.raises(ValueError, match=r"a.tfrecord: record 1: .*CRC"):
        ids(tmp_path / "a.tfrecord")


@pytest.mark.parametrize("kept", [3, 12, 20, 38])
def test_a_file_that_is_cut_off(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.tfrecord"
    path.write_bytes(GOLDEN * 2 + GOLDEN[:kept])
    for read in (ids, Records):
        with pytest.raises(ValueError, match=r"a.tfrecord: record 2: cut off after \d+ .*bytes: copy"):
            read(path)


def test_an_index_of_another_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tfrecord", [[1, 2], [3]])
    for text in ("0 39\n", "0 10\n20 8\n", "no\n"):
        index_path(path).write_text(text)
        with pytest.raises(ValueError, match=r"a.tfrecord.index"):
            Records(path)


@pytest.mark.parametrize(
    "payload", [b"\xff\xff", b"\x0a\x05ab", b"\x0a\x02\x0a\x7f", b"\x0a\x06\x0a\x04\x12\x02\x0a\x05"]
)
def test_a_payload_that_is_no_example(payload: bytes) -> None:
    with pytest.raises(ValueError, match="here: not a tf.train.Example"):
        decode_example(payload, "here")
