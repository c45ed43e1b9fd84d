"""A layer's seven linears, forward and backward, with sums in the place of what is between them.

settings: way (ours: column- and row-parallel on one rank; plain: nn.Linear), dim, ffn, tokens, dtype, units.
"""

import torch
from torch import Tensor, nn

from bench import measure

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROW = ("wo", "w2")  # the others are column-parallel


def layers(settings: dict, device: str) -> dict[str, nn.Module]:
    """By Meta's names, the weights drawn, the same in both ways."""
    from accessory.parallel import groups
    from accessory.parallel.layers import ColumnParallelLinear, RowParallelLinear

    groups.ensure()
    dim, ffn, draw = settings["dim"], settings["ffn"], torch.Generator().manual_seed(0)
    shapes = dict.fromkeys(("wq", "wk", "wv", "wo"), (dim, dim)) | {
        "w1": (dim, ffn),
        "w3": (dim, ffn),
        "w2": (ffn, dim),
    }
    made = {}
    for name, (inner, outer) in shapes.items():
        weight = (torch.randn(outer, inner, generator=draw) * inner**-0.5).to(device, DTYPES[settings["dtype"]])
        if settings["way"] == "plain":
            made[name] = nn.Linear(inner, outer, bias=False, device="meta")
        else:
            made[name] = (RowParallelLinear if name in ROW else ColumnParallelLinear)(inner, outer)
        made[name].weight = nn.Parameter(weight)
    return made


def forward(w: dict[str, nn.Module], x: Tensor) -> Tensor:
    y = x + w["wo"](w["wq"](x) + w["wk"](x) + w["wv"](x))
    return y + w["w2"](w["w1"](y) + w["w3"](y))


def main() -> None:
    work = measure.begin()
    settings, device, losses = work["settings"], work["device"], []
    w = layers(settings, device)
    draw = torch.Generator().manual_seed(1)
    x, weight = (
        torch.randn(settings["tokens"], settings["dim"], generator=draw).to(device, DTYPES[settings["dtype"]])
        for _ in "xw"
    )
    x.requires_grad_()

    def step() -> None:
        x.grad = None
        for module in w.values():
            module.weight.grad = None
        loss = (forward(w, x) * weight).float().mean()
        loss.backward()
        if not losses:
            losses.extend([loss.detach(), x.grad.float().norm(), *(m.weight.grad.float().norm() for m in w.values())])

    timed = measure.timed(step, 3, settings["units"], device)
    measure.report(loss=losses, tokens=settings["tokens"], **timed)


if __name__ == "__main__":
    main()
