"""One optimizer step over many tensors, in one of several ways.

settings: way (WAYS), small (how many tensors, of small_size), large (of large_size), clip (own_step.CLIP), units. Gradients are put back before each
step, the same tensors, which costs nothing to speak of. "ours" is what loop.fit does after
backward: the norm over all, the clipping, the fused update that `found_inf` can skip. "ours_sharded" does it over FSDP2's
DTensors, as a run does.
"""

import torch
from torch import Tensor, nn

from bench import measure

RATE = 1e-4


def parameters(settings: dict, device: str) -> list[nn.Parameter]:
    shapes = [(settings["small_size"],)] * settings["small"] + [(settings["large_size"],)] * settings["large"]
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=draw).to(device)) for s in shapes]


def gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(p.shape, generator=draw).to(p.device) for p in parameters]


def adamw(settings: dict, ps: list[nn.Parameter], gs: list[Tensor], **how):
    optimizer = torch.optim.AdamW(ps, lr=RATE, weight_decay=0.0, **how)

    def step() -> None:
        for p, g in zip(ps, gs):
            p.grad = g
        if settings["clip"]:
            torch.nn.utils.clip_grad_norm_(ps, settings["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, ps


def ours(settings: dict, ps: list[nn.Parameter], gs: list[Tensor], sharded: bool = False):
    from torch.distributed.fsdp import fully_shard

    from accessory.parallel import groups
    from accessory.parallel.grads import GradientRules
    from accessory.train import optim

    groups.init(1, on=ps[0].device)
    model = nn.Module()
    for i, p in enumerate(ps):
        model.register_parameter(f"p{i}", p)
    if sharded:
        fully_shard(model, mesh=groups.dp_mesh("fsdp"))  # as on several ranks
        ps = list(model.parameters())
        from torch.distributed.tensor import DTensor

        gs = [DTensor.from_local(g, p.device_mesh, p.placements) for p, g in zip(ps, gs)]
    optimizer = optim.adamw(model, optim.OptimArgs(lr=RATE, weight_decay=0.0))
    rules = GradientRules(
        model, 1, lambda n: 0 if model.get_parameter(n).numel() > 1e5 else None, lambda n: False, lambda n: False
    )

    def step() -> None:
        for p, g in zip(ps, gs):
            p.grad = g
        rules.sum_partial()
        norm = rules.global_norm()
        optim.step(optimizer, RATE, (~norm.isfinite()).float(), optim.divisor(norm, settings["clip"], torch.ones(())))

    return step, ps


WAYS = {
    "ours": ours,
    "ours_sharded": lambda s, ps, gs: ours(s, ps, gs, sharded=True),
    "fused": lambda s, ps, gs: adamw(s | {"clip": 0.0}, ps, gs, fused=True),
    "fused_clip": lambda s, ps, gs: adamw(s, ps, gs, fused=True),
    "foreach_clip": lambda s, ps, gs: adamw(s, ps, gs, foreach=True),
    "default_clip": lambda s, ps, gs: adamw(s, ps, gs),
}


def main() -> None:
    work = measure.begin()
    settings, device = work["settings"], work["device"]
    ps = parameters(settings, device)
    step, ps = WAYS[settings["way"]](settings, ps, gradients(ps))
    timed = measure.timed(step, 3, settings["units"], device)
    # the clipping leaves the direction, and Adam the size: every way ends near the same weights
    total = sum(p.detach().square().mean().item() for p in ps) / len(ps)
    measure.report(loss=[total], tokens=sum(p.numel() for p in ps), **timed)


if __name__ == "__main__":
    main()
