"""torchtune's model and chunked loss in the loop of its full_finetune_single_device and lora_finetune_single_device recipes;
`compile` per layer and of the loss, as there.

Settings: mode bf16 or fp32; compile; lora; pad_to.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torchtune import training
from torchtune.models import convert_weights
from torchtune.models.llama2 import llama2, lora_llama2
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from bench import measure
from bench.sides import batches

MLP = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def rotary(rows: Tensor, heads: int) -> Tensor:
    """Rows of a q or k matrix from Hugging Face's rotary order to Meta's, which torchtune has."""
    return rows.view(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def adapter_weights(directory: Path, sizes: dict[str, Any]) -> dict[str, Tensor]:
    peft, tensors = load_file(directory / "adapter_model.safetensors"), {}
    for name, value in peft.items():
        parts = name.removeprefix("base_model.model.model.").split(".")
        module, kind = parts[3], "lora_a" if parts[4] == "lora_A" else "lora_b"
        if kind == "lora_b" and module in ("q_proj", "k_proj"):
            value = rotary(value, sizes["n_heads"] if module == "q_proj" else sizes["n_kv_heads"])
        place = f"mlp.{MLP[module]}" if module in MLP else f"attn.{'output_proj' if module == 'o_proj' else module}"
        tensors[f"layers.{parts[1]}.{place}.{kind}.weight"] = value
    return tensors


def load(data: dict, settings: dict, device: str, longest: int) -> torch.nn.Module:
    sizes = data["sizes"]
    keys = {
        "vocab_size": sizes["vocab_size"], "num_layers": sizes["n_layers"], "num_heads": sizes["n_heads"],
        "num_kv_heads": sizes["n_kv_heads"], "embed_dim": sizes["dim"], "intermediate_dim": sizes["hidden_dim"],
        "max_seq_len": longest, "norm_eps": sizes.get("norm_eps", 1e-5),
    }  # fmt: skip
    stored: dict[str, Tensor] = {}
    for file in sorted(Path(data["models"]["bf16"]).glob("*.safetensors")):
        stored |= load_file(file)
    weights = convert_weights.hf_to_tune(stored, sizes["n_heads"], sizes["n_kv_heads"], sizes["dim"])
    if not settings.get("lora"):
        model = llama2(**keys)
    else:
        terms = json.loads((Path(data["adapter"]) / "adapter_config.json").read_text())
        attention = ["q_proj", "k_proj", "v_proj", "output_proj"]
        model = lora_llama2(attention, True, lora_rank=terms["r"], lora_alpha=terms["lora_alpha"], **keys)
        set_trainable_params(model, get_adapter_params(model))
        weights |= adapter_weights(Path(data["adapter"]), sizes)
    model.load_state_dict(weights)
    return model.to(device, torch.bfloat16 if settings["mode"] == "bf16" else torch.float32).train()


def main() -> None:
    work = measure.begin()
    data, settings, device = work["data"], work["settings"], work["device"]
    longest = settings.get("pad_to") or max(len(ids) for ids, _ in batches.examples(data))
    model, loss_of = load(data, settings, device, longest), CEWithChunkedOutputLoss()
    loaded = measure.now_mb(device)
    model.set_num_output_chunks(loss_of.num_output_chunks)
    if settings.get("compile"):
        training.compile_model(model, verbose=False)
        training.compile_loss(loss_of, verbose=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=data["lr"], betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(window) -> Tensor:
        tokens, labels, _ = batches.padded(window, 0, settings.get("pad_to"), device)
        ignored = torch.full_like(labels[:, :1], batches.IGNORED)
        loss = loss_of(model(tokens), torch.hstack((labels[:, 1:], ignored)))
        loss.backward()
        clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    losses: list[Tensor] = []
    batches.run(data, step, losses, device, loaded)


if __name__ == "__main__":
    main()
