"""`from_pretrained` on the CPU leaves weights in the file they lie in: which ones, and that neither changes the other."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accessory.checkpoint.formats_read import TorchFile
from accessory.model import Transformer, pretrained
from accessory.model.lora import TuningArgs
from accessory.model.pretrained import build, fill, open_pretrained
from accessory.weights import TensorSource, read_into, view
from accessory.weights.hf import ToHF, config_from_args
from accessory.weights.peft import _Turned
from tests.helpers import random_weights, tiny_args, write_tiny_checkpoint

TOKENS = torch.arange(1, 13).view(1, -1)
ARGS = tiny_args(vocab_size=320, dim=192, hidden_dim=256)  # matrices of more than a page


def written(directory: Path, kind: str, shards: int = 1, dtype: torch.dtype = torch.float32) -> Path:
    """The same weights, as Meta's .pth or as Hugging Face's safetensors."""
    if kind == "meta":
        return write_tiny_checkpoint(directory, ARGS, shards=shards, dtype=dtype)
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    source = ToHF(TensorSource(random_weights(ARGS, 0, dtype)), ARGS)
    save_file({n: source.read(n) for n in source.names()}, directory / "model.safetensors")
    (directory / "config.json").write_text(
        json.dumps(config_from_args(replace(ARGS, tie_word_embeddings=False), dtype))
    )
    return directory


def in_files(model: torch.nn.Module, directory: Path) -> set[str]:
    """Parameters whose first number is in memory that maps a file of `directory`."""
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(directory) in line:
            first, last = line.split()[0].split("-")
            spans.append((int(first, 16), int(last, 16)))
    return {n for n, p in model.named_parameters() if any(a <= p.data_ptr() < b for a, b in spans)}


def digests(directory: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in directory.iterdir()}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks where memory comes from")
@pytest.mark.parametrize(
    "kind, shards, dtype, copied",
    [
        ("meta", 1, None, ()),
        ("hf", 1, None, ("wq.", "wk.")),  # whose rows are in another order there
        ("meta", 2, None, ("tok_", "output.", "attention.", "feed_forward.")),  # put together; norms are whole in each
        ("meta", 1, torch.bfloat16, ("",)),
    ],
)
def test_what_the_file_holds_as_it_is_wanted_stays_there(kind, shards, dtype, copied, tmp_path: Path) -> None:
    directory = written(tmp_path / "model", kind, shards)
    mapped = Transformer.from_pretrained(directory, dtype=dtype)
    names = {n for n, _ in mapped.named_parameters()}
    assert in_files(mapped, directory) == {n for n in names if not any(part in n for part in copied)}
    plain = Transformer.from_pretrained(directory, dtype=dtype, mapped=False)
    assert not in_files(plain, directory)
    assert all(torch.equal(p, q) and p.is_contiguous() for p, q in zip(mapped.parameters(), plain.parameters()))
    assert torch.equal(mapped(TOKENS), plain(TOKENS))


@pytest.mark.parametrize("kind", ["meta", "hf"])
def test_training_in_place_leaves_the_file_alone(kind: str, tmp_path: Path) -> None:
    directory = written(tmp_path / "model", kind)
    before = digests(directory)
    model = Transformer.from_pretrained(directory)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(TOKENS, labels=TOKENS)[0].backward()
    optimizer.step()
    assert digests(directory) == before
    again = Transformer.from_pretrained(directory)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


@pytest.mark.parametrize("kind", ["meta", "hf"])
def test_a_file_that_is_replaced_or_deleted_changes_no_model(kind: str, tmp_path: Path) -> None:
    directory = written(tmp_path / "model", kind)
    model = Transformer.from_pretrained(directory)
    truth = Transformer.from_pretrained(directory, mapped=False)
    for file in directory.iterdir():
        new = file.with_suffix(".new")
        new.write_bytes(bytes(file.stat().st_size))
        os.replace(new, file)
    assert torch.equal(model(TOKENS), truth(TOKENS))
    shutil.rmtree(directory)
    assert torch.equal(model(TOKENS), truth(TOKENS))


def test_two_names_of_one_storage_are_two_parameters(tmp_path: Path) -> None:
    """torch.save keeps what was one tensor one; a model whose head is its own trains it apart from the embedding."""
    directory = written(tmp_path / "model", "meta")
    tensors = torch.load(directory / "consolidated.00.pth", weights_only=True)
    tensors["output.weight"] = tensors["tok_embeddings.weight"]
    torch.save(tensors, directory / "consolidated.00.pth")
    (directory / "params.json").write_text(json.dumps(ARGS.to_dict() | {"tie_word_embeddings": False}))
    model = Transformer.from_pretrained(directory)
    with torch.no_grad():
        model.output.weight.add_(1)
    assert torch.equal(model.tok_embeddings.weight, tensors["tok_embeddings.weight"])


def test_a_run_copies_all(tmp_path: Path) -> None:
    directory = written(tmp_path / "model", "meta")
    checkpoint, args = open_pretrained(directory)
    model = build(checkpoint, args, TuningArgs())
    fill(model, checkpoint, lambda name: None)
    assert not in_files(model, directory)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks where memory comes from")
@pytest.mark.parametrize("kind, shards", [("meta", 1), ("meta", 2), ("hf", 1)])
def test_a_gpu_is_sent_the_files_own_pages(kind: str, shards: int, tmp_path: Path, monkeypatch) -> None:
    """As on a GPU, whose `to` is the only copy; here it copies nothing, so parameters lie in the file."""
    directory = written(tmp_path / "model", kind, shards, torch.bfloat16)
    truth = Transformer.from_pretrained(directory, dtype=torch.float32, mapped=False)
    monkeypatch.setattr(pretrained, "on_host", lambda device: False)
    read, copied = TorchFile.read, []
    monkeypatch.setattr(TorchFile, "read", lambda self, name, *part: copied.append(name) or read(self, name, *part))
    for dtype in (torch.bfloat16, torch.float32):
        checkpoint, args = open_pretrained(directory)
        model = build(checkpoint, args, TuningArgs())
        fill(model, checkpoint, lambda name, dtype=dtype: dtype)
        assert all(torch.equal(p.float(), q) for p, q in zip(model.parameters(), truth.parameters()))
        assert all("norm" in name for name in copied)  # of two files: compared
        assert bool(in_files(model, directory)) == (dtype == torch.bfloat16)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks where memory comes from")
@pytest.mark.parametrize("name, dim", [("layers.0.attention.wq.weight", 0), ("layers.1.feed_forward.w2.weight", 1)])
def test_a_ranks_part_that_lies_in_one_of_the_files_stays_there(name: str, dim: int, tmp_path: Path) -> None:
    directory = written(tmp_path / "model", "meta", shards=2)
    source = open_pretrained(directory)[0].source
    whole, size = source.read(name), source.shape(name)[dim]
    holder = torch.nn.Module()
    for start, stop, stays in [(0, size // 2, True), (size // 2, size, True), (size // 4, size // 4 * 3, False)]:
        found = view(source, name, dim, start, stop)
        assert torch.equal(found, whole.narrow(dim, start, stop - start))
        holder.part = torch.nn.Parameter(found, requires_grad=False)
        assert bool(in_files(holder, directory)) == stays


@pytest.mark.parametrize("part", [(), (0, 1, 4), (1, 2, 3)])
def test_what_is_turned_is_turned_however_it_is_read(part: tuple, tmp_path: Path) -> None:
    torch.save({"a": torch.arange(30.0).view(5, 6)}, tmp_path / "a.pth")
    source = _Turned(TorchFile(tmp_path / "a.pth"), {"turned": "a", "plain": "a"}, {"turned": torch.Tensor.t})
    for name, truth in (("turned", torch.arange(30.0).view(5, 6).t()), ("plain", torch.arange(30.0).view(5, 6))):
        truth = truth.narrow(part[0], part[1], part[2] - part[1]) if part else truth
        into = torch.empty(truth.shape)
        read_into(into, source, name, *part)
        assert all(torch.equal(found, truth) for found in (source.read(name, *part), view(source, name, *part), into))
