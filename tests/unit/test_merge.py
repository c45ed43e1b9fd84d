"""LoRA merged into its base in both formats, the adapter files, and every way in which an adapter does not fit."""

import json
import os
from pathlib import Path

import pytest
import torch

from accessory.checkpoint.adapter import base_record, open_adapter, write_adapter
from accessory.checkpoint.formats import open_checkpoint
from accessory.checkpoint.formats_write import write_consolidated, write_meta
from accessory.model import Transformer
from accessory.model.args import ModelArgs
from accessory.weights import TensorSource, is_lora
from accessory.weights.lora import Adapted, MergedLoRA, lora_names, merged
from tests.helpers import tiny_tokenizer
from tests.unit.test_reshard import random_tensors
from tools import merge_lora, meta_to_hf, reshard

ARGS = ModelArgs(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=53, hidden_dim=36, tie_word_embeddings=False)
RANK, ALPHA = 3, 12.0


def adapter_tensors(
    dtype: torch.dtype = torch.float32, modules: tuple[str, ...] = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
):
    lora = random_tensors(ARGS, lora_rank=RANK, dtype=dtype)
    return {n: t * 0.05 for n, t in lora.items() if is_lora(n) and n.split(".")[-3] in modules}


def terms(base: Path, **keys) -> dict:
    targets = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
    plain = {
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "lora_targets": targets,
        "modules_to_save": [],
    }
    return plain | {"bias_tuning": False, "norm_tuning": False, "base": base_record(open_checkpoint(base))} | keys


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.mkdir()
    write_meta(path, TensorSource(random_tensors(ARGS, dtype=torch.bfloat16)), ARGS.to_dict(), shards=2)
    return path


def save(directory: Path, tensors: dict, config: dict, **options) -> Path:
    directory.mkdir()
    write_adapter(directory, tensors, config, **options)
    return directory


def test_whole_and_sliced_weights_are_the_formula(base: Path) -> None:
    source, changes = open_checkpoint(base).source, adapter_tensors()
    model = merged(source, TensorSource(changes), {"lora_rank": RANK, "lora_alpha": ALPHA})
    for name in source.names():
        a, b = (changes.get(n) for n in lora_names(name))
        old = source.read(name)
        expected = old if a is None else (old.double() + 4.0 * b.double() @ a.double()).float().to(torch.bfloat16)
        whole = model.read(name)
        assert (
            whole.dtype == torch.bfloat16 and (whole.float() - expected.float()).abs().max() <= 0.01 * old.abs().max()
        ), name
        assert (a is None) == torch.equal(whole, old)
        for dim in range(whole.ndim):
            piece = model.read(name, dim, 2, 9)
            assert torch.allclose(piece.float(), whole.narrow(dim, 2, 7).float(), rtol=0.01, atol=1e-6), (name, dim)
    assert set(model.changes) == {n for n in source.names() if lora_names(n)[0] in changes}
    name, size = model.require_change()
    assert size == pytest.approx((model.read(name).float() - source.read(name).float()).abs().max().item())


def test_base_dtype_is_kept_and_sums_are_in_fp32(base: Path) -> None:
    """Many small contributions that bf16 or fp16 sums would lose."""
    ones = {
        "layers.0.attention.wq.lora_a.weight": torch.full((256, 48), 1 / 256),
        "layers.0.attention.wq.lora_b.weight": torch.ones(48, 256),
    }
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        flat = TensorSource(
            {
                "layers.0.attention.wq.weight": torch.full((48, 48), 1000.0, dtype=dtype),
                "tok_embeddings.weight": torch.ones(1),
            }
        )
        out = merged(flat, TensorSource(ones), {"lora_rank": 256, "lora_alpha": 256.0}).read(
            "layers.0.attention.wq.weight"
        )
        assert out.dtype == dtype and torch.equal(out, torch.full((48, 48), 1001.0).to(dtype))


