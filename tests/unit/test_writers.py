"""Writers that hold one tensor: their files are those of torch and safetensors, bit by bit; what a conversion reports."""

import errno
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from accessory.checkpoint import formats_stream
from accessory.checkpoint.formats_stream import finish_torch, layout_torch, specs_of, write_safetensors, write_torch
from accessory.checkpoint.formats_write import new_directory, write_consolidated, write_hf, write_meta
from accessory.model.args import ModelArgs
from accessory.weights import expected_shapes
from accessory.weights.report import mapping_lines


def odd_tensors() -> dict[str, torch.Tensor]:
    """Every dtype that checkpoints have, sizes that align with nothing, views, and tensors without a number in them."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(51, 33, generator=generator)
    return {
        "flag": torch.tensor([True]),
        "tok_embeddings.weight": plain.bfloat16(),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "transposed": plain.T,
        "columns": plain[:, 3:5].half(),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "norm.weight": torch.full((5,), torch.nan),
        "numbers": torch.arange(9).to(torch.int64),
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    def bits(t):
        return t.contiguous().flatten().view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def same(loaded: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> bool:
    return loaded.keys() == tensors.keys() and all(same_bits(loaded[n], t) for n, t in tensors.items())


def backwards(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    yield from reversed(tensors.items())


@pytest.mark.parametrize("order", [dict.items, backwards])
def test_a_pth_is_the_one_that_torch_save_writes(tmp_path: Path, order) -> None:
    tensors, file, peer = odd_tensors(), tmp_path / "ours/x.pth", tmp_path / "theirs/x.pth"
    file.parent.mkdir()
    peer.parent.mkdir()
    write_torch(file, specs_of(tensors), order(tensors))
    for mapped in (False, True):
        loaded = torch.load(file, weights_only=True, mmap=mapped)
        assert list(loaded) == list(tensors) and same(loaded, tensors)
    torch.save({n: t.contiguous().clone() for n, t in tensors.items()}, peer)
    with zipfile.ZipFile(file) as ours, zipfile.ZipFile(peer) as theirs:
        assert ours.testzip() is None
        for a, b in zip(ours.infolist(), theirs.infolist(), strict=True):
            assert (a.filename, a.header_offset, a.file_size) == (b.filename, b.header_offset, b.file_size)
            assert a.CRC == b.CRC or a.filename == "x/.data/serialization_id"  # a hash that only torch makes
        end = ours.getinfo("x/.data/serialization_id").header_offset
    ours_bytes, their_bytes = file.read_bytes(), peer.read_bytes()
    assert ours_bytes[:end] == their_bytes[:end] and len(ours_bytes) == len(their_bytes)


WRITER = (
    "import os, sys; f = os.open(sys.argv[1], os.O_RDWR); os.pwrite(f, bytes.fromhex(sys.argv[3]), int(sys.argv[2]))"
)


def test_processes_write_their_parts_of_one_file(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(6, 5), "b.weight": torch.randn(3).bfloat16(), "none": torch.empty(0)}
    alone, file = tmp_path / "alone/x.pth", tmp_path / "together/x.pth"
    alone.parent.mkdir()
    file.parent.mkdir()
    write_torch(alone, specs_of(tensors), tensors.items())
    offsets = layout_torch(file, specs_of(tensors))
    assert list(offsets) == list(tensors) and all(offset % 64 == 0 for offset in offsets.values())
    rows = tensors["a.weight"].view(torch.uint8).numpy()
    parts = [(offsets["a.weight"], rows[:4]), (offsets["a.weight"] + 4 * 20, rows[4:])]
    parts.append((offsets["b.weight"], tensors["b.weight"].view(torch.uint8).numpy()))
    running = [
        subprocess.Popen([sys.executable, "-c", WRITER, file, str(at), data.tobytes().hex()]) for at, data in parts
    ]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert same(torch.load(file, weights_only=True), tensors)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() == "x/data/0"  # its CRC is not there yet
    finish_torch(file)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
    assert file.read_bytes() == alone.read_bytes()


def test_offsets_beyond_4_gib(tmp_path: Path) -> None:
    file = tmp_path / "big.pth"  # a hole: it takes a few KB of disk
    specs = {"big": ((2**32 + 3,), torch.uint8), "wide": ((2**30,), torch.bfloat16), "small": ((3,), torch.float32)}
    offset = layout_torch(file, specs)["small"]
    data = torch.tensor([1.0, 2.0, 3.0])
    with open(file, "r+b") as handle:
        handle.seek(offset)
        handle.write(data.numpy().tobytes())
        crc = formats_stream.zlib.crc32(data.numpy().tobytes())
        formats_stream._put_crc(handle, formats_stream._records(file)[2], crc)
    assert offset > 6 * 2**30 and file.stat().st_blocks * 512 < 2**20
    assert torch.equal(torch.load(file, weights_only=True, mmap=True)["small"], data)
    with zipfile.ZipFile(file) as archive:
        assert archive.read("big/data/2") == data.numpy().tobytes()  # compares the CRC


@pytest.mark.parametrize("order", [dict.items, backwards])
def test_a_safetensors_file_is_one_for_the_library(tmp_path: Path, order) -> None:
    tensors, file = odd_tensors(), tmp_path / "model.safetensors"
    write_safetensors(file, specs_of(tensors), order(tensors))
    assert same(load_file(file), tensors)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.itemsize == 0, name
    umask = os.umask(0)
    os.umask(umask)
    assert length % 8 == 0 and file.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("write", [write_torch, write_safetensors])
def test_what_comes_must_be_what_was_announced(tmp_path: Path, write) -> None:
    tensors = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
    for wrong, message in (
        ([("a", tensors["a"])], r"\['b'\] never came"),
        ([*tensors.items(), ("a", tensors["a"])], r"a is \(3,\) torch.float32, announced was"),
        ([("a", tensors["a"].half())], r"a is \(3,\) torch.float16, announced was \(3,\) torch.float32"),
        ([("b", torch.zeros(4))], r"b is \(4,\) .*announced was \(2, 2\)"),
    ):
        with pytest.raises(AssertionError, match=message):
            write(tmp_path / "x", specs_of(tensors), wrong)


class Made:
    """A Source that makes its tensors when they are read, and notes how much memory was anonymous at that moment."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes, self.start, self.peak = shapes, anonymous(), 0

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> torch.Tensor:
        self.peak = max(self.peak, anonymous() - self.start)
        shape = list(self.shapes[name])
        if dim is not None:
            shape[dim] = (shape[dim] if stop is None else stop) - start
        return torch.full(shape, 1.0, dtype=torch.bfloat16)


