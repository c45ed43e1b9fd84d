"""AdamW whose moments are held in 16 or 8 bits: --optim_states.

    moments, packed  --unpack-->  fp32, CHUNK numbers of a tensor  --torch's fused AdamW-->  --pack-->  moments, packed

    bf16   both moments in bfloat16                                                              4 bytes a parameter
    int8   blocks of 256 numbers of a tensor in a row, each with one fp32 `unit`                 2.03
               exp_avg      sign(c) (c unit)^2    c in -127 .. 127
               exp_avg_sq   (c unit)^4            c in 1 .. 255: never 0 beside larger ones, where a step would explode

The unit is such that the largest of a block has the last code. The powers make the small numbers of a block fine-grained, as
bitsandbytes' dynamic map does (Dettmers et al., arXiv:2110.02861), without a table; tensors of fewer than SMALL numbers stay
fp32, as there. Rounding is dithered: up or down by a pattern that changes with every step, right on average. To the nearest,
a second moment at beta2 = 0.999 would stay where it is, because what a step changes is less than half a code; only bf16's
first moment is rounded to the nearest.

Packing what was unpacked gives the same codes: a step that is skipped leaves no trace, and a resume is exact. The pattern is
a function of the step and the place in a block, so ranks that hold copies agree. Test: tests/unit/test_lowbit.py
"""

import inspect
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from accessory.flags import OPTIM_STATES
from accessory.parallel.fsdp import local
from accessory.parallel.products import as_it_lies

MOMENTS = ("exp_avg", "exp_avg_sq")
BYTES = dict(zip(OPTIM_STATES, (8.0, 4.0, 2 + 8 / 256)))  # of both moments of one parameter
BLOCK, SMALL = 256, 4096
CHUNK = {"cpu": 2**18, "cuda": 2**22}  # numbers worked on at a time: what a cache holds, and enough to fill a GPU
EDGE = 1 / 512  # so near to a whole code, nothing is rounded to another: twice what cutting the unit moves the largest
TINY = 1e-30  # what is divided by instead of the unit of a block of zeros
GOLDEN = (
    0.6180339887498949  # even over the places of a block; over the steps, and both moments together, the R2 sequence:
)
PER_STEP = {"exp_avg": 0.7548776662466927, "exp_avg_sq": 0.5698402909980532}


def unpack(x: Tensor, codes: Tensor, unit: Tensor | None) -> None:
    """Into x, fp32. All (blocks, BLOCK); unit (blocks, 1), none for bf16."""
    x.copy_(codes)
    if unit is not None:
        x.mul_(unit)
        x.mul_(x.abs()) if codes.dtype == torch.int8 else x.square_().square_()


def pack(x: Tensor, codes: Tensor, unit: Tensor | None, noise: Tensor | None, spare: Tensor) -> None:
    """Into codes and unit, in place. `noise`: see `dither`, (1, BLOCK); none, for bf16: to the nearest. Spoils x and `spare`, which is like x."""
    if unit is None:
        if noise is not None:  # the bits that bf16 has no room for are cut off
            x.view(torch.int32).add_(noise).bitwise_and_(-(2**16))
        codes.copy_(x)
        return
    signed = codes.dtype == torch.int8
    root = torch.abs(x, out=spare).sqrt_() if signed else x.sqrt_().sqrt_()
    unit.copy_(_unit(root.amax(1, keepdim=True) / (127 if signed else 255), noise[:, :1]))
    torch.addcmul(noise, root, unit.clamp(min=TINY).reciprocal_(), out=root)
    # uint8 by way of int32, which torch does eight times as fast
    codes.copy_(root.copysign_(x) if signed else spare.view(torch.int32).copy_(root.clamp_(min=1)))


def _unit(wanted: Tensor, noise: Tensor) -> Tensor:
    """Cut to 19 bits of mantissa, dithered too. In place. What unpacks to 255 units, a bit or a few off by rounding, gives the
    same unit again: no noise is within 8 bits of the next."""
    wanted.view(torch.int32).add_((8 + 16 * noise).int()).bitwise_and_(-(2**5))
    return wanted


def dither(steps: Tensor, name: str, states: str) -> Tensor | None:
    """What is added to every number of a block before its fraction is cut off. (1, BLOCK), without reading `steps`.

    None for exp_avg in bf16: a step changes it by a tenth, not by less than half a code."""
    if states == "bf16" and name == "exp_avg":
        return None
    place = torch.arange(BLOCK, dtype=torch.float64, device=steps.device)
    even = (place * GOLDEN + steps.double() * PER_STEP[name]).frac()[None]
    return (even * 2**16).int() if states == "bf16" else (EDGE + (1 - 2 * EDGE) * even).float()


def light(optimizer: type) -> type:
    """Decorator of a class of optimizers: without torch's own around two methods, which imports the compiler, 2 s of every run."""
    for name in ("add_param_group", "zero_grad"):
        setattr(optimizer, name, inspect.unwrap(getattr(optimizer, name)))
    return optimizer