@pytest.mark.parametrize("format", ["meta", "hf"])
def test_the_tool_gives_the_model_that_was_trained(tmp_path: Path, capsys, format: str, base: Path) -> None:
    torch.manual_seed(0)
    tensors = adapter_tensors() | {"output.weight": torch.randn(53, 48), "norm.weight": torch.rand(48)}
    tensors |= {"layers.1.attention_norm.weight": torch.rand(48)}
    adapter = save(tmp_path / "adapter", tensors, terms(base, modules_to_save=["output"], norm_tuning=True))
    merge_lora.main(adapters=[str(adapter)], dst=str(tmp_path / "out"), format=format)
    assert "17 weights changed" in capsys.readouterr().out
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.kind == {"meta": "meta_ori", "hf": "hf"}[format] and checkpoint.adapter is None
    assert all(checkpoint.source.dtype(n) == torch.bfloat16 for n in checkpoint.source.names())
    assert torch.equal(checkpoint.source.read("output.weight"), tensors["output.weight"].bfloat16())
    tokens = torch.randint(0, 53, (1, 12))
    with torch.no_grad():
        before = Transformer.from_pretrained(base, dtype=torch.float32)(tokens)
        trained = Transformer.from_pretrained(adapter, dtype=torch.float32)(tokens)
        after = Transformer.from_pretrained(tmp_path / "out", dtype=torch.float32)(tokens)
    assert (after - trained).abs().max() < 0.05 * (
        before - trained
    ).abs().max()  # bf16 rounding against the whole change


def test_shards_and_formats_agree_after_merging(tmp_path: Path, base: Path) -> None:
    adapter = save(tmp_path / "adapter", adapter_tensors(), terms(base))
    merge_lora.main(adapters=[str(adapter)], dst=str(tmp_path / "two"), mp=2)
    merge_lora.main(adapters=[str(adapter)], dst=str(tmp_path / "hf"), format="hf", max_shard_size="20KB")
    meta_to_hf.main(src=str(tmp_path / "two"), dst=str(tmp_path / "hf2"))
    reshard.main(src=str(tmp_path / "hf2"), dst=str(tmp_path / "six"), mp=6, embedding_dim=1)
    sources = [open_checkpoint(tmp_path / d).source for d in ("two", "hf", "hf2", "six")]
    assert len(list((tmp_path / "six").glob("consolidated.*.pth"))) == 6
    for name in sources[0].names():
        first = sources[0].read(name)
        assert all(torch.equal(first, s.read(name)) for s in sources[1:]), name


def test_biases_that_only_the_adapter_has(tmp_path: Path, base: Path) -> None:
    args = ModelArgs.from_dict(ARGS.to_dict() | {"attention_bias": True, "mlp_bias": True})
    biases = {n: t for n, t in random_tensors(args).items() if n.endswith(".bias")}
    adapter = save(
        tmp_path / "adapter", biases, terms(base, lora_rank=0, lora_alpha=1.0, lora_targets=[], bias_tuning=True)
    )
    merge_lora.main(adapters=[str(adapter)], dst=str(tmp_path / "out"), format="hf")
    merged_biases = open_checkpoint(tmp_path / "out")
    assert merged_biases.params["attention_bias"] and merged_biases.params["mlp_bias"]
    assert all(torch.equal(merged_biases.source.read(n), t.bfloat16()) for n, t in biases.items())


def test_accessory_checkpoint_with_its_lora_inside(tmp_path: Path) -> None:
    whole = random_tensors(ARGS, lora_rank=RANK)
    (tmp_path / "both").mkdir()
    write_consolidated(tmp_path / "both", whole.items(), ARGS.to_dict())
    with pytest.raises(ValueError, match="holds LoRA weights: merge them"):
        meta_to_hf.main(src=str(tmp_path / "both"), dst=str(tmp_path / "hf"))
    with pytest.raises(ValueError, match="holds LoRA weights: merge them"):
        reshard.main(src=str(tmp_path / "both"), dst=str(tmp_path / "two"), mp=2)
    merge_lora.main(adapters=[str(tmp_path / "both")], dst=str(tmp_path / "out"))
    out, name = open_checkpoint(tmp_path / "out"), "layers.1.feed_forward.w2.weight"
    a, b = (whole[n] for n in lora_names(name))
    assert torch.allclose(out.source.read(name), whole[name] + b @ a, atol=1e-5) and not any(
        map(is_lora, out.source.names())
    )


