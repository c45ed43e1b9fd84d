"""Files made to harm: each is refused in one line, nothing in it is run, nothing is written outside the output directory.

What a symlink may do: a weight file may be one (Hugging Face's cache keeps every file as snapshots/REV/x -> ../../blobs/HASH),
a name inside an index may not lead anywhere: it is a plain name in the directory.
"""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.formats_write import write_hf, write_meta
from accessory.model.args import ModelArgs
from accessory.weights import TensorSource
from tests.unit.test_reshard import random_tensors
from tools import hf_to_meta, meta_to_hf, reshard

ARGS = ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=11, hidden_dim=16, tie_word_embeddings=False)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return random_tensors(ARGS, dtype=torch.bfloat16)


def listing(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.lstat().st_mtime_ns for p in sorted(root.rglob("*"))}


def refused(root: Path, directory: Path, message: str, tool: Callable = reshard.main, **keys) -> None:
    """The tool says no in one line and leaves everything under `root` as it was, without a DST or a part of one."""
    before = listing(root)
    with pytest.raises(ValueError, match=message) as caught:
        tool(src=str(directory), dst=str(root / "dst"), **keys)
    assert "\n" not in str(caught.value) and listing(root) == before


# ---- pickles that hold code


class Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Callable, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch(command: str = "touch pwned") -> dict[str, bytes]:
    """Pickles of several kinds, each of which makes a file when it is loaded without care."""
    inner = io.BytesIO()
    torch.save(Calls(os.system, command), inner)
    code = f"open('pwned', 'w')"  # noqa: F541
    kinds = {
        "os.system": Calls(os.system, command),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "open": Calls(open, "pwned", "w"),
        "a pickle inside a pickle": Calls(torch.storage._load_from_bytes, inner.getvalue()),
        "torch.load": Calls(torch.load, "consolidated.00.pth"),
        "torch.hub": Calls(torch.hub.load, ".", "model"),
        "attributes": Calls(getattr, "text", "format"),
        "import": Calls(__import__, "antigravity"),
        "beside tensors": {"norm.weight": torch.ones(2).tolist(), "x": Calls(os.system, command)},
        "as a name": {Calls(os.system, command): 1},
    }
    made = {f"{k}, protocol {p}": pickle.dumps(v, protocol=p) for k, v in kinds.items() for p in (2, 4)}
    made["inst"] = f"(S'{command}'\nios\nsystem\n.".encode()
    made["obj"] = b"(cos\nsystem\n" + f"S'{command}'\no.".encode()
    made["build"] = b"ctorch._tensor\nTensor\n)\x81}S'__setstate__'\ncos\nsystem\nsb."
    made["extension"] = b"\x82\x01."
    return made


def with_pickle(file: Path, payload: bytes) -> None:
    """The same zip with another data.pkl."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(file.with_suffix(".new"), "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, payload if entry.filename.endswith("data.pkl") else old.read(entry.filename))
    os.replace(file.with_suffix(".new"), file)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["consolidated.00.pth", "consolidated.00-of-01.model.pth", "pytorch_model.bin"])
def test_no_pickle_is_run(tmp_path: Path, monkeypatch, tensors, name: str) -> None:
    src = tmp_path / "src"
    src.mkdir()
    monkeypatch.chdir(tmp_path)
    write_hf(src, TensorSource(tensors), ARGS)
    (src / "model.safetensors").unlink()
    if name != "pytorch_model.bin":
        (src / "config.json").unlink()
    for kind, payload in touch().items():
        torch.save(tensors, src / name)
        with_pickle(src / name, payload)
        try:
            refused(tmp_path, src, rf"{name}: ", mp=1)
        except AssertionError as error:
            raise AssertionError(kind) from error
        assert not list(tmp_path.rglob("pwned"))
    torch.save(tensors, src / name)
    with_pickle(src / name, touch()["os.system, protocol 2"])
    torch.load(src / name, weights_only=False)
    assert (tmp_path / "pwned").exists()  # the payloads are live ones


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "value",
    [
        torch.empty(4, device="meta"),
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        quantised,
        torch.zeros(1).expand(2**40),
        torch.zeros(4).as_strided((2**20, 2**20), (0, 0)),
        "text",
        [torch.ones(1)],
        {"deeper": torch.ones(1)},
    ],
    ids=["meta", "sparse", "csr", "quantised", "expanded", "strided", "text", "list", "dict"],
)
def test_only_plain_tensors_are_taken(tmp_path: Path, value) -> None:
    (tmp_path / "src").mkdir()
    try:
        value = value() if callable(value) else value
    except RuntimeError:
        pytest.skip("this torch cannot make such a tensor")
    torch.save({"norm.weight": value}, tmp_path / "src/consolidated.00.pth")
    refused(tmp_path, tmp_path / "src", r"consolidated\.00\.pth: ", mp=1)


# ---- zips that lie


def flip(data: bytearray, at: int, value: int = 0xFF) -> None:
    data[at] ^= value


def entry_at(data: bytes, ending: bytes) -> int:
    """Where the central directory's entry for the name with that ending begins."""
    return data.rindex(b"PK\x01\x02", 0, data.rindex(ending))


