"""There and back through the converters, bit by bit: Meta -> Hugging Face -> Meta, m -> n -> m, and the older .bin files."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.formats_write import write_hf, write_meta
from accessory.model import Transformer
from accessory.model.args import ModelArgs
from accessory.weights import TensorSource, hf
from tests.helpers import random_weights, tiny_tokenizer
from tests.unit.test_reshard import merged, random_tensors, shards_of
from tools import hf_to_meta, meta_to_hf, reshard

HEADS = 24
SIZES = (1, 2, 3, 4, 6, 8)
VOCABS = (49953, 32001)  # Chinese LLaMA-Alpaca's, and LLaMA's with a pad token


def make(kv_heads: int = HEADS, tied: bool = False, **keys) -> ModelArgs:
    sizes = {"dim": 48, "n_layers": 1, "n_heads": HEADS, "head_dim": 2, "hidden_dim": 72, "vocab_size": 101}
    return ModelArgs.from_dict(sizes | {"n_kv_heads": kv_heads, "tie_word_embeddings": tied} | keys)


def allowed(kv_heads: int) -> list[int]:
    return [n for n in SIZES if n % kv_heads == 0 or kv_heads % n == 0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, HEADS])
def test_any_split_to_any_other_and_back_through_hugging_face(kv_heads: int, tied: bool) -> None:
    args = make(kv_heads, tied)
    tensors = random_tensors(args, dtype=torch.bfloat16)
    for m in allowed(kv_heads):
        for n in allowed(kv_heads):
            first = merged(shards_of(tensors, args, m, m % 2), args)
            there = hf.ToHF(first, args)
            back = hf.FromHF(there, args.head_size)
            second = merged(shards_of(read_all(back), args, n, n % 2), args)
            third = merged(shards_of(read_all(second), args, m, m % 2), args)
            assert same_bits(read_all(third), tensors), (m, n)


@pytest.mark.parametrize("vocab", VOCABS)
def test_vocabularies_that_do_not_divide(vocab: int) -> None:
    args = make(vocab_size=vocab, dim=48)
    tensors = {n: t for n, t in random_tensors(args).items() if "layers" not in n}
    for n in (2, 3, 4, 6, 8):
        shards = shards_of(tensors, args, n, 0)
        rows = [shard.shape("output.weight")[0] for shard in shards]
        assert rows == [vocab // n] * (n - 1) + [vocab // n + vocab % n]
        assert same_bits(read_all(merged(shards, args)), tensors)


def read_all(source) -> dict[str, torch.Tensor]:
    return {name: source.read(name) for name in source.names()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def bits(t):
        return t.contiguous().flatten().view(torch.uint8)

    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(bits(a[n]), bits(b[n])) for n in b
    )


@pytest.mark.parametrize(
    "kv_heads, tied, vocab, m, n, embedding_dim",
    [(4, False, 49953, 2, 8, 1), (HEADS, False, 32001, 3, 4, 0), (2, True, 101, 6, 1, 0), (1, False, 101, 1, 6, 1)],
)
def test_the_tools_there_and_back(tmp_path: Path, capsys, kv_heads, tied, vocab, m, n, embedding_dim) -> None:
    args = make(kv_heads, tied, vocab_size=vocab)
    tensors = random_tensors(args, dtype=torch.bfloat16)
    tensors["norm.weight"][:2] = torch.tensor([torch.nan, -0.0])
    paths = {name: tmp_path / name for name in ("m", "n", "hf", "meta", "back")}
    paths["m"].mkdir()
    write_meta(paths["m"], TensorSource(tensors), args.to_dict(), shards=m, embedding_dim=1)
    reshard.main(src=str(paths["m"]), dst=str(paths["n"]), mp=n, embedding_dim=embedding_dim)
    meta_to_hf.main(src=str(paths["n"]), dst=str(paths["hf"]), max_shard_size="1MB")
    hf_to_meta.main(src=str(paths["hf"]), dst=str(paths["meta"]), mp=n, embedding_dim=embedding_dim)
    reshard.main(src=str(paths["meta"]), dst=str(paths["back"]), mp=m, embedding_dim=1)
    for name, path in paths.items():
        checkpoint = open_checkpoint(path)
        assert same_bits(read_all(checkpoint.source), tensors), name
        assert ModelArgs.from_dict(checkpoint.params).n_kv_heads == kv_heads
    for first, second in (("m", "back"), ("n", "meta")):  # file by file too
        for file in sorted(paths[first].glob("*.pth")):
            a, b = (torch.load(paths[p] / file.name, weights_only=True) for p in (first, second))
            assert list(a) == list(b) and same_bits(a, b), file.name
    if vocab > 101:
        index = json.loads((paths["hf"] / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    report = capsys.readouterr().out
    assert "layers.0.attention.wq.weight -> model.layers.0.self_attn.q_proj.weight" in report
    assert "model.layers.0.self_attn.q_proj.weight -> layers.0.attention.wq.weight" in report


def test_dtype_and_what_the_tools_refuse(tmp_path: Path) -> None:
    args = make(4)
    (tmp_path / "src").mkdir()
    write_hf(tmp_path / "src", TensorSource(random_tensors(args)), args)
    src, dst = str(tmp_path / "src"), str(tmp_path / "dst")
    for keys, message in (
        ({"mp": 5}, "--mp 5 but n_heads is 24: use 1, 2, 4"),
        ({"mp": 0}, "--mp 0 but a model is split over 1 rank or more: use 1, 2"),
        ({"mp": -2}, "--mp -2 but"),
        ({"embedding_dim": 2}, "--embedding_dim 2: choose 0"),
        ({"dtype": "int8"}, "--dtype int8: choose one of"),
        ({"tokenizer_path": str(tmp_path / "none")}, "none"),
    ):
        with pytest.raises(ValueError, match=message):
            hf_to_meta.main(src=src, dst=dst, **keys)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]
    hf_to_meta.main(src=src, dst=dst, dtype="fp16")
    source = open_checkpoint(dst).source
    assert {source.dtype(n) for n in source.names()} == {torch.float16}
    assert torch.equal(source.read("norm.weight"), random_tensors(args)["norm.weight"].half())


def peer_model(**keys):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 42, "num_hidden_layers": 2, "vocab_size": 53}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | heads | keys)).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mp", [1, 3])
def test_what_transformers_wrote_computes_the_same_as_meta_files(tmp_path: Path, tied: bool, mp: int) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    peer = peer_model(tie_word_embeddings=tied, rope_parameters=scaling, num_key_value_heads=6)
    (tmp_path / "hf").mkdir()
    peer.config.save_pretrained(tmp_path / "hf")
    bad = {"temperature": 0.7, "do_sample": False}  # transformers of today refuses to save this
    (tmp_path / "hf/generation_config.json").write_text(json.dumps(bad))
    state = {n: t for n, t in peer.state_dict().items() if not (tied and n == "lm_head.weight")}
    torch.save(state, tmp_path / "hf/pytorch_model.bin")
    hf_to_meta.main(src=str(tmp_path / "hf"), dst=str(tmp_path / "meta"), mp=mp)
    params = json.loads((tmp_path / "meta/params.json").read_text())
    assert (params["dim"], params["n_layers"], params["hidden_dim"]) == (48, 2, 42)
    assert params["rope_theta"] == 5000.0 and params["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert len(list((tmp_path / "meta").glob("*.pth"))) == mp
    tokens = torch.randint(0, 53, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        truth, ours = peer(tokens).logits, Transformer.from_pretrained(tmp_path / "meta")(tokens)
    assert (ours - truth).abs().max() <= 2e-5 * truth.abs().max()
    meta_to_hf.main(src=str(tmp_path / "meta"), dst=str(tmp_path / "again"))
    transformers = pytest.importorskip("transformers")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    assert all(torch.equal(again.state_dict()[n], t) for n, t in peer.state_dict().items())
    again.save_pretrained(tmp_path / "saved")  # the generation config that we wrote is one that can be saved


def write_bins(directory: Path, state: dict[str, torch.Tensor], count: int, index: bool) -> None:
    """transformers' older files: `count` of them, or one without a number."""
    names = list(state)
    weight_map = {}
    for i in range(count):
        part = {n: state[n] for n in names[i::count]}
        file = "pytorch_model.bin" if count == 1 else f"pytorch_model-{i + 1:05d}-of-{count:05d}.bin"
        torch.save(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    if index:
        content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(content))


