"""litgpt's model and loss, in the loop of its finetune/full.py and lora.py without Fabric's logging: bf16-true, its head in chunks of
128 for LoRA and its chunked loss. `compile` as its pretrain.py does.

Settings: mode bf16 or fp32; compile; lora; pad_to.
"""

import json
from pathlib import Path
from typing import Any

import torch
from litgpt import lora as litgpt_lora
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import chunked_cross_entropy
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from bench import measure
from bench.sides import batches

LORA = ("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp")
MLP = {"gate_proj": "fc_1", "up_proj": "fc_2", "down_proj": "proj"}


def config_keys(sizes: dict[str, Any], longest: int) -> dict[str, Any]:
    return {
        "name": "bench", "n_layer": sizes["n_layers"], "n_head": sizes["n_heads"], "n_query_groups": sizes["n_kv_heads"],
        "n_embd": sizes["dim"], "intermediate_size": sizes["hidden_dim"], "vocab_size": sizes["vocab_size"],
        "padded_vocab_size": sizes["vocab_size"], "block_size": longest, "rotary_percentage": 1.0, "parallel_residual": False,
        "bias": False, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "norm_eps": sizes.get("norm_eps", 1e-5),
        "rope_base": int(sizes.get("rope_theta", 10000)),
    }  # fmt: skip


def adapter_weights(directory: Path, layers: int) -> dict[str, Tensor]:
    """PEFT's tensors under litgpt's names: q, k and v stand in one matrix."""
    peft = load_file(directory / "adapter_model.safetensors")
    tensors: dict[str, Tensor] = {}
    for layer in range(layers):
        old, new = f"base_model.model.model.layers.{layer}", f"transformer.h.{layer}"
        for kind in "AB":
            parts = [peft[f"{old}.self_attn.{x}_proj.lora_{kind}.weight"] for x in "qkv"]
            tensors[f"{new}.attn.qkv.lora_{kind}"] = torch.cat(parts)
            tensors[f"{new}.attn.proj.lora_{kind}"] = peft[f"{old}.self_attn.o_proj.lora_{kind}.weight"]
            for theirs, name in MLP.items():
                tensors[f"{new}.mlp.{name}.lora_{kind}"] = peft[f"{old}.mlp.{theirs}.lora_{kind}.weight"]
    return tensors


def load(data: dict, settings: dict, device: str, longest: int) -> torch.nn.Module:
    sizes, keys = data["sizes"], config_keys(data["sizes"], longest)
    stored: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for file in sorted(Path(data["models"]["bf16"]).glob("*.safetensors")):
        stored |= load_file(file)
    if not settings.get("lora"):
        config = Config(**keys)
        model = GPT(config)
    else:
        terms = json.loads((Path(data["adapter"]) / "adapter_config.json").read_text())
        config = litgpt_lora.Config(
            **keys, lora_r=terms["r"], lora_alpha=terms["lora_alpha"], **dict.fromkeys(LORA, True)
        )
        model = litgpt_lora.GPT(config)
        litgpt_lora.mark_only_lora_as_trainable(model)
        weights |= adapter_weights(Path(data["adapter"]), sizes["n_layers"])
    copy_weights_hf_llama(config, {}, weights, stored)
    model.load_state_dict(weights)
    return model.to(device, torch.bfloat16 if settings["mode"] == "bf16" else torch.float32).train()


def main() -> None:
    work = measure.begin()
    data, settings, device = work["data"], work["settings"], work["device"]
    longest = settings.get("pad_to") or max(len(ids) for ids, _ in batches.examples(data))
    model, chunk = load(data, settings, device, longest), 128 if settings.get("lora") else 0
    loaded = measure.now_mb(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=data["lr"], betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    run = torch.compile(model) if settings.get("compile") else model

    losses: list[Tensor] = []

    def exact(logits: Tensor, labels: Tensor) -> Tensor:
        """Its own loss is a bf16 number, two digits after the point; the compared ones, of untimed steps, are taken again."""
        return cross_entropy(logits.detach().float().flatten(0, 1), labels.flatten())

    def step(window) -> Tensor:
        tokens, labels, _ = batches.padded(window, 0, settings.get("pad_to"), device)
        if chunk:
            logits = run(tokens, lm_head_chunk_size=chunk)
            logits[-1] = logits[-1][..., :-1, :]
            whole = torch.cat(logits, 1) if len(losses) < data["losses"] else None
        else:
            logits = whole = run(tokens)[..., :-1, :]
        told = exact(whole, labels[..., 1:]) if len(losses) < data["losses"] else None
        loss = chunked_cross_entropy(logits, labels[..., 1:])
        loss.backward()
        clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss if told is None else told

    batches.run(data, step, losses, device, loaded)


if __name__ == "__main__":
    main()