@pytest.fixture
def meta(tmp_path: Path, tensors) -> Path:
    (tmp_path / "src").mkdir()
    write_meta(tmp_path / "src", TensorSource(tensors), ARGS.to_dict())
    return tmp_path / "src"


@pytest.mark.parametrize("field, value", [(20, 2**31), (24, 2**31), (42, 2**31)], ids=["packed", "size", "offset"])
@pytest.mark.parametrize("entry", [b"data.pkl", b"data/1"])
def test_a_zip_directory_that_lies(tmp_path: Path, meta: Path, entry: bytes, field: int, value: int) -> None:
    file = meta / "consolidated.00.pth"
    data = bytearray(file.read_bytes())
    at = entry_at(data, entry) + field
    data[at : at + 4] = struct.pack("<I", value)
    file.write_bytes(data)
    refused(tmp_path, meta, r"consolidated\.00\.pth: ", mp=1)


def test_compressed_entries(tmp_path: Path, meta: Path) -> None:
    file = meta / "consolidated.00.pth"
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(meta / "new", "w") as new:
        for i, entry in enumerate(old.infolist()):
            packed = zipfile.ZIP_DEFLATED if i == len(old.infolist()) - 4 else zipfile.ZIP_STORED
            new.writestr(entry.filename, old.read(entry.filename), packed)
    os.replace(meta / "new", file)
    refused(tmp_path, meta, r"holds compressed entries", mp=1)


@pytest.mark.parametrize("kept", [0, 1, 31])
def test_a_tensor_that_claims_more_than_its_record(tmp_path: Path, meta: Path, kept: int) -> None:
    file = meta / "consolidated.00.pth"
    last = sorted(name for name in zipfile.ZipFile(file).namelist() if "data/" in name and name[-1].isdigit())[-1]
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(meta / "new", "w") as new:
        for entry in old.infolist():  # the last tensor is cut short, and what would follow it is put before
            if entry.filename != last:
                new.writestr(entry.filename, old.read(entry.filename))
        new.writestr(last, old.read(last)[:kept])
    os.replace(meta / "new", file)
    refused(tmp_path, meta, r"consolidated\.00\.pth: ", mp=1)


@pytest.mark.parametrize("seed", range(3))
def test_bits_flipped_in_headers_never_crash_and_never_run(tmp_path: Path, meta: Path, seed: int) -> None:
    """Wherever the bit lies, the file is read as it was, or refused in one line; and never is anything else raised."""
    file, data = meta / "consolidated.00.pth", (meta / "consolidated.00.pth").read_bytes()
    generator = torch.Generator().manual_seed(seed)
    pickle_end = data.index(b".PK\x07\x08")
    directory = data.index(b"PK\x01\x02")
    for _ in range(150):
        span = (30, pickle_end) if torch.rand(1, generator=generator) < 0.5 else (directory, len(data))
        at = int(torch.randint(*span, (1,), generator=generator))
        damaged = bytearray(data)
        flip(damaged, at, 1 << int(torch.randint(8, (1,), generator=generator)))
        file.write_bytes(damaged)
        one_line(meta)


