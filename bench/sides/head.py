"""Head and loss, forward and backward, in one of several ways.

    hidden (N, D), weight (V, D), labels (N,) with a share of -100  ->  summed loss / supervised, gradients of hidden and weight

settings: way (WAYS), vocab, dtype, rows (N), dim (D), ignored (share), trained (the weight; else frozen), units. The inputs are drawn from one seed, so all ways
have the same. `more.extra_mb`: the most memory beyond the inputs and the two gradients that every way must give.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import measure

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As Transformer._loss calls it."""
    from accessory.parallel import groups
    from accessory.parallel.loss import linear_cross_entropy

    groups.ensure()
    rows = (labels.cpu() != -100).nonzero().squeeze(1).to(labels.device)  # the model has them from the host
    return linear_cross_entropy(hidden[rows], weight, labels[rows], weight.shape[0])[0]


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As transformers' ForCausalLMLoss: logits upcast to fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def torch_chunks(**chosen):
    """torch 2.13's own; nothing chosen: as it decides itself."""

    def way(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions(**chosen)
        return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", ignore_index=-100, options=options)

    return way


def cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if hidden.is_cuda else "torch_compile"  # its own kernels, which want Triton
    return linear_cross_entropy(hidden, weight, labels, reduction="sum", impl=impl)


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels, ignore_index=-100, reduction="sum")


WAYS = {
    "ours": ours,
    "eager": eager,
    "compiled": torch.compile(eager, dynamic=False),
    "torch auto": torch_chunks(),
    "torch 256": torch_chunks(batch_chunk_size=256, chunking_method=None),
    "cut_cross_entropy": cut_cross_entropy,
    "liger": liger,
}


def inputs(settings: dict, device: str) -> tuple[Tensor, Tensor, Tensor]:
    draw, dtype = torch.Generator().manual_seed(0), DTYPES[settings["dtype"]]
    hidden = torch.randn(settings["rows"], settings["dim"], generator=draw)
    weight = torch.randn(settings["vocab"], settings["dim"], generator=draw).mul_(settings["dim"] ** -0.5)
    labels = torch.randint(settings["vocab"], (settings["rows"],), generator=draw)
    labels[torch.rand(settings["rows"], generator=draw) < settings["ignored"]] = -100
    hidden, weight = hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype)
    return hidden, weight.requires_grad_(settings.get("trained", True)), labels.to(device)


def main() -> None:
    work = measure.begin()
    settings, device = work["settings"], work["device"]
    hidden, weight, labels = inputs(settings, device)
    way, count, losses = WAYS[settings["way"]], int((labels != -100).sum()), []

    def step() -> None:
        hidden.grad = weight.grad = None
        loss = way(hidden, weight, labels) / count
        loss.backward()
        losses.append(loss.detach())

    timed = measure.timed(step, settings.get("warmup", 1), settings["units"], device)
    gradients = sum(t.nbytes for t in (hidden, weight) if t.requires_grad) / 1e6
    hidden.grad = weight.grad = None
    extra = max(0.0, timed["peak_mb"] - measure.now_mb(device) - gradients)
    measure.report(loss=losses[:1], tokens=settings["rows"], **timed, more={"extra_mb": extra})


if __name__ == "__main__":
    main()
