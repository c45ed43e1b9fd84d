"""Causal attention over documents packed in one row, forward and backward, in one of several ways.

settings: way (WAYS), lengths, heads, kv_heads, head_dim, layers, dtype, units. "block mask" is SDPA
under a mask made once, outside the timing; "transformers" is its own path for packed rows: the mask made of position_ids,
for each step (its model makes it once for all layers: settings.layers calls of attention share it, as they share ours). What
torch has for it on a GPU: "varlen", "flex" (compiled, its mask made once, outside the timing), "one by one" (SDPA, which
chooses its backend).
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import measure

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def ours(settings: dict, device: str):
    from accessory.model.attention import Segments, attend

    bounds = torch.tensor([0, *itertools.accumulate(settings["lengths"])], dtype=torch.int32)

    def prepare():
        return Segments(bounds, torch.device(device))

    return prepare, lambda q, k, v, packed: attend(q, k, v, packed, None)


def documents(lengths: list[int], device: str) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)


def block_mask(settings: dict, device: str):
    of = documents(settings["lengths"], device)
    mask = (of[:, None] == of[None, :]).tril()
    return lambda: mask, _sdpa


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def transformers(settings: dict, device: str):
    """`create_causal_mask` finds the documents in position_ids; then its sdpa attention."""
    from transformers import LlamaConfig
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import create_causal_mask

    positions = torch.cat([torch.arange(n) for n in settings["lengths"]]).unsqueeze(0).to(device)
    config = LlamaConfig(attn_implementation="sdpa")
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = settings["heads"] // settings["kv_heads"], True
    row = torch.empty(1, positions.shape[1], 1, dtype=DTYPES[settings["dtype"]], device=device)

    def prepare():
        return create_causal_mask(
            config=config, inputs_embeds=row, attention_mask=None, past_key_values=None, position_ids=positions
        )

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        assert mask is not None, "transformers did not see that the row is packed"
        return sdpa_attention_forward(module, *(t.transpose(1, 2) for t in (q, k, v)), attention_mask=mask)[0]

    return prepare, attend


def varlen(settings: dict, device: str):
    from torch.nn.attention.varlen import varlen_attn

    from accessory.model.attention import causal_varlen

    kernel, lengths = causal_varlen(varlen_attn), settings["lengths"]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return lambda: bounds, lambda q, k, v, b: kernel(q[0], k[0], v[0], b, max(lengths)).unsqueeze(0)


def flex(settings: dict, device: str):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    of, total = documents(settings["lengths"], device), sum(settings["lengths"])
    mask = create_block_mask(lambda b, h, i, j: (of[i] == of[j]) & (i >= j), None, None, total, total, device=device)
    compiled, grouped = torch.compile(flex_attention), settings["heads"] != settings["kv_heads"]

    def attend(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)

    return lambda: mask, attend


def one_by_one(settings: dict, device: str):
    grouped = settings["heads"] != settings["kv_heads"]

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        parts = zip(*(t.transpose(1, 2).split(lengths, 2) for t in (q, k, v)))
        found = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=grouped) for part in parts]
        return torch.cat(found, 2).transpose(1, 2)

    return lambda: settings["lengths"], attend


WAYS = {"ours": ours, "block mask": block_mask, "transformers": transformers}
WAYS |= {"varlen": varlen, "flex": flex, "one by one": one_by_one}


def main() -> None:
    work = measure.begin()
    settings, device, total = work["settings"], work["device"], sum(work["settings"]["lengths"])
    draw, dtype = torch.Generator().manual_seed(0), DTYPES[settings["dtype"]]
    heads = (settings["heads"], settings["kv_heads"], settings["kv_heads"], settings["heads"])
    q, k, v, weight = (torch.randn(1, total, h, settings["head_dim"], generator=draw).to(device, dtype) for h in heads)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    prepare, attend = WAYS[settings["way"]](settings, device)
    losses = []

    def step() -> None:
        shared = prepare()
        for _ in range(settings["layers"]):
            for t in inputs:
                t.grad = None
            loss = (attend(*inputs, shared).float() * weight.float()).sum() / total
            loss.backward()
        losses.append(torch.stack([loss.detach(), *(t.grad.float().square().mean() for t in inputs)]))

    timed = measure.timed(step, 2, settings["units"], device)
    measure.report(loss=losses[0].tolist(), tokens=total * settings["layers"], **timed)


if __name__ == "__main__":
    main()
