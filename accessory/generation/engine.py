"""Generation: a key-value cache, greedy and temperature sampling over a batch of prompts of any lengths.

    prefill   prompts side by side, padded on the right; a row's first new token comes from its own last position
    decode    one token a row and step, written at the row's own position, over what the padding left there

A query sees the keys up to its own position, so padding is never seen. Every rank calls `generate` alike; sampling draws on
the CPU from a seed, the same on all ranks, so that mp ranks never disagree. Test: tests/unit/test_generation.py.

Shapes: B prompts, T tokens of a step, S cache length, K kv heads, Dh head dim, V vocab, /mp = this rank's slice.
"""

from numbers import Integral
from typing import Any, Sequence

import torch
from torch import Tensor

from accessory.model.checks import check_weights
from accessory.parallel import groups

COLDEST = 1e-6  # temperature: below, differences of logits leave fp32's range


class KVCache:
    """Keys and values of all layers for B rows of at most S tokens; made at the first step, on its device and dtype."""

    def __init__(self, layers: int, rows: int, length: int):
        self.layers, self.rows, self.length = layers, rows, length
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.positions: Tensor | None = None  # (B, T) of the present step

    def begin(self, positions: Tensor) -> None:
        """Says where the tokens of the coming step stand; call before the model."""
        self.positions = positions
        slots = torch.arange(self.length, device=positions.device)
        self.mask = (slots <= positions.unsqueeze(-1)).unsqueeze(1)  # (B, 1, T, S)
        self.row = torch.arange(self.rows, device=positions.device).unsqueeze(1)  # (B, 1)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if len(self.keys) == layer:
            shape = (self.rows, self.length, *keys.shape[2:])
            self.keys.append(keys.new_zeros(shape))
            self.values.append(values.new_zeros(shape))
        self.keys[layer][self.row, self.positions] = keys
        self.values[layer][self.row, self.positions] = values
        return self.keys[layer], self.values[layer], self.mask


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_ids: int | Sequence[int] | None = (),
    seed: int = 0,
) -> list[list[int]]:
    """New token ids for each prompt (prompt and end token not included), at most max_new_tokens of them.

    temperature 0 is greedy; top_p keeps the smallest set of tokens with that much probability (Holtzman et al. 2019).
    The model is in eval mode meanwhile, afterwards each of its modules as it was, after an error too. Raises ValueError for an
    empty prompt and for arguments that are none. Every rank calls it with the same prompts."""
    check_weights(model)
    rows = _rows(prompts)
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature}, top_p {top_p}: expected 0 or more, and above 0 and at most 1")
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens!r}: a whole number of 0 or more is expected")
    eos_ids = (eos_ids,) if isinstance(eos_ids, int) else eos_ids or ()
    weight = model.tok_embeddings.weight
    device = groups.device() if hasattr(weight, "device_mesh") else weight.device  # FSDP's may rest on the host
    lengths = torch.tensor([len(row) for row in rows], device=device)
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    cache = KVCache(len(model.layers), len(rows), tokens.shape[1] + max_new_tokens)
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    generator = torch.Generator().manual_seed(seed)
    new: list[list[int]] = [[] for _ in rows]
    finished = [False] * len(rows)
    last = (lengths - 1).tolist()
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for _ in range(max_new_tokens):
            cache.begin(positions)
            logits = model(tokens, positions=positions, cache=cache)  # (B, T, V)
            logits = logits[torch.arange(len(rows)), last if tokens.shape[1] > 1 else 0]  # (B, V)
            chosen = choose(logits, temperature, top_p, generator)
            for row, token in enumerate(chosen.tolist()):
                finished[row] = finished[row] or token in eos_ids
                if not finished[row]:
                    new[row].append(token)
            if all(finished):
                break
            tokens, positions = chosen.unsqueeze(1).to(device), lengths.unsqueeze(1)
            lengths = lengths + 1
    finally:  # after an error too, and each as it was: in silence dropout would be off, or on where it was off
        for module, was_training in modes:
            module.training = was_training
    return new


def _rows(prompts: Any) -> list[Tensor]:
    """Each prompt's ids, int64 on the host. Raises ValueError for what is none."""
    try:
        rows = [torch.as_tensor(prompt).cpu() for prompt in prompts]
    except (TypeError, ValueError, RuntimeError):  # text, None, rows of rows
        rows = [torch.tensor(0)]
    if not rows or any(row.dim() == 1 and not len(row) for row in rows):
        raise ValueError("a prompt is empty: give at least one token (the BOS id will do)")
    if any(row.dim() != 1 or row.is_floating_point() or row.dtype == torch.bool for row in rows):
        raise ValueError(
            "prompts: a list of token ids for each prompt is expected; tokenizer.encode(text, bos=True) gives one"
        )
    return [row.long() for row in rows]


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token a row from logits (B, V): the largest, or a draw. (B,) on the CPU. ValueError where one is not a number."""
    if not logits.isfinite().all():
        raise ValueError(
            "the model's logits are not finite: its weights are damaged, or --precision fp16 is too narrow for it"
        )
    if temperature <= 0:
        return logits.argmax(-1).cpu()
    logits = logits.float().cpu()
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / max(temperature, COLDEST)).softmax(-1)
    if top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0.0
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ranked)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
