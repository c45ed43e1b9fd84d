"""Ours, one optimizer step at a time: what loop.fit does between two windows, callable, for rows that measure it alone."""

import torch
from torch import Tensor

from accessory.flags import ParallelArgs
from accessory.model import Transformer, shard_dim
from accessory.model.llama import kv_copied
from accessory.model.lora import TuningArgs, mark_trainable, partial_grad
from accessory.model.pretrained import build, open_pretrained
from accessory.parallel import groups
from accessory.parallel.grads import GradientRules
from accessory.train import optim
from accessory.train.start import materialise

RATE, CLIP = 1e-4, 1.0


def load(path: str, parallel: ParallelArgs, tuning: TuningArgs | None = None) -> tuple[Transformer, object]:
    """(the model as a run has it before its first step, its sizes). Every rank calls it, after groups.init."""
    checkpoint, args = open_pretrained(path)
    model = build(checkpoint, args, tuning or TuningArgs())
    mark_trainable(model, tuning or TuningArgs())
    materialise(model, checkpoint, parallel, 0)
    return model, args


class Step:
    """step(tokens, labels) -> summed loss / supervised tokens of this rank's batch; the weights have moved."""

    def __init__(self, model: Transformer, kv_heads: int):
        self.model, self.optimizer = model, optim.adamw(model, optim.OptimArgs(lr=RATE, weight_decay=0.0))
        self.rules = GradientRules(model, kv_heads, shard_dim, partial_grad, kv_copied)

    def __call__(self, tokens: Tensor, labels: Tensor) -> Tensor:
        loss, count, _ = self.model(tokens, labels=labels)
        (loss / count).backward()  # FSDP averages over dp; every rank has as many tokens
        update(self.rules, self.optimizer)
        return loss.detach() / count


def update(rules: GradientRules, optimizer: torch.optim.Optimizer) -> None:
    """From gradients to new weights. Collective over the world."""
    rules.sum_partial()
    norm = rules.global_norm()
    found_inf = (~norm.isfinite()).float()
    optim.step(optimizer, RATE, found_inf, optim.divisor(norm, CLIP, torch.ones_like(norm)))


def random_tokens(vocab: int, shape: tuple[int, int], device: torch.device | str, seed: int = 0) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed)).to(device)


__all__ = ["ParallelArgs", "Step", "TuningArgs", "groups", "load", "random_tokens", "update"]
