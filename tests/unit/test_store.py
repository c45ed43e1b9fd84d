"""The store's files: what is in them, opening at any size, and every way in which a store is not whole."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from accessory.data import store as stores
from accessory.data.store import ENDS, META, TOKENS, Store, token_dtype
from tests.helpers import least_cpu_seconds

TOKENIZER = SimpleNamespace(fingerprint="abc", path=Path("tok.model"), vocab_size=320)


def write_store(directory: Path, documents: list[list[int]], vocab_size: int = 320, **settings) -> Path:
    """A store by hand, as docs/data.md has it."""
    directory.mkdir(parents=True)
    dtype = token_dtype(vocab_size)
    np.array([i for d in documents for i in d], dtype).tofile(directory / TOKENS)
    np.cumsum([len(d) for d in documents]).astype("<i8").tofile(directory / ENDS)
    sizes = {"tokens": sum(len(d) for d in documents), "documents": len(documents), "vocab_size": vocab_size}
    write_meta(directory, dtype, **sizes, **settings)
    return directory


def write_meta(
    directory: Path,
    dtype: np.dtype,
    tokens: int,
    documents: int,
    hashed: bool = True,
    vocab_size: int = 320,
    **settings,
) -> None:
    known = {
        "name": "tok.model",
        "kind": "hf",
        "vocab_size": vocab_size,
        "fingerprint": "abc",
        "bos_id": 1,
        "eos_id": 2,
    }
    content = {"format": "accessory token store", "version": 1, "dtype": dtype.str[1:], "tokens": tokens}
    content |= {"documents": documents, "tokenizer": known, "sources": []}
    content["settings"] = {"blocks": "none", "block_size": None} | settings
    content["files"] = {n: {"sha256": stores.sha256(directory / n) if hashed else ""} for n in (TOKENS, ENDS)}
    (directory / META).write_text(json.dumps(content))


def test_documents_are_what_was_written(tmp_path: Path) -> None:
    documents = [[1, 2, 3], [4], [5, 6], [319] * 10]
    store = Store.open(write_store(tmp_path / "s", documents))
    assert len(store) == 4 and [store.document(i).tolist() for i in range(4)] == documents
    assert store.tokens.dtype == np.uint16 and len(store.tokens) == 16
    store.verify()


@pytest.mark.parametrize("vocab_size, dtype", [(2, "uint16"), (65535, "uint16"), (65536, "uint32"), (128256, "uint32")])
def test_the_dtype_holds_the_vocabulary(vocab_size: int, dtype: str, tmp_path: Path) -> None:
    assert token_dtype(vocab_size) == dtype and np.iinfo(token_dtype(vocab_size)).max >= vocab_size - 1
    store = Store.open(write_store(tmp_path / "s", [[0, vocab_size - 1]], vocab_size))
    assert store.document(0).tolist() == [0, vocab_size - 1]


def test_ends_between(tmp_path: Path) -> None:
    store = Store.open(write_store(tmp_path / "s", [[1] * n for n in (3, 1, 2, 10)]))  # ends 3 4 6 16
    cases = [((0, 16), [3, 4, 6]), ((3, 6), [4]), ((2, 4), [3]), ((6, 16), []), ((7, 9), []), ((0, 3), [])]
    assert [(span, store.ends_between(*span).tolist()) for span, _ in cases] == cases


def test_opening_and_looking_up_cost_nothing_at_100_gb(tmp_path: Path) -> None:
    directory, count = tmp_path / "s", 5 * 10**10
    directory.mkdir()
    with open(directory / TOKENS, "wb") as file:
        file.truncate(count * 2)  # sparse
    documents = 10**6
    (np.arange(1, documents + 1) * (count // documents)).astype("<i8").tofile(directory / ENDS)
    write_meta(directory, np.dtype("<u2"), count, documents, hashed=False)
    assert os.stat(directory / TOKENS).st_size == 10**11

    def look() -> None:
        store = Store.open(directory)
        assert store.ends_between(count - 60_000, count).tolist() == [count - 50_000]
        assert store.document(documents - 1).sum() == 0

    assert least_cpu_seconds(look)[0] < 0.5


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no token store, meta.json is missing: build one with tools/build_corpus.py"):
        Store.open(tmp_path)
    (tmp_path / "s.part").mkdir()
    with pytest.raises(ValueError, match="s: only begun .*s.part.: run the same tools/build_corpus.py"):
        Store.open(tmp_path / "s")


@pytest.mark.parametrize("name", [TOKENS, ENDS])
@pytest.mark.parametrize("cut", [1, 2, 8, None])
def test_a_truncated_store_is_named(tmp_path: Path, name: str, cut: int | None) -> None:
    file = write_store(tmp_path / "s", [[1, 2, 3, 4], [5]]) / name
    if cut is None:
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - cut)
    with pytest.raises(ValueError, match=f"s/{name} (has .* bytes|is missing), the store is incomplete: copy it again"):
        Store.open(tmp_path / "s")


def test_a_longer_file_is_no_whole_store(tmp_path: Path) -> None:
    with open(write_store(tmp_path / "s", [[1, 2]]) / TOKENS, "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(ValueError, match="has 6 of 4 bytes"):
        Store.open(tmp_path / "s")


def test_another_version_and_no_description(tmp_path: Path) -> None:
    meta = write_store(tmp_path / "s", [[1, 2]]) / META
    meta.write_text(meta.read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(ValueError, match="version 7; this program reads 1: build it again"):
        Store.open(tmp_path / "s")
    for text in ("{", "[]", "{}"):
        meta.write_text(text)
        with pytest.raises(ValueError, match="meta.json: not the description of a token store"):
            Store.open(tmp_path / "s")


def test_another_tokenizer(tmp_path: Path) -> None:
    store = Store.open(write_store(tmp_path / "s", [[1, 2]]))
    store.require(TOKENIZER)
    with pytest.raises(ValueError, match="s: built with another tokenizer .tok.model, 320 tokens. than b.json .9."):
        store.require(SimpleNamespace(fingerprint="other", path=Path("b.json"), vocab_size=9))


@pytest.mark.parametrize("name", [TOKENS, ENDS])
def test_verify_finds_one_changed_byte(tmp_path: Path, name: str) -> None:
    file = write_store(tmp_path / "s", [[1, 2, 3], [4, 5]]) / name
    data = bytearray(file.read_bytes())
    data[2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"s/{name}: not what was built"):
        Store.open(tmp_path / "s").verify()


def test_tfrecord_output_is_no_store(tmp_path: Path) -> None:
    directory = write_store(tmp_path / "s", [[1, 2]])
    meta = json.loads((directory / META).read_text())
    for name in (TOKENS, ENDS):
        (directory / name).unlink()
        del meta["files"][name]
    (directory / META).write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="TFRecord files, no token store: give them to tools/build_corpus.py"):
        Store.open(directory)