def test_a_merge_that_changes_nothing_is_an_error(tmp_path: Path, base: Path) -> None:
    untrained = {n: torch.zeros_like(t) if "lora_b" in n else t for n, t in adapter_tensors().items()}
    with pytest.raises(ValueError, match="every lora_b is zero, training has changed nothing"):
        save(tmp_path / "strict", untrained, terms(base))
    save(tmp_path / "zero", untrained, terms(base), expect_trained=False)
    tiny = save(tmp_path / "tiny", {n: t * 1e-6 for n, t in adapter_tensors().items()}, terms(base))
    for adapter in (tmp_path / "zero", tiny):
        with pytest.raises(ValueError, match="merging changed none of its 14 weights"):
            merge_lora.main(adapters=[str(adapter)], dst=str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_an_adapter_remembers_its_base(tmp_path: Path, base: Path) -> None:
    adapter = save(tmp_path / "adapter", adapter_tensors(), terms(base))
    record = json.loads((adapter / "adapter.json").read_text())["base"]
    assert record["path"] == str(base) and len(record["sha256"]["consolidated.01.pth"]) == 64
    checkpoint = open_checkpoint(adapter)
    assert checkpoint.adapter["lora_alpha"] == ALPHA and checkpoint.kind == "meta_ori"
    assert set(checkpoint.source.names()) == set(open_checkpoint(base).source.names()) | set(adapter_tensors())
    os.rename(base, tmp_path / "moved")
    with pytest.raises(ValueError, match=rf"adapter\.json: its base {base} is not there: say where it is with --base"):
        open_checkpoint(adapter)
    assert len(open_checkpoint(adapter, base=tmp_path / "moved").source.names()) == len(checkpoint.source.names())
    merge_lora.main(adapters=[str(adapter)], base=str(tmp_path / "moved"), dst=str(tmp_path / "out"))
    os.rename(tmp_path / "moved", base)
    with open(base / "consolidated.01.pth", "ab") as file:
        file.write(b"x")
    with pytest.raises(
        ValueError, match=r"consolidated\.01\.pth: has \d+ bytes, not \d+, so it is not the base of .*--base"
    ):
        open_checkpoint(adapter)


def other_rank(config, tensors):
    config["lora_rank"] = 5


def half_missing(config, tensors):
    del tensors["layers.1.feed_forward.w3.lora_a.weight"]


def deeper_model(config, tensors):
    tensors |= {n.replace("layers.1.", "layers.7."): t for n, t in tensors.items()}


def wider_model(config, tensors):
    tensors["layers.0.attention.wq.lora_b.weight"] = torch.ones(50, RANK)


def infinite(config, tensors):
    tensors["layers.0.attention.wq.lora_b.weight"][0, 0] = float("inf")


def no_terms(config, tensors):
    del config["lora_alpha"]


@pytest.mark.parametrize(
    "damage, message",
    [
        (other_rank, r"adapter\.safetensors: layers\..*lora_. *.*has rank 3, but lora_rank in adapter\.json is 5"),
        (half_missing, r"has no layers\.1\.feed_forward\.w3\.lora_a\.weight"),
        (deeper_model, r"adapter changes layers\.7\..*, which its base does not have"),
        (wider_model, r"layers\.0\.attention\.wq\.weight is 48x48, but the B \(50, 3\)"),
        (infinite, r"layers\.0\.attention\.wq\.weight is not finite after merging"),
        (no_terms, r"adapter\.json: lora_alpha is missing"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_by_name(tmp_path: Path, base: Path, damage, message: str) -> None:
    config, tensors = terms(base), adapter_tensors()
    damage(config, tensors)
    with pytest.raises(ValueError, match=message) as caught:
        merge_lora.main(adapters=[str(save(tmp_path / "adapter", tensors, config))], dst=str(tmp_path / "out"))
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("out*"))


def test_truncated_adapter_and_missing_parts(tmp_path: Path, base: Path) -> None:
    adapter = save(tmp_path / "adapter", adapter_tensors(), terms(base))
    os.truncate(adapter / "adapter.safetensors", 3000)
    with pytest.raises(ValueError, match=r"adapter\.safetensors: is truncated or damaged"):
        open_adapter(adapter)
    (adapter / "adapter.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter\.safetensors: is missing: an adapter is adapter\.json and"):
        open_checkpoint(adapter)
    with pytest.raises(ValueError, match="holds no adapter.json, no adapter_config.json and no LoRA weights"):
        merge_lora.main(adapters=[str(base)], dst=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="--format gguf: choose meta or hf"):
        merge_lora.main(adapters=[str(base)], dst=str(tmp_path / "out"), format="gguf")


# --- several adapters -------------------------------------------------------------------------------------------------


def second_adapter(scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {n: torch.randn(t.shape, generator=generator) * 0.1 * scale for n, t in adapter_tensors().items()}


def grown(rows: int) -> dict[str, torch.Tensor]:
    """An embedding and a head of `rows` rows."""
    generator = torch.Generator().manual_seed(rows)
    return {f"{n}.weight": torch.randn(rows, 48, generator=generator) for n in ("tok_embeddings", "output")}


def test_two_adapters_are_added_in_fp32_and_rounded_once(tmp_path: Path, base: Path) -> None:
    """In fp16, where rounding after each of the two would give another number."""
    first = save(tmp_path / "first", adapter_tensors(), terms(base))
    second = save(tmp_path / "second", second_adapter(), terms(base, lora_alpha=6.0))
    merge_lora.main(adapters=[str(first), str(second)], dst=str(tmp_path / "out"), mp=2)
    out, source, twice = open_checkpoint(tmp_path / "out").source, open_checkpoint(base).source, 0
    for name in [n for n in source.names() if lora_names(n)[0] in adapter_tensors()]:
        (a, b), (c, d) = ([t[n] for n in lora_names(name)] for t in (adapter_tensors(), second_adapter()))
        once = torch.addmm(source.read(name).float(), b, a, alpha=4.0)
        assert torch.equal(out.read(name), torch.addmm(once, d, c, alpha=2.0).bfloat16()), name
        twice += int((torch.addmm(once.bfloat16().float(), d, c, alpha=2.0).bfloat16() != out.read(name)).sum())
    assert twice > 100


def test_a_vocabulary_that_grows_twice(tmp_path: Path, base: Path, capsys) -> None:
    """53 rows, then 60 in full with a LoRA, then 61: as Chinese-LLaMA and Chinese-Alpaca were made."""
    both, whole = ["tok_embeddings", "output"], {"modules_to_save": ["tok_embeddings", "output"]}
    one = save(tmp_path / "one", adapter_tensors() | grown(60), terms(base, **whole))
    two = save(tmp_path / "two", second_adapter() | grown(61), terms(base, **whole))
    (two / "tokenizer.model").write_bytes(tiny_tokenizer())
    with pytest.raises(ValueError, match=r"tokenizer\.model has 320 tokens, the merged embedding 61 rows"):
        merge_lora.main(adapters=[str(one), str(two)], dst=str(tmp_path / "out"))
    (two / "tokenizer.model").unlink()
    for format in ("meta", "hf"):
        merge_lora.main(adapters=[str(one), str(two)], dst=str(tmp_path / format), format=format)
        out = open_checkpoint(tmp_path / format)
        assert out.params["vocab_size"] == 61 and "61 vocabulary rows" in capsys.readouterr().out
        assert all(torch.equal(out.source.read(f"{n}.weight"), grown(61)[f"{n}.weight"].bfloat16()) for n in both)
    assert open_checkpoint(one).params["vocab_size"] == 60  # also to train on
    assert Transformer.from_pretrained(one)(torch.tensor([[59]])).shape == (1, 1, 60)
    with pytest.raises(
        ValueError, match=rf"base has 53 vocabulary rows.* 61 in {two}, 60 in {one}.*give --adapters {one},{two}"
    ):
        merge_lora.main(adapters=[str(two), str(one)], dst=str(tmp_path / "out"))
    del (lonely := adapter_tensors() | grown(60))["output.weight"]
    half = save(tmp_path / "half", lonely, terms(base, modules_to_save=["tok_embeddings"]))
    with pytest.raises(
        ValueError, match=r"grown in one of two places, rows of tok_embeddings\.weight 60 and output\.weight 53"
    ):
        merge_lora.main(adapters=[str(half)], dst=str(tmp_path / "out"))
    small = save(tmp_path / "small", grown(52), terms(base, lora_rank=0, lora_targets=[], **whole))
    with pytest.raises(ValueError, match=r"base has 53 vocabulary rows, the adapters 52 in .*take the right base"):
        merge_lora.main(adapters=[str(small)], dst=str(tmp_path / "out"))


def test_an_adapter_that_changes_nothing_is_named(tmp_path: Path, base: Path) -> None:
    good = save(tmp_path / "good", adapter_tensors(), terms(base))
    idle = save(tmp_path / "idle", second_adapter(scale=1e-4), terms(base))
    with pytest.raises(ValueError, match=rf"^{idle}: merging changed none of its 14 weights"):
        merge_lora.main(adapters=[str(good), str(idle)], dst=str(tmp_path / "out"))
    early = save(tmp_path / "early", grown(60), terms(base, lora_rank=0, lora_targets=[], modules_to_save=["output"]))
    late = save(tmp_path / "late", grown(61), terms(base, lora_rank=0, lora_targets=[], modules_to_save=["output"]))
    with pytest.raises(
        ValueError, match=rf"^{early}: merging changed none of its 2 weights.* a later adapter replaces"
    ):
        merge_lora.main(adapters=[str(early), str(late)], dst=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=rf"--adapters names {good} twice"):
        merge_lora.main(adapters=[str(good), str(good)], dst=str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_adapters_of_one_base_are_said(tmp_path: Path, base: Path, capsys) -> None:
    """The second may have gone on from the first: then the first would be counted twice."""
    first, second = (save(tmp_path / n, t, terms(base)) for n, t in (("1", adapter_tensors()), ("2", second_adapter())))
    merge_lora.main(adapters=[str(first)], dst=str(tmp_path / "one"))
    assert "warning" not in capsys.readouterr().out
    later = save(tmp_path / "later", second_adapter(), terms(tmp_path / "one"))
    merge_lora.main(adapters=[str(first), str(later)], dst=str(tmp_path / "chain"))
    assert "warning" not in capsys.readouterr().out
    merge_lora.main(adapters=[str(first), str(second)], dst=str(tmp_path / "both"))
    assert f"warning: {second} was trained on the same base as {first}, not on" in capsys.readouterr().out


def test_slices_of_a_chain_are_slices_of_the_whole() -> None:
    source = TensorSource(random_tensors(ARGS, dtype=torch.bfloat16))
    plain = {"lora_rank": RANK, "lora_alpha": ALPHA}
    chain = Adapted(source, TensorSource(adapter_tensors() | grown(60)), plain, "one")
    model = MergedLoRA(Adapted(chain, TensorSource(second_adapter() | grown(64)), plain, "two"))
    for name in model.names():
        whole = model.read(name)
        assert whole.shape == model.shape(name) and whole.dtype == model.dtype(name) == torch.bfloat16
        for dim in range(whole.ndim):
            for start, stop in ((3, 12), (whole.shape[dim] - 9, whole.shape[dim]), (4, None)):
                piece, expected = (
                    model.read(name, dim, start, stop),
                    whole.narrow(dim, start, (stop or whole.shape[dim]) - start),
                )
                assert torch.allclose(piece.float(), expected.float(), rtol=0.01, atol=1e-6), (name, dim)
    lines = model.change_lines()
    assert any(
        line.startswith("layers.*.attention.wq.weight ") and "2 of 2 changed, by up to" in line for line in lines
    )
    assert len(lines) == 9 and MergedLoRA(chain, torch.float32).dtype("output.weight") == torch.float32


def test_another_base_is_refused_or_said(tmp_path: Path, base: Path, capsys) -> None:
    """Bases of one model's size: only their hashes tell them apart."""
    adapter, other = save(tmp_path / "adapter", adapter_tensors(), terms(base)), tmp_path / "other"
    other.mkdir()
    weights = {n: t + 0.25 for n, t in random_tensors(ARGS, dtype=torch.bfloat16).items()}
    write_meta(other, TensorSource(weights), ARGS.to_dict(), shards=2)
    merge_lora.main(adapters=[str(adapter)], base=str(other), dst=str(tmp_path / "said"))
    assert f"warning: --base {other} is not the base of {adapter}: it was trained on {base}" in capsys.readouterr().out
    merge_lora.main(adapters=[str(adapter)], base=str(base), dst=str(tmp_path / "own"))
    assert "warning" not in capsys.readouterr().out
    for file in other.glob("*.pth"):
        os.replace(file, base / file.name)
    with pytest.raises(
        ValueError, match=rf"adapter: it was trained on {base}, whose files have another sha256: say with --base"
    ):
        merge_lora.main(adapters=[str(adapter)], dst=str(tmp_path / "out"))
    wide, args = tmp_path / "wide", ModelArgs.from_dict(ARGS.to_dict() | {"dim": 60})
    wide.mkdir()
    write_meta(wide, TensorSource(random_tensors(args)), args.to_dict())
    with pytest.raises(ValueError, match="of another model"):
        merge_lora.main(adapters=[str(adapter)], base=str(wide), dst=str(tmp_path / "out"))


# --- a saved adapter is verified --------------------------------------------------------------------------------------

COMPLETE = {"modules_to_save": ["output"], "norm_tuning": True}
LOSSES = {  # what is taken out of a complete set of tensors, and what the message names
    "a half": (
        lambda t: t.pop("layers.1.attention.wk.lora_a.weight"),
        r"layers\.1\.attention\.wk\.lora_a\.weight is missing \(1 such\)",
    ),
    "a layer": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith("layers.1.")],
        r"layers\.1\..* is missing \(16 such\)",
    ),
    "the head": (lambda t: t.pop("output.weight"), r"nothing of output \(modules_to_save\) is in it"),
    "a norm": (lambda t: t.pop("norm.weight"), r"norm\.weight is missing"),
    "rows": (
        lambda t: t.update({"output.weight": t["output.weight"][:26]}),
        r"output\.weight is \(26, 48\), not \(53, 48\)",
    ),
    "all of it": (lambda t: t.clear(), "there is nothing to save"),
}


@pytest.mark.parametrize("lost", LOSSES)
def test_an_adapter_that_is_not_whole_is_not_saved(tmp_path: Path, base: Path, lost: str) -> None:
    norms = {n: t for n, t in random_tensors(ARGS).items() if "norm." in n}
    tensors = adapter_tensors() | norms | {"output.weight": torch.randn(53, 48)}
    save(tmp_path / "whole", tensors, terms(base, **COMPLETE), args=ARGS)
    lose, message = LOSSES[lost]
    lose(tensors)
    with pytest.raises(ValueError, match=message) as caught:
        save(tmp_path / "part", tensors, terms(base, **COMPLETE), args=ARGS)
    assert "\n" not in str(caught.value) and "adapter.safetensors" in str(caught.value)


def test_a_rank_of_its_own_for_some_linears(tmp_path: Path, base: Path) -> None:
    """rank_pattern, alpha_pattern and use_rslora: in the file, in the model and in the merged weights alike."""
    own = {
        "rank_pattern": {"w2": 5, "layers.0.attention": 0},
        "alpha_pattern": {"layers.1.attention.wq": 2.0},
        "use_rslora": True,
    }
    tensors = {n: t for n, t in adapter_tensors().items() if not n.startswith("layers.0.attention")}
    for name in [n for n in tensors if ".w2." in n]:
        shape = [5 if s == RANK else s for s in tensors[name].shape]
        tensors[name] = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.1
    adapter = save(tmp_path / "adapter", tensors, terms(base, **own), args=ARGS)
    merge_lora.main(adapters=[str(adapter)], dst=str(tmp_path / "out"), dtype="fp32")
    out, source = open_checkpoint(tmp_path / "out").source, open_checkpoint(base).source
    scales = {
        "layers.1.feed_forward.w2": ALPHA / 5**0.5,
        "layers.1.attention.wq": 2 / 3**0.5,
        "layers.1.feed_forward.w1": ALPHA / 3**0.5,
    }
    for linear, scale in scales.items():
        a, b = (tensors[n] for n in lora_names(f"{linear}.weight"))
        expected = source.read(f"{linear}.weight").float() + scale * b @ a
        assert torch.allclose(out.read(f"{linear}.weight"), expected, atol=1e-6), linear
    model, tokens = Transformer.from_pretrained(adapter, dtype=torch.float32), torch.arange(12)[None]
    with torch.no_grad():
        difference = model(tokens) - Transformer.from_pretrained(tmp_path / "out")(tokens)
    assert difference.abs().max() < 2e-5 * model(tokens).abs().max()
    assert model.layers[0].attention.wq.lora_a is None and model.layers[0].feed_forward.w2.lora_a.weight.shape[0] == 5
    with pytest.raises(
        ValueError, match=r"layers\.0\.feed_forward\.w2\.lora_.*has rank 5, but lora_rank in adapter\.json is 3"
    ):
        save(tmp_path / "other", tensors, terms(base, **own | {"rank_pattern": {}}))