def one_line(directory: Path) -> None:
    try:
        source = open_checkpoint(directory).source
        for name in source.names():
            source.read(name)
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_truncated_anywhere(tmp_path: Path, meta: Path, part: float) -> None:
    file = meta / "consolidated.00.pth"
    os.truncate(file, int(file.stat().st_size * part))
    refused(tmp_path, meta, r"consolidated\.00\.pth: .*(truncated or damaged|not a torch)", mp=1)


# ---- safetensors headers that lie


@pytest.fixture
def hub(tmp_path: Path, tensors) -> Path:
    (tmp_path / "src").mkdir()
    write_hf(tmp_path / "src", TensorSource(tensors), ARGS)
    return tmp_path / "src"


def parts(file: Path) -> tuple[dict, bytes]:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def written(file: Path, header: dict | bytes, data: bytes, length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


NORM, WQ = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


def beyond(header: dict) -> None:
    first, last = header[NORM]["data_offsets"]
    header[NORM]["data_offsets"] = [first + 2**40, last + 2**40]


def backwards(header: dict) -> None:
    header[NORM]["data_offsets"] = header[NORM]["data_offsets"][::-1]


def overlap(header: dict) -> None:
    header[WQ]["data_offsets"] = header["model.layers.0.self_attn.k_proj.weight"]["data_offsets"]


def negative_offset(header: dict) -> None:
    header[NORM]["data_offsets"] = [-32, 0]


def negative(header: dict) -> None:
    header[WQ]["shape"] = [-16, -16]


def huge(header: dict) -> None:
    header[WQ]["shape"] = [2**62, 2**62]


def wraps(header: dict) -> None:
    header[WQ]["shape"] = [2**32, 2**32, 0, 16]


def larger(header: dict) -> None:
    header[WQ]["shape"] = [16, 17]


def words(header: dict) -> None:
    header[WQ]["shape"] = "16x16"


def no_shape(header: dict) -> None:
    del header[WQ]["shape"]


def other_dtype(header: dict) -> None:
    header[WQ]["dtype"] = "F64"


def strange_dtype(header: dict) -> None:
    header[WQ]["dtype"] = "__import__"


def no_entry(header: dict) -> None:
    header[WQ] = None


@pytest.mark.parametrize(
    "damage",
    [beyond, backwards, overlap, negative_offset, negative, huge, wraps, larger, words, no_shape, other_dtype]
    + [strange_dtype, no_entry],
)
def test_a_safetensors_header_that_lies(tmp_path: Path, hub: Path, damage) -> None:
    header, data = parts(hub / "model.safetensors")
    damage(header)
    written(hub / "model.safetensors", header, data)
    refused(tmp_path, hub, r"model\.safetensors: ", hf_to_meta.main)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_that_lies(tmp_path: Path, hub: Path, length: int) -> None:
    header, data = parts(hub / "model.safetensors")
    written(hub / "model.safetensors", header, data, length)
    refused(tmp_path, hub, rf"model\.safetensors: .*its header claims {length} bytes", hf_to_meta.main)


def test_headers_that_are_no_header(tmp_path: Path, hub: Path) -> None:
    header, data = parts(hub / "model.safetensors")
    twice = json.dumps(header)[:-1] + f', "{NORM}": ' + json.dumps(header[WQ]) + "}"
    same_twice = json.dumps(header)[:-1] + f', "{NORM}": ' + json.dumps(header[NORM]) + "}"
    for raw in (b"[]", b"{}", b"null", b"{" * 5000, b"\xff" * 64, twice.encode(), same_twice.encode(), b"[" * 10**6):
        written(hub / "model.safetensors", raw, data)
        refused(tmp_path, hub, r"model\.safetensors: |the weights: ", hf_to_meta.main)


# ---- names that lead out of the directory, and JSON that is not what it should be


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\\b", "x\0y", 7, None, ["x"], {"a": 1}],
)
def test_an_index_names_files_of_its_directory_only(tmp_path: Path, hub: Path, index: str, name) -> None:
    shutil.move(hub / "model.safetensors", tmp_path / "x.safetensors")
    (hub / "sub").mkdir()
    shutil.copy(tmp_path / "x.safetensors", hub / "sub/x.safetensors")
    (hub / index).write_text(json.dumps({"weight_map": {NORM: name}}))
    refused(
        tmp_path, hub, rf"{index}: model\.norm\.weight is said to be in .*no file of this directory", hf_to_meta.main
    )


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{", "\xff", "[" * 10**5])
def test_an_index_that_is_none(tmp_path: Path, hub: Path, content: str) -> None:
    (hub / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    refused(tmp_path, hub, r"model\.safetensors\.index\.json: ", hf_to_meta.main)


def test_the_cache_of_hugging_face_is_read_through_its_links(tmp_path: Path, hub: Path, tensors) -> None:
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(list(hub.iterdir())):
        file.rename(blobs / f"{i:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{i:064x}")
    source = open_checkpoint(snapshot).source
    assert all(torch.equal(source.read(n), t) for n, t in tensors.items())
    hf_to_meta.main(src=str(snapshot), dst=str(tmp_path / "dst"))
    assert not any(p.is_symlink() for p in (tmp_path / "dst").iterdir())


def test_links_that_lead_nowhere_or_in_a_circle(tmp_path: Path, hub: Path) -> None:
    (hub / "model.safetensors").unlink()
    (hub / "model.safetensors").symlink_to("model.safetensors")
    refused(tmp_path, hub, "src", hf_to_meta.main)
    index = {"weight_map": {NORM: "model-00001-of-00001.safetensors"}}
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    (hub / "model-00001-of-00001.safetensors").symlink_to("nowhere")
    refused(
        tmp_path, hub, r"model-00001-of-00001\.safetensors: this file of the checkpoint is missing", hf_to_meta.main
    )


@pytest.mark.parametrize(
    "key, value",
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", "two"),
        ("hidden_size", -16),
        ("hidden_size", 10**12),
        ("hidden_size", [16]),
        ("num_attention_heads", 0),
        ("num_attention_heads", 3),
        ("num_key_value_heads", 10**6),
        ("head_dim", 7),
        ("vocab_size", 2**70),
        ("intermediate_size", {}),
        ("rope_scaling", "yarn"),
        ("rope_parameters", [1]),
    ],
)
def test_a_config_that_lies(tmp_path: Path, hub: Path, key: str, value) -> None:
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(config | {key: value}))
    refused(tmp_path, hub, r"^params: |does not fit the model|config\.json: ", hf_to_meta.main)


# ---- what goes wrong half-way


def test_a_failure_half_way_leaves_no_dst(tmp_path: Path, meta: Path, monkeypatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr("accessory.checkpoint.formats_read.TorchFile.read", failing_read(calls))
    refused(tmp_path, meta, "truncated", mp=2)
    calls.clear()
    refused(tmp_path, meta, "truncated", meta_to_hf.main)


def failing_read(calls: list[str]) -> Callable:
    """TorchFile.read that finds the file damaged at its fifth tensor."""
    from accessory.checkpoint.formats_read import TorchFile

    real = TorchFile.read

    def read(self, name, *rest):
        calls.append(name)
        if len(calls) == 5:
            raise ValueError(f"{self.path}: is truncated or damaged")
        return real(self, name, *rest)

    return read


def test_a_dst_that_exists_is_left_alone(tmp_path: Path, meta: Path) -> None:
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst/mine").write_text("x")
    refused(tmp_path, meta, r"--dst .*dst is already there", mp=1)
    shutil.rmtree(tmp_path / "dst")
    (tmp_path / "dst").symlink_to(tmp_path / "elsewhere")
    refused(tmp_path, meta, r"--dst .*dst is already there", mp=1)
    assert not (tmp_path / "elsewhere").exists()
