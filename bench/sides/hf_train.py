"""transformers, with PEFT where an adapter is trained: what its Trainer does in a step, without its bookkeeping.

Settings: mode autocast (fp32 weights, torch.autocast), bf16 (everything in bf16) or fp32; compile; lora; pad_to (default: to the
longest of the batch); file (which of data["models"]); dynamic (for compile). The loss is the mean over the batch's targets.
"""

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

from bench import measure
from bench.sides import batches


def load(data: dict, settings: dict, device: str) -> torch.nn.Module:
    """The model in train mode. Under autocast an adapter's base is held in bf16 and the adapter in fp32, as PEFT does."""
    mode, lora = settings["mode"], settings.get("lora", False)
    half = mode == "bf16" or (mode == "autocast" and lora and settings.get("file") == "bf16")
    model = AutoModelForCausalLM.from_pretrained(
        data["models"][settings.get("file", "fp32")],
        dtype=torch.bfloat16 if half else torch.float32,
        attn_implementation="sdpa",
    )
    model.config.use_cache = False
    if lora:
        from peft import PeftModel

        model = PeftModel.from_pretrained(
            model, data["adapter"], is_trainable=True, autocast_adapter_dtype=mode != "bf16"
        )
    return model.to(device).train()


def main() -> None:
    work = measure.begin()
    data, settings, device = work["data"], work["settings"], work["device"]
    model = load(data, settings, device)
    loaded = measure.now_mb(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=data["lr"], betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    run = torch.compile(model, dynamic=settings.get("dynamic")) if settings.get("compile") else model

    def step(window) -> torch.Tensor:
        tokens, labels, mask = batches.padded(window, 0, settings.get("pad_to"), device)
        with torch.autocast(device, torch.bfloat16, enabled=settings["mode"] == "autocast"):
            told = run(input_ids=tokens, attention_mask=mask, labels=labels, num_items_in_batch=batches.targets(window))
        told.loss.backward()
        clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return told.loss

    losses: list[torch.Tensor] = []
    batches.run(data, step, losses, device, loaded)


if __name__ == "__main__":
    main()