def anonymous() -> int:
    """Bytes of this process that belong to no file."""
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["meta", "meta in fp32", "hf", "consolidated"])
def test_writing_holds_a_tensor_and_not_the_file(tmp_path: Path, kind: str) -> None:
    args = ModelArgs(dim=1024, n_layers=8, n_heads=8, vocab_size=512, hidden_dim=2048, tie_word_embeddings=True)
    source = Made(expected_shapes(args, True))  # 168 MB, the largest tensor 4 MB
    if kind == "hf":
        files = write_hf(tmp_path, source, args)
    elif kind == "consolidated":
        specs = {n: (source.shape(n), source.dtype(n)) for n in source.names()}
        tensors = ((n, source.read(n)) for n in source.names())
        files = [write_consolidated(tmp_path, tensors, specs=specs)]
    else:
        files = write_meta(tmp_path, source, args.to_dict(), dtype=torch.float32 if kind.endswith("fp32") else None)
    assert len(files) == 1 and files[0].stat().st_size > 160 * 2**20
    assert source.peak < 40 * 2**20, f"{source.peak / 2**20:.0f} MiB"


def test_a_disk_that_fills_up_while_tensors_are_written(tmp_path: Path, monkeypatch) -> None:
    def full(handle, offset, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(formats_stream, "_write_at", full)
    tensors = {"norm.weight": torch.ones(3)}
    for write in (write_torch, write_safetensors):
        with pytest.raises(ValueError, match=r"x\.pth: could not be written, \d+ MiB are free .*No space left"):
            write(tmp_path / "x.pth", specs_of(tensors), tensors.items())


def test_trouble_with_the_source_is_not_called_a_full_disk_and_leaves_nothing(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(3)
        raise FileNotFoundError(errno.ENOENT, "gone", "shard 2")

    specs = {"a": ((3,), torch.float32), "b": ((3,), torch.float32)}
    with pytest.raises(FileNotFoundError, match="gone"), new_directory(tmp_path / "out") as directory:
        write_consolidated(directory, tensors(), specs=specs)
    assert list(tmp_path.iterdir()) == []


def test_the_report_folds_layers_and_shows_the_odd_one() -> None:
    pairs = [("tok_embeddings.weight", "model.embed_tokens.weight", (32000, 64), torch.bfloat16)]
    for i in range(32):
        rows = 32 if i == 7 else 64
        name = f"layers.{i}.attention.wq.weight"
        pairs.append((name, f"model.layers.{i}.self_attn.q_proj.weight", (rows, 64), torch.bfloat16))
    pairs.append(("norm.weight", "norm.weight", (64,), torch.float32))
    assert [" ".join(line.split()) for line in mapping_lines(pairs)] == [
        "tok_embeddings.weight -> model.embed_tokens.weight 32000x64 bf16",
        "layers.{0..6,8..31}.attention.wq.weight -> model.layers.{0..6,8..31}.self_attn.q_proj.weight 31 x 64x64 bf16",
        "layers.7.attention.wq.weight -> model.layers.7.self_attn.q_proj.weight 32x64 bf16",
        "norm.weight 64 fp32",
    ]
    moved = [(f"blk.{i}.ffn.weight", f"layers.{j}.w1.weight", (2, 2), torch.float16) for i, j in ((0, 0), (2, 1))]
    assert mapping_lines(moved) == ["blk.{0,2}.ffn.weight -> layers.{0..1}.w1.weight   2 x 2x2 fp16"]
    assert mapping_lines([]) == []