@light
class LowBitAdamW(torch.optim.Optimizer):
    """As torch.optim.AdamW(fused=True), with `states` "bf16" or "int8". Parameters are fp32, sharded or not.

    `step` follows found_inf and grad_scale as the fused one does, and reads nothing back from the device. state[p]: step (one
    tensor, of all), exp_avg, exp_avg_sq as they are held, (blocks, BLOCK), and for int8 exp_avg_unit, exp_avg_sq_unit."""

    def __init__(self, params: Any, states: str, lr: float, betas: tuple[float, float], eps: float):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.states = states
        self.steps = torch.zeros((), device=local(self.param_groups[0]["params"][0]).device)
        self.buffers = torch.empty(0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        found_inf = getattr(self, "found_inf", None)
        self.steps += 1
        noise = {m: dither(self.steps, m, self.states) for m in MOMENTS}
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None and local(p).numel()]
            if small := [p for p in trained if is_small(p)]:
                held = [self._state(p) for p in small]
                tensors = (small, [p.grad for p in small], *([s[m] for s in held] for m in MOMENTS))
                lists = ([as_it_lies(local(x), local(p)) for x, p in zip(of, small)] for of in tensors)
                fused_step(self, group, *lists, [self.steps] * len(small))
            for p in trained:
                if not is_small(p):
                    self._step_packed(group, p, noise)
        if found_inf is not None:
            self.steps -= found_inf

    def _step_packed(self, group: dict, p: nn.Parameter, noise: dict[str, Tensor | None]) -> None:
        weight, gradient = as_it_lies(local(p)).view(-1), as_it_lies(local(p.grad), local(p)).reshape(-1)
        state = self._state(p)
        for here, rows in chunks(weight):
            buffers, count = self._buffers(state, rows), weight[here].numel()
            held = {m: (state[m][rows], _rows(state.get(f"{m}_unit"), rows)) for m in MOMENTS}
            for x, m in zip(buffers, MOMENTS):
                unpack(x, *held[m])
            first, second = ([x.view(-1)[:count]] for x in buffers[:2])
            fused_step(self, group, [weight[here]], [gradient[here]], first, second, [self.steps])
            for x, m in zip(buffers, MOMENTS):
                pack(x, *held[m], noise[m], buffers[2])

    def _state(self, p: nn.Parameter) -> dict[str, Tensor]:
        """Of zeros, where there was no step yet."""
        state, mine = self.state[p], local(p.detach())
        if not state:
            state["step"] = self.steps
            blocks, options = -(-mine.numel() // BLOCK), {"device": mine.device}
            for m, code in zip(MOMENTS, (torch.int8, torch.uint8)):
                if is_small(p):
                    state[m] = torch.zeros_like(mine)
                    continue
                dtype = torch.bfloat16 if self.states == "bf16" else code
                state[m] = torch.zeros(blocks, BLOCK, dtype=dtype, **options)
                if self.states == "int8":
                    state[f"{m}_unit"] = torch.zeros(blocks, 1, **options)
        return state

    def _buffers(self, state: dict[str, Tensor], rows: slice) -> list[Tensor]:
        """Three of (rows, BLOCK), fp32, kept from call to call."""
        device = state["exp_avg"].device
        if not self.buffers.numel():
            self.buffers = torch.empty(3, CHUNK[device.type] // BLOCK, BLOCK, device=device)
        return list(self.buffers[:, : state["exp_avg"][rows].shape[0]])

    # --- for checkpoints ----------------------------------------------------------------------------------------------

    def moment_dtype(self, p: nn.Parameter) -> torch.dtype:
        """Of what `moments` gives."""
        return torch.bfloat16 if self.states == "bf16" and not is_small(p) else torch.float32

    @torch.no_grad()
    def moments(self, p: nn.Parameter) -> dict[str, Tensor]:
        """step, exp_avg and exp_avg_sq of this rank's part of p, in its shape: what is held, or for int8 fp32 copies. They
        may be changed, and given to `keep`."""
        state, mine = self._state(p), local(p.detach())
        found = {"step": self.steps}
        for m in MOMENTS:
            values = state[m]
            if f"{m}_unit" in state:
                values = torch.empty(values.shape, device=mine.device)
                unpack(values, state[m], state[f"{m}_unit"])
            found[m] = as_it_lies(values.view(-1)[: mine.numel()].view(as_it_lies(mine).shape), mine)
        return found

    @torch.no_grad()
    def keep(self, p: nn.Parameter, moments: dict[str, Tensor]) -> None:
        """Takes the changed moments of `moments`. Rounded to the nearest, where they are not as they were given."""
        state = self._state(p)
        for m in (m for m in MOMENTS if f"{m}_unit" in state):
            x = torch.zeros(state[m].shape, device=state[m].device)
            x.view(-1)[: moments[m].numel()] = as_it_lies(moments[m], local(p)).reshape(-1)
            pack(x, state[m], state[f"{m}_unit"], torch.full((1, BLOCK), 0.5, device=x.device), torch.empty_like(x))


def fused_step(
    optimizer: torch.optim.Optimizer, group: dict, weights: Any, gradients: Any, first: Any, second: Any, steps: Any
) -> None:
    """torch's kernel on lists of plain tensors, in place, by the optimizer's grad_scale and found_inf. `steps`: counted already."""
    # of others the CPU's kernel takes the numbers in a wrong order, and says nothing (torch 2.13)
    gradients = [g.contiguous() for g in gradients]
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        weights, gradients, first, second, [], steps, lr=group["lr"], beta1=beta1, beta2=beta2,
        weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
        grad_scale=getattr(optimizer, "grad_scale", None), found_inf=getattr(optimizer, "found_inf", None),
    )  # fmt: skip


def is_small(p: nn.Parameter) -> bool:
    return local(p).numel() < SMALL


def chunks(weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """(its numbers, their blocks), CHUNK at a time."""
    size = CHUNK[weight.device.type]
    for first in range(0, weight.numel(), size):
        last = min(first + size, weight.numel())
        yield slice(first, last), slice(first // BLOCK, -(-last // BLOCK))


def _rows(unit: Tensor | None, rows: slice) -> Tensor | None:
    return None if unit is None else unit[rows]
