"""PEFT's adapters, and ranks of their own for some linears, at mp 1, 2 and 4 over two kv heads: the same logits."""

import json
from pathlib import Path

import torch

from accessory.checkpoint.formats_write import save_safetensors, write_meta
from accessory.model import Transformer
from accessory.parallel import groups
from accessory.weights import TensorSource
from tests.helpers import random_weights, run_ranks, tiny_args

ARGS = tiny_args(n_kv_heads=2, tie_word_embeddings=False)
ALPHAS = {"q_proj": 6.0, "k_proj": 6.0, "v_proj": 2.0, "down_proj": 6.0}
RANKS = {"q_proj": 4, "k_proj": 4, "v_proj": 4, "down_proj": 3}
META = {"q_proj": "attention.wq", "k_proj": "attention.wk", "v_proj": "attention.wv", "down_proj": "feed_forward.w2"}


def as_peft(rows: torch.Tensor) -> torch.Tensor:
    """Meta's rows in Hugging Face's order, head by head, written out."""
    size = ARGS.head_size
    order = [h * size + i for h in range(len(rows) // size) for i in [*range(0, size, 2), *range(1, size, 2)]]
    return rows[order]


def write_adapter_of_peft(directory: Path, base: Path, weights: dict) -> dict[str, torch.Tensor]:
    """A PEFT adapter on some linears and the embedding; returns the weights with all of it added, in plain torch."""
    generator, tensors, merged = torch.Generator().manual_seed(3), {}, dict(weights)
    for layer in range(ARGS.n_layers):
        for module, rank in RANKS.items():
            name = f"layers.{layer}.{META[module]}.weight"
            out, columns = weights[name].shape
            a, b = (torch.randn(s, generator=generator) * 0.3 for s in ((rank, columns), (out, rank)))
            merged[name] = weights[name] + ALPHAS[module] / rank * b @ a
            stem = f"base_model.model.model.layers.{layer}.{'mlp' if module == 'down_proj' else 'self_attn'}.{module}"
            tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": as_peft(b) if module[0] in "qk" else b}
    rows, dim = weights["tok_embeddings.weight"].shape
    a, b = torch.randn(4, rows, generator=generator), torch.randn(dim, 4, generator=generator)
    tensors |= {f"base_model.model.model.embed_tokens.lora_embedding_{x}": t for x, t in (("A", a), ("B", b))}
    merged["tok_embeddings.weight"] = weights["tok_embeddings.weight"] + 6.0 / 4 * (b @ a).t()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 6,
        "base_model_name_or_path": str(base),
    }
    config |= {
        "target_modules": [*RANKS, "embed_tokens"],
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"v_proj": 2},
    }
    directory.mkdir()
    save_safetensors(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return merged


def logits(directory: str, mp: int) -> torch.Tensor:
    with torch.no_grad():
        model = Transformer.from_pretrained(directory, model_parallel_size=mp)
        assert model.layers[1].feed_forward.w2.lora_a is not None or "merged" in directory
        tokens = torch.arange(40).reshape(2, 20)
        values = model(tokens)
    groups.forget_model_parallel()
    return values


def test_an_adapter_of_peft_at_any_model_parallel_size(tmp_path: Path) -> None:
    weights, base = random_weights(ARGS), tmp_path / "base"
    merged = write_adapter_of_peft(tmp_path / "adapter", base, weights)
    for name, tensors in (("base", weights), ("merged", merged)):
        (tmp_path / name).mkdir()
        write_meta(tmp_path / name, TensorSource(tensors), ARGS.to_dict(), shards=2)
    [expected] = run_ranks(logits, str(tmp_path / "merged"), 1, world=1)
    for mp in (1, 2, 4):
        for values in run_ranks(logits, str(tmp_path / "adapter"), mp, world=mp):
            assert (values - expected).abs().max() <= 2e-5 * expected.abs().max(), mp