@pytest.fixture
def hub(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A directory with config.json, and the weights that belong into it (lm_head is embed_tokens, in one storage)."""
    peer = peer_model()
    directory = tmp_path / "hub"
    directory.mkdir()
    peer.config.save_pretrained(directory)
    state = dict(peer.state_dict()) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return directory, state


@pytest.mark.parametrize("count, index", [(1, False), (3, True), (3, False)])
def test_bin_files_are_read_as_safetensors_are(tmp_path: Path, hub, count: int, index: bool) -> None:
    from safetensors.torch import save_file

    directory, state = hub
    write_bins(directory, state, count, index)
    (directory / "training_args.bin").write_bytes(b"not weights")
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(directory / "config.json", other)
    save_file({n: t.clone() for n, t in state.items()}, other / "model.safetensors")
    bins, truth = open_checkpoint(directory), open_checkpoint(other)
    assert bins.kind == "hf" and len(bins.files) == count and bins.params == truth.params
    assert same_bits(read_all(bins.source), read_all(truth.source))
    assert torch.equal(
        bins.source.read("layers.1.attention.wk.weight", 0, 3, 7),
        truth.source.read("layers.1.attention.wk.weight")[3:7],
    )
    save_file({"x": torch.ones(1)}, directory / "model.safetensors")
    assert [f.name for f in open_checkpoint(directory).files] == ["model.safetensors"]  # where both are, the newer


def test_bin_files_that_are_not_all_there(hub) -> None:
    directory, state = hub
    write_bins(directory, state, 3, True)
    (directory / "pytorch_model-00002-of-00003.bin").unlink()
    for _ in range(2):  # with the index, and without it
        refused(directory, r"pytorch_model-00002-of-00003\.bin: this file .* is missing: download it")
        (directory / "pytorch_model.bin.index.json").unlink(missing_ok=True)
    write_bins(directory, state, 3, True)
    shutil.copy(directory / "pytorch_model-00001-of-00003.bin", directory / "pytorch_model-00002-of-00003.bin")
    refused(directory, r"00002-of-00003\.bin: .* is also in .*00001-of-00003\.bin: .*two checkpoints")


def test_an_index_that_is_wrong_about_its_bin_files(hub) -> None:
    directory, state = hub
    write_bins(directory, state, 2, True)
    index = json.loads((directory / "pytorch_model.bin.index.json").read_text())
    here = index["weight_map"]["model.norm.weight"]
    other = next(f for f in index["weight_map"].values() if f != here)
    index["weight_map"]["model.norm.weight"] = other
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused(directory, rf"{other}: model\.norm\.weight is missing, but the index says that it is there")


def test_bin_files_of_before_torch_1_6(hub) -> None:
    directory, state = hub
    torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    refused(directory, r"pytorch_model\.bin: is in torch's format from before 1\.6: load it with an old torch")


def refused(directory: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tool", [hf_to_meta, meta_to_hf])
def test_a_tokenizer_is_written_under_its_own_name_and_has_to_fit(tmp_path: Path, tool) -> None:
    """Mistral's file is called tokenizer.model.v1; what stands after the last point says nothing."""
    args = ModelArgs(dim=48, n_layers=1, n_heads=4, vocab_size=320, hidden_dim=72, tie_word_embeddings=False)
    (tmp_path / "src").mkdir()
    write_hf(tmp_path / "src", TensorSource(random_weights(args)), args)
    for name, content in (("tokenizer.model.v1", tiny_tokenizer()), ("other", tiny_tokenizer(vocab_size=400))):
        (tmp_path / name).write_bytes(content)
    keys = {"src": str(tmp_path / "src"), "dst": str(tmp_path / "dst")}
    with pytest.raises(ValueError, match=r"other has 400 tokens, the embedding of .*src has 320 rows"):
        tool.main(**keys, tokenizer_path=str(tmp_path / "other"))
    tool.main(**keys, tokenizer_path=str(tmp_path / "tokenizer.model.v1"))
    assert (tmp_path / "dst/tokenizer.model").read_bytes() == tiny_tokenizer()
    assert not (tmp_path / "dst/tokenizer.v1").exists()
