"""One training step of ours at one size, with what arithmetic says about it: a point of a curve.

settings: sizes (params.json), length (tokens of the one sequence), lora_rank (0: all weights), units.
more: extra_mb       memory of a step beyond weights and moments
      formula_mb     gathered weights + gradients + activations + loss, from the sizes alone
      mflops         of a token, in 10^6: 6 N (4 N where the weights are frozen) + the same share of 2 T D L in attention
"""

import torch

from accessory.flags import ParallelArgs
from accessory.model import Transformer
from accessory.model.lora import TuningArgs, mark_trainable
from accessory.model.pretrained import build
from accessory.parallel import groups
from accessory.parallel.loss import rows_of_chunk
from accessory.train.start import materialise
from bench import measure
from bench.sides.own_step import Step, random_tokens
from tests.gpu.bodies import random_checkpoint

BYTES = 4  # fp32


def formula_mb(model: Transformer, tokens: int) -> float:
    """Of a step in fp32 on one rank, in 10^6 bytes: gradients, 8 D + 3 F numbers kept a token and layer, a chunk of the loss and
    the head's gradient that it makes."""
    args = model.args
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = len(model.layers) * tokens * (8 * args.dim + 3 * args.ffn_dim)
    chunk = min(rows_of_chunk(model.head, BYTES, tokens), tokens) * args.vocab_size
    head = args.vocab_size * args.dim if model.head.requires_grad else 0
    return BYTES * (trained + kept + chunk + head) / 1e6


def flops(model: Transformer, length: int, full: bool) -> float:
    """Of a token, forward and backward, causal attention counted once."""
    args = model.args
    products = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "tok_embeddings" not in n)
    return (6 if full else 4) * products + 3 * 2 * length * args.dim * args.n_layers


def main() -> None:
    work = measure.begin()
    settings, device = work["settings"], work["device"]
    groups.init(1, on=device)
    checkpoint, args = random_checkpoint(settings["sizes"], torch.float32, device)
    rank = settings.get("lora_rank", 0)
    tuning = TuningArgs(lora_rank=rank) if rank else TuningArgs()
    model = build(checkpoint, args, tuning)
    mark_trainable(model, tuning)
    expected = formula_mb(model, settings["length"]), flops(model, settings["length"], not rank)
    materialise(model, checkpoint, ParallelArgs(precision="fp32"), 0)
    step, losses = Step(model, args.kv_heads), []
    tokens = random_tokens(args.vocab_size, (1, settings["length"]), groups.device())
    losses.append(step(tokens, tokens))
    before = measure.now_mb(device)
    timed = measure.timed(lambda: losses.append(step(tokens, tokens)), 0, settings["units"], device)
    more = {"extra_mb": timed["peak_mb"] - before, "formula_mb": expected[0], "mflops": expected[1] / 1e6}
    measure.report(loss=losses[:1], tokens=settings["length"], **timed, more=more)


if __name__ == "__main__":
    main()
