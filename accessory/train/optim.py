"""AdamW, learning-rate schedules as pure functions of the step, and fp16's loss scale.

    lr(step) = warm-up: lr * (step + 1) / (warmup + 1)  ->  cosine | linear | constant | polynomial | cosine_with_restarts | wsd

Steps are optimizer steps. After the warm-up, schedules follow Hugging Face's formulae where they share a name, with a floor
`--min_lr`; its warm-up would spend the first step at a rate of 0. wsd (warm-up, stable, decay) is MiniCPM's with a linear last
tenth. Test: tests/unit/test_optim.py
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from accessory.flags import OptimArgs
from accessory.parallel import spare
from accessory.parallel.fsdp import local
from accessory.parallel.products import as_it_lies
from accessory.train import lowbit

WSD_DECAY_SHARE = 0.1
POLYNOMIAL_POWER = 2.0
RESTARTS = 3  # cycles of cosine_with_restarts


def lr_at(step: int, max_steps: int, args: OptimArgs) -> float:
    """Learning rate of optimizer step `step` (0 is the first) of `max_steps`."""
    warmup = args.warmup(max_steps)
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    return args.min_lr + (args.lr - args.min_lr) * _shape(args.lr_scheduler, progress)


def _shape(name: str, progress: float) -> float:
    """1 at the start; what is left of the peak at `progress` in [0, 1]."""
    if name == "constant":
        return 1.0
    if name == "linear":
        return 1.0 - progress
    if name == "polynomial":
        return (1.0 - progress) ** POLYNOMIAL_POWER
    if name == "wsd":
        return min(1.0, (1.0 - progress) / WSD_DECAY_SHARE)
    if name == "cosine_with_restarts":
        progress = 1.0 if progress >= 1.0 else (progress * RESTARTS) % 1.0
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def adamw(model: nn.Module, args: OptimArgs) -> torch.optim.Optimizer:
    """Fused AdamW over what requires a gradient; matrices decay, norms and biases do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1]
    plain = [p for p in trained if p.ndim <= 1]
    param_groups = [{"params": ps, "weight_decay": wd} for ps, wd in ((decayed, args.weight_decay), (plain, 0.0)) if ps]
    betas = (args.adam_betas[0], args.adam_betas[1])
    if args.optim_states != "fp32":
        return lowbit.LowBitAdamW(param_groups, args.optim_states, args.lr, betas, args.adam_eps)
    return AdamW(param_groups, lr=args.lr, betas=betas, eps=args.adam_eps, fused=True)


@lowbit.light
class AdamW(torch.optim.AdamW):
    """torch's fused AdamW over this rank's parts of the parameters, with one count of steps for all of them.

    torch counts for each parameter and dispatches every DTensor, which beside small tensors takes as long as the update."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        trained = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        parts = [self._parts(number, ps) for number, ps in enumerate(trained)]
        # one, but where the moments came by load_state_dict
        counts = list({id(count): count for *_, of_group, _ in parts for count in of_group}.values())
        torch._foreach_add_(counts, 1)
        for group, ps, (weights, *held, turned) in zip(self.param_groups, trained, parts):
            gradients = [local(p.grad) for p in ps]
            for i in turned:
                gradients[i] = as_it_lies(gradients[i], local(ps[i]))
            lowbit.fused_step(self, group, weights, gradients, *held)
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            torch._foreach_sub_(counts, [found_inf] * len(counts))  # as a number it would be read, and waited for

    def _parts(self, number: int, trained: list[nn.Parameter]) -> list[list]:
        """Of the trained parameters of a group: this rank's parts of them and of both moments, their counts of steps, and the
        numbers of those that lie as their transposes. Kept from step to step until FSDP has put its parameters elsewhere, which it does with all of them."""
        if len(trained) < len(self.param_groups[number]["params"]) or not trained:
            return self._gather(trained)
        kept = self.__dict__.setdefault("_kept", {})
        if number not in kept or any(local(trained[i]).data_ptr() != kept[number][0][i].data_ptr() for i in (0, -1)):
            kept[number] = self._gather(trained)
        return kept[number]

    def _gather(self, trained: list[nn.Parameter]) -> list[list]:
        held, own = [self.moments(p) for p in trained], [local(p) for p in trained]
        weights = [as_it_lies(p) for p in own]
        moments = ([as_it_lies(local(s[m]), p) for p, s in zip(own, held)] for m in lowbit.MOMENTS)
        turned = [i for i, (lies, p) in enumerate(zip(weights, own)) if lies is not p]
        return [weights, *moments, [state["step"] for state in held], turned]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.__dict__.pop("_kept", None)
        for p, state in self.state.items():  # which may come from a run whose weights lay otherwise
            for m in (m for m in lowbit.MOMENTS if m in state and state[m].stride() != p.stride()):
                state[m] = torch.empty_like(p.detach()).copy_(state[m])

    @torch.no_grad()
    def moments(self, p: nn.Parameter) -> dict[str, Tensor]:
        """step, exp_avg and exp_avg_sq of p, cut as it is; of zeros, where there was no step yet."""
        if not (state := self.state[p]):
            if not hasattr(self, "count"):
                self.count = torch.zeros((), device=local(p).device)
            state["step"] = self.count
            state |= {m: torch.zeros_like(p.detach()) for m in lowbit.MOMENTS}
        return state


def step(optimizer: torch.optim.Optimizer, lr: float, found_inf: Tensor, divide_by: Tensor | None = None) -> None:
    """One update, or none where `found_inf` (a scalar on the device, equal on all ranks) is 1: decided without a sync.

    Gradients are divided by `divide_by` on the way, which saves the pass over them that scaling would be."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    where = optimizer.param_groups[0]["params"][0].device  # the CPU under --cpu_offload
    if divide_by is not None and where.type == divide_by.device.type == "cpu" and divide_by == 1:
        divide_by = None  # the kernel would write the gradients back; on a CPU, to look costs nothing
    # the fused kernel's own protocol, as GradScaler uses it
    optimizer.grad_scale = None if divide_by is None else divide_by.to(where)
    optimizer.found_inf = found_inf.to(where)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    spare.give(p for group in optimizer.param_groups for p in group["params"])


def divisor(norm: Tensor, clip_grad: float, loss_scale: Tensor) -> Tensor:
    """What gradients are divided by: fp16's loss scale, and what clips their norm (without that scale) to clip_grad."""
    return loss_scale * ((norm + 1e-6) / clip_grad).clamp(min=1.0) if clip_grad > 0 else loss_scale


class LossScale:
    """fp16's factor on the loss: doubled after 2000 good steps, halved after a bad one, all on the device. 1 otherwise."""

    def __init__(self, precision: str, device: torch.device):
        self.active = precision == "fp16"
        self.value = torch.tensor(2.0**16 if self.active else 1.0, device=device)
        self.good = torch.zeros((), device=device)

    def update(self, found_inf: Tensor) -> None:
        if self.active:
            self.good = torch.where(found_inf > 0, 0.0, self.good + 1)
            grown = torch.where(self.good >= 2000, self.value * 2, self.value)
            self.good = torch.where(self.good >= 2000, 0.0, self.good)
            self.value = torch.where(found_inf > 0, (self.value / 2).clamp(min=1.0), grown)

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value.item(), "good": self.good.item()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value.fill_(state["value"])
        self.good.fill_(state["good"])
