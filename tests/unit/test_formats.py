"""Every kind of checkpoint is recognised and read as the same tensors; every damaged one is refused in one line."""

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.formats_read import TorchFile, file_sha256
from accessory.checkpoint.formats_write import cast, new_directory, write_consolidated, write_hf, write_meta
from accessory.model.args import ModelArgs
from accessory.weights import TensorSource, require_keys
from accessory.weights.reshard import split
from tests.unit.test_reshard import random_tensors

ARGS = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=51, hidden_dim=48, tie_word_embeddings=False)
STORIES = Path(__file__).resolve().parents[2].parent / "shared/assets/stories260K"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return random_tensors(ARGS, dtype=torch.bfloat16)


def params() -> dict:
    return ARGS.to_dict() | {"vocab_size": -1, "rope_scaling": None}


def same(checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    source = checkpoint.source
    assert set(source.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert source.shape(name) == tuple(tensor.shape) and source.dtype(name) == tensor.dtype
        assert torch.equal(source.read(name), tensor), name


@pytest.mark.parametrize("shards, embedding_dim", [(1, 0), (2, 0), (2, 1), (4, 1)])
@pytest.mark.parametrize("style", ["meta_ori", "consolidated"])
def test_what_is_written_is_read_back_bit_equal(
    tmp_path: Path, tensors, style: str, shards: int, embedding_dim: int
) -> None:
    files = write_meta(tmp_path, TensorSource(tensors), params(), None, None, shards, embedding_dim, style)
    first = "consolidated.00.pth" if style == "meta_ori" else f"consolidated.00-of-{shards:02d}.model.pth"
    assert files[0].name == first and len(files) == shards
    checkpoint = open_checkpoint(tmp_path)
    same(checkpoint, tensors)
    assert (checkpoint.kind, checkpoint.adapter) == (style, None)
    assert checkpoint.embedding_dim == (None if shards == 1 else embedding_dim)
    assert checkpoint.params["vocab_size"] == 51
    require_keys(checkpoint.source, ModelArgs.from_dict(checkpoint.params), tmp_path)


def test_accessory_files_lose_wrapper_and_prefix_and_tell_their_lora(tmp_path: Path) -> None:
    args = ModelArgs.from_dict(ARGS.to_dict() | {"attention_bias": True, "mlp_bias": True})
    tensors = random_tensors(args, lora_rank=3)
    for rank in range(2):
        shard = {f"llma.{name}": t for name, t in split(TensorSource(tensors), args, 2, rank, 1)}
        torch.save({"model": shard}, tmp_path / f"consolidated.{rank:02d}-of-02.model.pth")
    config = ARGS.to_dict() | {
        "max_batch_size": 32,
        "max_seq_len": 2048,
        "lora_rank": 3,
        "bias_tuning": True,
        "rope_scaling": 0.5,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | {"ffn_dim_multiplier": None}))
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    checkpoint = open_checkpoint(tmp_path)
    same(checkpoint, tensors)
    assert checkpoint.adapter["lora_rank"] == 3 and checkpoint.adapter["lora_alpha"] == 3.0
    assert checkpoint.adapter["lora_targets"] == ["w1", "w2", "w3", "wk", "wo", "wq", "wv"]
    assert (
        checkpoint.params["attention_bias"] and checkpoint.params["mlp_bias"] and "lora_rank" not in checkpoint.params
    )
    assert ModelArgs.from_dict(checkpoint.params).rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert checkpoint.tokenizer == tmp_path / "tokenizer.model"
    require_keys(checkpoint.source, ModelArgs.from_dict(checkpoint.params), tmp_path, checkpoint.adapter)


def test_rope_tables_in_old_files_are_left_out_and_meta_tokenizer_lies_one_level_up(tmp_path: Path, tensors) -> None:
    old = {"rope.freqs": torch.ones(4), "layers.0.attention.inner_attention.rope.freqs": torch.ones(4)}
    (tmp_path / "7B").mkdir()
    torch.save(tensors | old, tmp_path / "7B/consolidated.00.pth")
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    checkpoint = open_checkpoint(tmp_path / "7B")
    same(checkpoint, tensors)
    assert checkpoint.params == {} and checkpoint.tokenizer == tmp_path / "tokenizer.model"


def test_a_tie_in_params_hides_the_superfluous_output(tmp_path: Path, tensors) -> None:
    write_consolidated(tmp_path, tensors.items(), params() | {"tie_word_embeddings": True}, style="meta_ori")
    assert "output.weight" not in open_checkpoint(tmp_path).source.names()
    (tmp_path / "params.json").write_text(json.dumps(params() | {"tie_word_embeddings": None}))
    assert "output.weight" in open_checkpoint(tmp_path).source.names()


@pytest.mark.parametrize("limit", ["5GB", "10KB"])
def test_hugging_face_directory_with_and_without_index(tmp_path: Path, tensors, limit: str) -> None:
    files = write_hf(tmp_path, TensorSource(tensors), ARGS, max_shard_size=limit)
    assert (len(files) > 1) == (tmp_path / "model.safetensors.index.json").exists() == (limit == "10KB")
    assert all(f.stat().st_size < 13_000 for f in files) or limit == "5GB"
    same(open_checkpoint(tmp_path), tensors)
    (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
    checkpoint = open_checkpoint(tmp_path, "hf")
    same(checkpoint, tensors)
    for name, dim in itertools.product(("layers.0.attention.wq.weight", "layers.1.attention.wk.weight"), (0, 1)):
        for start, stop in itertools.combinations(range(0, tensors[name].shape[dim] + 1, 3), 2):
            piece = checkpoint.source.read(name, dim, start, stop)
            assert torch.equal(piece, tensors[name].narrow(dim, start, stop - start))
            assert piece.untyped_storage().nbytes() == piece.nbytes


def test_reading_owns_its_memory_and_lets_the_map_go(tmp_path: Path, monkeypatch, tensors) -> None:
    file = write_consolidated(tmp_path, tensors.items())
    monkeypatch.setattr("accessory.checkpoint.formats_read.MAPPED_LIMIT", 1000)
    source = TorchFile(file)
    for name in [*tensors, *tensors]:
        piece = source.read(name, 0, 0, 2)
        assert torch.equal(piece, tensors[name][:2]) and piece.untyped_storage().nbytes() == piece.nbytes
    source.read("tok_embeddings.weight")
    assert source._tensors is None
    os.truncate(file, 10)
    with pytest.raises(ValueError, match="truncated or damaged"):
        source.read("norm.weight")


def test_views_are_cloned_before_saving(tmp_path: Path) -> None:
    base = torch.zeros(1000, 1000)
    file = write_consolidated(tmp_path, {"norm.weight": base[0], "output.weight": base[:, :2]}.items())
    assert file.stat().st_size < 20_000


PEAK = """
import sys, torch, resource
from accessory.checkpoint.formats import open_checkpoint
source = open_checkpoint(sys.argv[1]).source
def rss(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
start, worst = rss(), 0
for name in source.names():
    size = source.shape(name)[0] // 8
    source.read(name, 0, 0, size)
    source.read(name, 0, size * 4, size * 5)
    if len(source.shape(name)) == 2:
        source.read(name, 1, 0, source.shape(name)[1] // 8)
    worst = max(worst, rss() - start)
print(worst)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_slices_of_a_big_file_do_not_hold_the_file(tmp_path: Path) -> None:
    args = ModelArgs(dim=1024, n_layers=3, n_heads=8, vocab_size=4096, tie_word_embeddings=False)
    big = {n: torch.zeros(t.shape, dtype=torch.bfloat16) for n, t in random_tensors_meta(args).items()}
    file = write_consolidated(tmp_path, big.items(), style="meta_ori")
    code = PEAK.replace(
        "source = open", "import accessory.checkpoint.formats_read as r; r.MAPPED_LIMIT = 8 * 2**20\nsource = open"
    )
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True, check=True
    )
    assert file.stat().st_size > 85 * 2**20 and float(out.stdout) < 40, out.stdout


def random_tensors_meta(args: ModelArgs) -> dict[str, torch.Tensor]:
    from accessory.weights import expected_shapes

    return {n: torch.empty(shape, device="meta") for n, shape in expected_shapes(args, False).items()}


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def gap(d: Path) -> None:
    shutil.copy(d / "consolidated.00.pth", d / "consolidated.02.pth")


def mixed_kinds(d: Path) -> None:
    shutil.copy(d / "consolidated.00.pth", d / "consolidated.00-of-01.model.pth")


def mixed_splits(d: Path) -> None:
    shutil.move(d / "consolidated.00.pth", d / "consolidated.00-of-01.model.pth")
    shutil.copy(d / "consolidated.00-of-01.model.pth", d / "consolidated.00-of-02.model.pth")


def missing_of(d: Path) -> None:
    shutil.move(d / "consolidated.00.pth", d / "consolidated.01-of-02.model.pth")


def truncated(d: Path) -> None:
    os.truncate(d / "consolidated.00.pth", 4000)


def half_zip(d: Path) -> None:
    data = bytearray((d / "consolidated.00.pth").read_bytes())
    data[60:200] = bytes(140)
    (d / "consolidated.00.pth").write_bytes(data)


def not_zip(d: Path) -> None:
    (d / "consolidated.00.pth").write_bytes(b"<html>404</html>" * 10)


def empty_file(d: Path) -> None:
    (d / "consolidated.00.pth").write_bytes(b"")


def old_torch(d: Path) -> None:
    torch.save({"norm.weight": torch.ones(4)}, d / "consolidated.00.pth", _use_new_zipfile_serialization=False)


def code(d: Path) -> None:
    torch.save({"norm.weight": Evil()}, d / "consolidated.00.pth")


def code_of_protocol_4(d: Path) -> None:
    torch.save({"norm.weight": Evil()}, d / "consolidated.00.pth", pickle_protocol=4)


def no_tensors(d: Path) -> None:
    torch.save({"norm.weight": 3}, d / "consolidated.00.pth")


def a_list(d: Path) -> None:
    torch.save([torch.ones(1)], d / "consolidated.00.pth")


def deflated(d: Path) -> None:
    source, target = d / "consolidated.00.pth", d / "x"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry.filename))
    os.replace(target, source)


def claims_more(d: Path) -> None:
    torch.save({"norm.weight": torch.zeros(1).expand(2**40)}, d / "consolidated.00.pth")


def bin_only(d: Path) -> None:
    shutil.move(d / "consolidated.00.pth", d / "pytorch_model-00001-of-00002.bin")


def empty_directory(d: Path) -> None:
    (d / "consolidated.00.pth").unlink()


def bad_json(d: Path) -> None:
    (d / "params.json").write_text("{'dim': 4}")


def hf_missing_file(d: Path) -> None:
    to_hf(d, "10KB")
    next(d.glob("model-00002-of-*.safetensors")).unlink()


def hf_missing_file_no_index(d: Path) -> None:
    hf_missing_file(d)
    (d / "model.safetensors.index.json").unlink()


def hf_truncated(d: Path) -> None:
    to_hf(d)
    os.truncate(d / "model.safetensors", (d / "model.safetensors").stat().st_size - 100)


def hf_header(d: Path) -> None:
    to_hf(d)
    data = (d / "model.safetensors").read_bytes()
    (d / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + data[8:])


def hf_escape(d: Path) -> None:
    to_hf(d)
    (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')


def hf_no_config(d: Path) -> None:
    to_hf(d)
    (d / "config.json").unlink()


def hf_other_model(d: Path) -> None:
    to_hf(d)
    config = json.loads((d / "config.json").read_text())
    (d / "config.json").write_text(json.dumps(config | {"model_type": "gemma"}))


def hf_fp8(d: Path) -> None:
    to_hf(d)
    save_file({"lm_head.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn)}, d / "model.safetensors")


def bad_gguf(d: Path) -> None:
    (d / "consolidated.00.pth").unlink()
    (d / "m.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(12))


def to_hf(d: Path, limit: str = "5GB") -> None:
    (d / "consolidated.00.pth").unlink()
    (d / "params.json").unlink()
    write_hf(d, TensorSource(random_tensors(ARGS, dtype=torch.bfloat16)), ARGS, max_shard_size=limit)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "damage, message",
    [
        (gap, r"consolidated\.01\.pth is missing, but consolidated\.02\.pth is there"),
        (mixed_kinds, r"several kinds, meta_ori and consolidated: choose with --pretrained_type"),
        (
            mixed_splits,
            r"consolidated\.00-of-01\.model\.pth and consolidated\.00-of-02\.model\.pth are shards of different splits",
        ),
        (missing_of, r"consolidated\.00-of-02\.model\.pth is missing"),
        (truncated, r"consolidated\.00\.pth: is truncated or damaged"),
        (half_zip, r"consolidated\.00\.pth: its pickle is damaged or holds more than plain tensors"),
        (not_zip, r"consolidated\.00\.pth: is not a torch checkpoint"),
        (empty_file, r"consolidated\.00\.pth: is not a torch checkpoint"),
        (old_torch, r"consolidated\.00\.pth: is in torch's format from before 1\.6"),
        (code, r"consolidated\.00\.pth: (posix|nt)\.system in its pickle could run code"),
        (
            code_of_protocol_4,
            r"consolidated\.00\.pth: its pickle is damaged or holds more than plain tensors.*could run code",
        ),
        (no_tensors, r"consolidated\.00\.pth: 'norm\.weight' is a int"),
        (a_list, r"consolidated\.00\.pth: holds a list"),
        (deflated, r"consolidated\.00\.pth: holds compressed entries"),
        (claims_more, r"consolidated\.00\.pth: norm\.weight claims 4398046511104 bytes, the file stores 4"),
        (bin_only, r"pytorch_model-00002-of-00002\.bin: this file of the checkpoint is missing"),
        (empty_directory, r"holds no consolidated\.NN\.pth.*give the directory with the weight files"),
        (bad_json, r"params\.json: not JSON"),
        (hf_missing_file, r"model-00002-of-000\d\d\.safetensors: this file of the checkpoint is missing"),
        (hf_missing_file_no_index, r"model-00002-of-000\d\d\.safetensors: this file of the checkpoint is missing"),
        (hf_truncated, r"model\.safetensors: is truncated or damaged"),
        (hf_header, r"model\.safetensors: is truncated or damaged.*its header claims 1099511627776"),
        (hf_escape, r"index\.json: a is said to be in '\.\./\.\./etc/passwd'"),
        (hf_no_config, r"config\.json: is missing"),
        (hf_other_model, r"config\.json: model_type 'gemma' is another architecture"),
        (hf_fp8, r"model\.safetensors: lm_head\.weight is stored as F8_E4M3"),
        (bad_gguf, r"m\.gguf: is truncated or damaged"),
    ],
)
def test_wrong_input_is_one_line_that_names_the_file(
    tmp_path: Path, monkeypatch, tensors, damage, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_consolidated(tmp_path, tensors.items(), params(), style="meta_ori")
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "pwned").exists()


def test_what_pretrained_type_insists_on(tmp_path: Path, tensors) -> None:
    write_consolidated(tmp_path, tensors.items(), params(), style="meta_ori")
    mixed_kinds(tmp_path)
    assert (
        open_checkpoint(tmp_path, "meta_ori").kind == "meta_ori"
        and open_checkpoint(tmp_path, "consolidated").kind == "consolidated"
    )
    with pytest.raises(ValueError, match="--pretrained_type hf, but .* holds meta_ori and consolidated"):
        open_checkpoint(tmp_path, "hf")
    with pytest.raises(
        ValueError, match="--pretrained_type safetensors: choose one of meta_ori, consolidated, hf, gguf"
    ):
        open_checkpoint(tmp_path, "safetensors")
    with pytest.raises(ValueError, match="consolidated.00.pth is a file: give the directory"):
        open_checkpoint(tmp_path / "consolidated.00.pth")
    with pytest.raises(ValueError, match="--pretrained_path .*nowhere: no such directory"):
        open_checkpoint(tmp_path / "nowhere")


def test_wrong_sizes_are_reported_key_by_key(tmp_path: Path, tensors) -> None:
    write_consolidated(tmp_path, tensors.items(), params() | {"n_layers": 3, "hidden_dim": 40}, style="meta_ori")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"9 missing \(layers\.2.*6 mis-shaped \(layers\.0\.feed_forward\.w1\.weight is 48x32, not 40x32",
    ):
        require_keys(checkpoint.source, ModelArgs.from_dict(checkpoint.params), tmp_path)
    with pytest.raises(ValueError, match="does not fit the model"):
        write_meta(tmp_path, checkpoint.source, checkpoint.params)


def test_a_directory_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_directory(tmp_path / "a/out") as directory:
        (directory / "half").write_text("x")
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == []
    with new_directory(tmp_path / "a/out") as directory:
        (directory / "whole").write_text("x")
        assert not (tmp_path / "a/out").exists()
    assert [p.name for p in (tmp_path / "a").rglob("*")] == ["out", "whole"]
    with pytest.raises(ValueError, match="--dst .*out is already there"), new_directory(tmp_path / "a/out"):
        pass


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_tool_that_is_stopped_takes_away_what_it_began(tmp_path: Path, end: signal.Signals) -> None:
    program = """
import signal, time
from accessory.checkpoint.formats_write import new_directory
from accessory.config import run_tool
def main(*, dst: str) -> None:
    with new_directory(dst) as directory:
        print(directory, flush=True)
        time.sleep(60)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests themselves run in the background
run_tool(main)
"""
    command = [sys.executable, "-c", program, "--dst", str(tmp_path / "a/out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        begun = Path(process.stdout.readline().strip())
        assert begun.is_dir() and begun.parent == tmp_path / "a"
        process.send_signal(end)
        assert process.wait(30) != 0
    assert list((tmp_path / "a").iterdir()) == []


def test_fp16_refuses_what_it_cannot_hold() -> None:
    wide = torch.tensor([1.0, 65504.0, float("-inf")])
    assert cast("w", wide, torch.float16).tolist() == [1.0, 65504.0, float("-inf")]  # no worse than it was
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match=r"^w: 1.311e\+05 is more than fp16 holds \(65504\): take --dtype bf16$"):
            cast("w", torch.tensor([1.0, -(2.0**17), float("inf")]).to(dtype), torch.float16)


def test_a_full_disk_is_an_error_with_the_free_space(tmp_path: Path, tensors) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(ValueError, match=r"-of-01\.model\.pth: could not be written, \d+ MiB are free"):
            write_consolidated(tmp_path, tensors.items())
        with pytest.raises(ValueError, match=r"model\.safetensors: could not be written, \d+ MiB are free"):
            write_hf(tmp_path, TensorSource(tensors), ARGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x").startswith("ba7816bf8f01cfea")


@pytest.mark.skipif(not STORIES.is_dir(), reason="real checkpoints are not here")
@pytest.mark.parametrize(
    "path, embedding_dim",
    [("meta-mp2-llama2style", 1), ("meta-mp2-llama3style", 0), ("hf", None), ("gguf/stories260K-f32.gguf", None)],
)
def test_the_same_real_model_in_every_format(path: str, embedding_dim: int | None) -> None:
    truth, other = open_checkpoint(STORIES / "meta").source, open_checkpoint(STORIES / path)
    assert other.embedding_dim == embedding_dim
    assert set(truth.names()) - set(other.source.names()) <= {"output.weight"}
    for name in other.source.names():
        assert torch.equal(other.source.read(name), truth.read(name)), name
    require_keys(other.source, ModelArgs.from_dict(other.params), path)
