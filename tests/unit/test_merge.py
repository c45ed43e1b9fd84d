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
from accessory.weights.lora import lora_names, merged
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
    tensors = adapter_tensors() | {"output.weight": torch.randn(53, 48), "norm.weight": torch.rand(48)}
    tensors |= {"layers.1.attention_norm.weight": torch.rand(48)}
    adapter = save(tmp_path / "adapter", tensors, terms(base, modules_to_save=["output"], norm_tuning=True))
    merge_lora.main(adapter=str(adapter), dst=str(tmp_path / "out"), format=format)
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
    merge_lora.main(adapter=str(adapter), dst=str(tmp_path / "two"), model_parallel_size=2)
    merge_lora.main(adapter=str(adapter), dst=str(tmp_path / "hf"), format="hf", max_shard_size="20KB")
    meta_to_hf.main(src=str(tmp_path / "two"), dst=str(tmp_path / "hf2"))
    reshard.main(src=str(tmp_path / "hf2"), dst=str(tmp_path / "six"), model_parallel_size=6, embedding_dim=1)
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
    merge_lora.main(adapter=str(adapter), dst=str(tmp_path / "out"), format="hf")
    merged_biases = open_checkpoint(tmp_path / "out")
    assert merged_biases.params["attention_bias"] and merged_biases.params["mlp_bias"]
    assert all(torch.equal(merged_biases.source.read(n), t.bfloat16()) for n, t in biases.items())


def test_accessory_checkpoint_with_its_lora_inside(tmp_path: Path) -> None:
    whole = random_tensors(ARGS, lora_rank=RANK)
    (tmp_path / "both").mkdir()
    write_consolidated(tmp_path / "both", whole.items(), ARGS.to_dict())
    with pytest.raises(ValueError, match="holds LoRA weights: merge them"):
        meta_to_hf.main(src=str(tmp_path / "both"), dst=str(tmp_path / "hf"))
    merge_lora.main(adapter=str(tmp_path / "both"), dst=str(tmp_path / "out"))
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
        with pytest.raises(ValueError, match="merging changed none of the 14 weights"):
            merge_lora.main(adapter=str(adapter), dst=str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_an_adapter_remembers_its_base(tmp_path: Path, base: Path) -> None:
    adapter = save(tmp_path / "adapter", adapter_tensors(), terms(base))
    record = json.loads((adapter / "adapter.json").read_text())["base"]
    assert record["path"] == str(base) and len(record["sha256"]["consolidated.01.pth"]) == 64
    checkpoint = open_checkpoint(adapter)
    assert checkpoint.adapter["lora_alpha"] == ALPHA and checkpoint.kind == "meta_ori"
    assert set(checkpoint.source.names()) == set(open_checkpoint(base).source.names()) | set(adapter_tensors())
    os.rename(base, tmp_path / "moved")
    with pytest.raises(
        ValueError, match=rf"adapter\.json: its base {base} is not there: say where it is with --base"
    ):
        open_checkpoint(adapter)
    assert len(open_checkpoint(adapter, base=tmp_path / "moved").source.names()) == len(checkpoint.source.names())
    merge_lora.main(adapter=str(adapter), base=str(tmp_path / "moved"), dst=str(tmp_path / "out"))
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
        (half_missing, r"the adapter has no layers\.1\.feed_forward\.w3\.lora_a\.weight"),
        (deeper_model, r"adapter\.safetensors: layers\.7\..* has no counterpart in its base"),
        (wider_model, r"layers\.0\.attention\.wq\.weight is 48x48, but the adapter's B \(50, 3\)"),
        (infinite, r"layers\.0\.attention\.wq\.weight is not finite after merging"),
        (no_terms, r"adapter\.json: lora_alpha is missing"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_by_name(tmp_path: Path, base: Path, damage, message: str) -> None:
    config, tensors = terms(base), adapter_tensors()
    damage(config, tensors)
    with pytest.raises(ValueError, match=message) as caught:
        merge_lora.main(adapter=str(save(tmp_path / "adapter", tensors, config)), dst=str(tmp_path / "out"))
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("out*"))


def test_truncated_adapter_and_missing_parts(tmp_path: Path, base: Path) -> None:
    adapter = save(tmp_path / "adapter", adapter_tensors(), terms(base))
    os.truncate(adapter / "adapter.safetensors", 3000)
    with pytest.raises(ValueError, match=r"adapter\.safetensors: is truncated or damaged"):
        open_adapter(adapter)
    (adapter / "adapter.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter\.safetensors: is missing: an adapter is adapter\.json and"):
        open_checkpoint(adapter)
    with pytest.raises(ValueError, match="holds no adapter.json and no LoRA weights"):
        merge_lora.main(adapter=str(base), dst=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="--format gguf: choose meta or hf"):
        merge_lora.main(adapter=str(base), dst=str(tmp_path / "out"), format="gguf")
