"""Several checkpoints as one: what wins, what is added, what does not go together; and a list as the base of an adapter."""

import json
from pathlib import Path

import pytest
import torch

from accessory.checkpoint import export
from accessory.checkpoint.adapter import base_record, by_part, open_base, write_adapter
from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.formats_write import write_consolidated, write_hf, write_meta
from accessory.model import Transformer
from accessory.model.args import ModelArgs
from accessory.weights import TensorSource, is_lora
from accessory.weights.reshard import split
from tests.helpers import random_weights, tiny_args

ARGS = tiny_args(tie_word_embeddings=False)
WQ, NORM, EMBEDDING = "layers.0.attention.wq.weight", "norm.weight", "tok_embeddings.weight"


def weights(seed: int = 0, args: ModelArgs = ARGS, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return random_weights(args, seed, dtype)


def lora(rank: int = 3, linears: tuple[str, ...] = ("wq", "w2")) -> dict[str, torch.Tensor]:
    generator, found = torch.Generator().manual_seed(rank), {}
    for name, tensor in weights().items():
        if name.split(".")[-2] in linears:
            stem, (out, columns) = name.removesuffix(".weight"), tensor.shape
            found[f"{stem}.lora_a.weight"] = torch.randn(rank, columns, generator=generator) * 0.1
            found[f"{stem}.lora_b.weight"] = torch.randn(out, rank, generator=generator) * 0.1
    return found


def consolidated(
    path: Path, tensors: dict, params: dict | None = None, name: str = "model", wrapped: bool = False
) -> Path:
    """One file as Accessory writes it, with config.json when `params` is given."""
    path.mkdir(parents=True)
    payload = {"model": {f"llma.{k}": v for k, v in tensors.items()}} if wrapped else tensors
    torch.save(payload, path / f"consolidated.00-of-01.{name}.pth")
    if params is not None:
        (path / "config.json").write_text(json.dumps(params))
    return path


def shards(path: Path, tensors: dict, count: int, name: str, args: ModelArgs = ARGS, embedding_dim: int = 1) -> Path:
    path.mkdir(parents=True)
    for rank in range(count):
        part = dict(split(TensorSource(tensors), args, count, rank, embedding_dim))
        torch.save({"model": part}, path / f"consolidated.{rank:02d}-of-{count:02d}.{name}.pth")
    return path


def adapter(path: Path, base: Path | list[Path], tensors: dict, **keys) -> Path:
    path.mkdir()
    terms = {"lora_rank": 3, "lora_alpha": 6.0, "lora_dropout": 0.0, "modules_to_save": [], "bias_tuning": False}
    terms |= {"lora_targets": sorted({n.split(".")[-3] for n in tensors if is_lora(n)}), "norm_tuning": False}
    write_adapter(path, tensors, terms | {"base": base_record(open_checkpoint(base))} | keys)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.mkdir()
    write_meta(path, TensorSource(weights()), ARGS.to_dict(), shards=2, embedding_dim=1)
    (path / "tokenizer.model").write_bytes(b"base")
    return path


def content(path) -> dict[str, torch.Tensor]:
    source = open_checkpoint(path).source
    return {name: source.read(name) for name in source.names()}


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_later_ones_win_from_left_to_right(tmp_path: Path, base: Path) -> None:
    other = weights(1)
    first = consolidated(tmp_path / "b", {WQ: other[WQ], NORM: other[NORM]}, {"rope_theta": 5e4, "norm_eps": None})
    second = consolidated(tmp_path / "c", {NORM: weights(2)[NORM]}, wrapped=True)
    checkpoint = open_checkpoint(f"{base},{first},{second}")
    same(content([base, first, second]), weights() | {WQ: other[WQ], NORM: weights(2)[NORM]})
    same(content([base, second, first]), weights() | {WQ: other[WQ], NORM: other[NORM]})
    assert checkpoint.params["rope_theta"] == 5e4 and checkpoint.params["norm_eps"] == 1e-5
    assert checkpoint.parts == [base, first, second] and str(checkpoint.path) == f"{base},{first},{second}"
    assert [f.parent for f in checkpoint.files] == [base, base, first, second]
    assert checkpoint.kind == "meta_ori" and checkpoint.embedding_dim == 1
    assert checkpoint.tokenizer == base / "tokenizer.model"
    (first / "tokenizer.model").write_bytes(b"first")
    (tmp_path / "tokenizer.model").write_bytes(b"one level up")
    assert open_checkpoint([base, first, second]).tokenizer == first / "tokenizer.model"


def test_a_whole_later_one_of_any_format_wins_everywhere(tmp_path: Path, base: Path) -> None:
    (tmp_path / "hf").mkdir()
    write_hf(tmp_path / "hf", TensorSource(weights(1)), ARGS)
    same(content([base, tmp_path / "hf"]), weights(1))
    same(content([tmp_path / "hf", base]), weights())
    tied = tiny_args(tie_word_embeddings=True)  # a whole one without output.weight is tied, whatever was before it
    (tmp_path / "tied").mkdir()
    write_consolidated(tmp_path / "tied", weights(3, tied).items())
    same(content([base, tmp_path / "tied"]), weights(3, tied))
    untied = consolidated(tmp_path / "head", {"output.weight": weights(4)["output.weight"]})
    checkpoint = open_checkpoint([base, tmp_path / "tied", untied])
    assert checkpoint.params["tie_word_embeddings"] is False
    same(content([base, tmp_path / "tied", untied]), weights(3, tied) | {"output.weight": weights(4)["output.weight"]})


@pytest.mark.parametrize("count", [1, 2, 4])
def test_differences_are_added_in_fp32_and_the_dtype_stays(tmp_path: Path, base: Path, count: int) -> None:
    """Accessory's own files: no corrections, any number of shards, after an override and before one."""
    changes = {n: (t.float() * 0.013).to(torch.float32) for n, t in weights(5).items() if n != NORM}
    diff = shards(tmp_path / "d", changes, count, "model-diff")
    expected = {n: (t.float() + changes[n]).bfloat16() if n in changes else t for n, t in weights().items()}
    same(content([base, diff]), expected)
    assert not torch.equal(expected[WQ], (weights()[WQ] + changes[WQ].bfloat16()))  # bf16 sums would differ
    over = consolidated(tmp_path / "o", {WQ: weights(6)[WQ]})
    same(content([base, diff, over]), expected | {WQ: weights(6)[WQ]})
    after = (weights(6)[WQ].float() + changes[WQ]).bfloat16()
    same(content(f"{base}, {over},{diff}"), expected | {WQ: after})
    source = open_checkpoint([base, diff]).source
    for name, dim in ((EMBEDDING, 0), (EMBEDDING, 1), (WQ, 0), (WQ, 1), ("layers.1.feed_forward.w2.weight", 1)):
        assert torch.equal(source.read(name, dim, 5, 17), expected[name].narrow(dim, 5, 12)), (name, dim)


def test_differences_need_a_base_that_has_their_keys(tmp_path: Path, base: Path) -> None:
    diff = consolidated(tmp_path / "d", {"layers.0.attention.wq.bias": torch.ones(48)}, name="model-diff")
    for paths in (diff, [diff, base]):
        with pytest.raises(ValueError, match="holds only differences.*name what they are added to before it"):
            open_checkpoint(paths)
    with pytest.raises(ValueError, match="layers.0.attention.wq.bias is added to, but is in nothing before it.*/base"):
        open_checkpoint([base, diff])
    torch.save({NORM: torch.ones(47)}, diff / "consolidated.00-of-01.model-diff.pth")
    with pytest.raises(ValueError, match="norm.weight is 48 in the base and 47"):
        open_checkpoint([base, diff])
    consolidated(tmp_path / "d" / "both", {NORM: torch.ones(48)})
    (diff / "both" / "consolidated.00-of-01.model.pth").rename(diff / "consolidated.00-of-01.model.pth")
    with pytest.raises(ValueError, match="several kinds, consolidated and consolidated_diff"):
        open_checkpoint([base, diff])
    missing = shards(tmp_path / "m", {NORM: torch.ones(48)}, 2, "model-diff")
    (missing / "consolidated.01-of-02.model-diff.pth").rename(missing / "consolidated.02-of-02.model-diff.pth")
    with pytest.raises(ValueError, match="consolidated.01-of-02.model-diff.pth is missing"):
        open_checkpoint([base, missing])


def test_trained_only_directories_lie_over_with_the_terms_of_their_config(tmp_path: Path, base: Path) -> None:
    """Accessory's PEFT checkpoints: LoRA, biases and norms under `llma.`, the terms in config.json, alpha = rank."""
    trained = lora() | {NORM: weights(1)[NORM].float()}
    config = {"lora_rank": 3, "norm_tuning": True, "max_seq_len": 2048, "dim": 48, "n_heads": 12, "vocab_size": -1}
    path = consolidated(tmp_path / "peft", trained, config, wrapped=True)
    checkpoint = open_checkpoint([base, path])
    same(content([base, path]), weights() | trained)
    assert (checkpoint.adapter["lora_rank"], checkpoint.adapter["lora_alpha"]) == (3, 3.0)
    assert checkpoint.adapter["lora_targets"] == ["w2", "wq"] and checkpoint.params["vocab_size"] == 101
    (path / "config.json").write_text(json.dumps(config | {"lora_alpha": 12.0}))
    assert open_checkpoint([base, path]).adapter["lora_alpha"] == 12.0


def test_the_scale_of_lora_inside_a_checkpoint_is_read(tmp_path: Path) -> None:
    path = consolidated(tmp_path / "inside", weights() | lora(), ARGS.to_dict() | {"lora_rank": 3, "lora_alpha": 12.0})
    assert open_checkpoint(path).adapter["lora_alpha"] == 12.0
    assert "lora_alpha" not in open_checkpoint(path).params


def test_adapters_lie_over_whatever_is_so_far(tmp_path: Path, base: Path) -> None:
    first = adapter(tmp_path / "one", base, lora() | {"output.weight": weights(1)["output.weight"].float()})
    moved = consolidated(tmp_path / "over", {WQ: weights(2)[WQ]})
    checkpoint = open_checkpoint([base, moved, first])
    expected = weights() | {WQ: weights(2)[WQ], "output.weight": weights(1)["output.weight"].float()} | lora()
    same(content([base, moved, first]), expected)
    assert checkpoint.adapter["lora_alpha"] == 6.0 and checkpoint.parts == [base, moved, first]
    alone = open_checkpoint(first)  # its own base, from adapter.json
    assert alone.parts == [base, first] and alone.files[-1] == first / "adapter.safetensors"
    model, ours = Transformer.from_pretrained(f"{base},{first}"), Transformer.from_pretrained(first)
    tokens = torch.arange(20).view(2, 10)
    assert torch.equal(model(tokens), ours(tokens))


def test_two_loras_must_agree_or_the_later_must_replace_the_earlier(tmp_path: Path, base: Path) -> None:
    first = adapter(tmp_path / "one", base, lora(3, ("wq", "wk")))
    narrow = adapter(tmp_path / "narrow", base, lora(4, ("wq",)), lora_rank=4)
    wide = adapter(tmp_path / "wide", base, lora(4, ("wq", "wk", "w1")), lora_rank=4)
    with pytest.raises(
        ValueError, match=r"its lora_rank is 4, that of the LoRA in .*one is 3.*layers.0.attention.wk.weight"
    ):
        open_checkpoint([base, first, narrow])
    same(content([base, first, wide]), weights() | lora(4, ("wq", "wk", "w1")))
    beside = consolidated(tmp_path / "beside", lora(3, ("w1",)), {"lora_rank": 3, "lora_alpha": 6.0})
    assert open_checkpoint([base, first, beside]).adapter["lora_targets"] == ["w1", "wk", "wq"]
    with pytest.raises(ValueError, match="its lora_alpha is 3.0"):
        (beside / "config.json").write_text(json.dumps({"lora_rank": 3}))
        open_checkpoint([base, first, beside])


def test_the_vocabulary_grows_in_both_or_not_at_all(tmp_path: Path, base: Path) -> None:
    larger = {
        n: t for n, t in weights(1, tiny_args(vocab_size=107, tie_word_embeddings=False)).items() if "layers" not in n
    }
    (tmp_path / "grown").mkdir()
    both = consolidated(
        tmp_path / "grown/both", {EMBEDDING: larger[EMBEDDING], "output.weight": larger["output.weight"]}
    )
    one = consolidated(tmp_path / "grown/one", {EMBEDDING: larger[EMBEDDING]}, {"vocab_size": 107})
    other = consolidated(tmp_path / "grown/other", {"output.weight": larger["output.weight"]})
    assert open_checkpoint([base, both]).params["vocab_size"] == 107
    assert Transformer.from_pretrained([base, one, other]).args.vocab_size == 107
    with pytest.raises(ValueError, match="tok_embeddings.weight has 107 rows and output.weight has 101 rows"):
        open_checkpoint([base, one])
    smaller = consolidated(tmp_path / "small", {EMBEDDING: weights()[EMBEDDING][:90]})
    with pytest.raises(ValueError, match="small, laid over .*tok_embeddings.weight is 101x48 in the base and 90x48"):
        open_checkpoint([base, smaller])


@pytest.mark.parametrize(
    "params, message",
    [
        ({"dim": 96}, "/b says dim 96, .*/base 48"),
        ({"n_kv_heads": 6}, "/b says kv_heads 6, .*/base 4"),
        ({"hidden_dim": 80}, "/b says ffn_dim 80, .*/base 72"),
    ],
)
def test_sizes_that_contradict_name_both(tmp_path: Path, base: Path, params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_checkpoint([base, consolidated(tmp_path / "b", {NORM: torch.ones(48)}, params)])


def test_the_first_must_be_whole_and_every_one_there(tmp_path: Path, base: Path) -> None:
    part = consolidated(tmp_path / "part", {NORM: torch.ones(48)})
    with pytest.raises(ValueError, match=r"/part: is not whole \(1 keys missing, tok_embeddings.weight"):
        open_checkpoint([part, base])
    most = consolidated(tmp_path / "most", {n: t for n, t in weights().items() if n != WQ}, ARGS.to_dict())
    with pytest.raises(ValueError, match=rf"/most: is not whole \(1 keys missing, {WQ} among"):
        open_checkpoint([most, part])
    with pytest.raises(ValueError, match="nowhere: no such directory"):
        open_checkpoint(f"{base},{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="names no directory"):
        open_checkpoint(" , ")
    strange = consolidated(tmp_path / "strange", {"layers.0.attention.wz.weight": torch.ones(4)})
    with pytest.raises(ValueError, match="unexpected: layers.0.attention.wz.weight"):
        Transformer.from_pretrained([base, strange])
    mixed = shards(tmp_path / "mixed", {NORM: torch.ones(48)}, 2, "model")
    torch.save({WQ: weights()[WQ]}, mixed / "consolidated.01-of-02.model.pth")
    with pytest.raises(
        ValueError, match="consolidated.00-of-02.model.pth: layers.0.attention.wq.weight is missing.*not shards"
    ):
        open_checkpoint([base, mixed])


def test_a_path_with_a_comma_that_exists_is_one_path(tmp_path: Path, base: Path) -> None:
    path = base.rename(tmp_path / "llama,tuned")
    same(content(str(path)), weights())
    assert open_checkpoint(str(path)).parts == [path]


def test_a_list_is_the_base_of_an_adapter(tmp_path: Path, base: Path) -> None:
    """Every file is recorded, those of one name apart; the adapter finds all parts again and misses any that changed."""
    over = consolidated(tmp_path / "over", {WQ: weights(2)[WQ]})
    again = consolidated(tmp_path / "again", {NORM: weights(2)[NORM]})  # a file of the same name
    record = base_record(open_checkpoint([base, over, again]))
    name = "consolidated.00-of-01.model.pth"
    assert record["path"] == [str(p.resolve()) for p in (base, over, again)]
    assert list(record["size"]) == ["0/consolidated.00.pth", "0/consolidated.01.pth", f"1/{name}", f"2/{name}"]
    assert len(set(record["sha256"].values())) == 4
    saved = adapter(tmp_path / "adapter", [base, over, again], lora())
    checkpoint = open_checkpoint(saved)
    assert checkpoint.parts == [base, over, again, saved]
    same(content(saved), weights() | {WQ: weights(2)[WQ], NORM: weights(2)[NORM]} | lora())
    with open(again / name, "ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match=f"again/{name}: has .* bytes"):
        open_base(checkpoint.adapter, saved)
    (again / name).unlink()
    with pytest.raises(ValueError, match=f"again/{name}: is gone"):
        open_base(checkpoint.adapter, saved)


def test_the_order_of_a_base_s_parts_is_part_of_its_identity(tmp_path: Path, base: Path) -> None:
    one = consolidated(tmp_path / "one", {NORM: weights(1)[NORM]})
    two = consolidated(tmp_path / "two", {NORM: weights(2)[NORM]})
    there, back = (base_record(open_checkpoint([base, *parts])) for parts in ((one, two), (two, one)))
    assert by_part(there["sha256"]) != by_part(back["sha256"])
    assert export.BaseIdentity(open_checkpoint([base, one, two]), there).record()["sha256"] == there["sha256"]
    identity = export.BaseIdentity(open_checkpoint([base, two, one]), there)
    with pytest.raises(ValueError, match="is not the base this run started from"):
        identity.record()
