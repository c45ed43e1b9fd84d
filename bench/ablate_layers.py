"""What each way of making a layer or the loss faster is worth: on and off by turns, in one process, on one thread.

    python -m bench.ablate_layers [--layers 4] [--tokens 1024] [--rounds 5] [--precision fp32|bf16] [--only lora]

Layers of SmolLM2-135M's widths with random weights, a vocabulary of 2048 (its own 49,152 for the rows about the loss and the tables),
LoRA of rank 16 on all seven linears (in the last four rows every weight is trained, in fp32), one row of packed documents; a step is
forward and backward. Time is this thread's own CPU seconds, the least of the rounds and the median of the rounds' ratios: so
neighbours on the machine matter little. Memory is the most that was allocated in a step beside the weights.

    row            on                                               off
    lora           linear and adapter one function                  step by step, as autograd composes it
    lora dropout   the same with dropout 0.05
    loss chunk     256 tokens' logits at a time (fp32: 512)         4 MiB of them
    exp            the head's softmax by MKL's exp (AMX only)       torch's softmax
    supervised     head over the 35 % of tokens that are learnt     over all of them
    last layer     after attention over those 35 % too              over all tokens
    packed         documents side by side in one row                a padded row each
    shared         29 tokens that all begin with once (Alpaca's)    in each document
    norm           RMSNorm's own backward                           torch's
    swiglu         silu and product one function                    step by step
    rotary         one product of complex numbers                   real numbers, as Meta's formula reads
    attention      short documents as products (bf16 on CPU only)   torch's flash kernel
    tiles          sequences padded to 16 for the flash kernel      as long as they are (bf16 with AMX only)
    lengths        rows padded to a multiple of 32 (bf16 only)      as long as they are, each time another length
    compile        each layer through torch.compile, warmed up      eager
    rotary too     a pair taken as one int32, in vectors            real numbers (compiled layers, bf16 only)
    kept           attention's probabilities kept for backward      made again (bf16 without AMX only)
    turned         weights' gradients of rows turned before         as they lie (compiled layers, bf16 with AMX only)
    tables         gradients of embedding and head in memory that   in fresh memory
                   the step before left
    head           its weight lies as its transpose (bf16 with AMX) row by row
"""

import os
import random
import statistics
import time
from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from accessory.config import run_tool
from accessory.data.loader import collate
from accessory.data.sft import Example
from accessory.model import ModelArgs, Transformer, blocks, llama, rope, targets
from accessory.model.attention import Segments
from accessory.model.llama import set_parameter
from accessory.model.lora import LoRA, TuningArgs, add_tuning, initial_value, linears, mark_trainable
from accessory.model.norm import RMSNorm, rms_norm
from accessory.parallel import groups, loss, products, spare
from accessory.parallel.fsdp import DTYPES
from accessory.train.loop import to_device

WIDTHS = {"dim": 576, "n_heads": 9, "n_kv_heads": 3, "hidden_dim": 1536, "rope_theta": 100000.0}
DOCUMENTS = (0.18, 0.08, 0.25, 0.12, 0.05, 0.22, 0.10)  # lengths, as shares of the tokens
BEGINNING = 29  # tokens of Alpaca's prompt before an instruction, with LLaMA's tokenizer
ROWS = (
    "lora",
    "lora dropout",
    "loss chunk",
    "exp",
    "supervised",
    "last layer",
    "packed",
    "shared",
    "norm",
    "swiglu",
    "rotary",
    "attention",
    "tiles",
    "lengths",
    "compile",
    "rotary too",
    "kept",
    "turned",
    "tables",
    "head",
)
WHOLE = ("kept", "turned", "tables", "head")  # rows in which every weight is trained
TABLES = ("loss chunk", "exp", "supervised", "tables", "head")  # rows with the true vocabulary
Step = Callable[[], Tensor]  # forward only: the loss


def main(
    *, layers: int = 4, tokens: int = 1024, rounds: int = 5, precision: str = "fp32", only: str | None = None
) -> None:
    """Prints a line a technique: milliseconds and megabytes on and off, and what on is worth. --only: one row's name."""
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"--precision {precision}: fp32 or bf16")
    if only not in (None, *ROWS):
        raise ValueError(f"--only {only}: choose one of {', '.join(ROWS)}")
    torch.set_num_threads(1)
    groups.ensure()
    print(f"{layers} layers, {tokens} tokens, {precision}, least of {rounds} rounds; peak memory of one step")
    print(f"{'':14}{'on ms':>9}{'off ms':>9}{'gain':>7}{'median':>8}{'on MB':>9}{'off MB':>9}")
    for name in ROWS if only is None else (only,):
        vocab_size = 49152 if name in TABLES else 2048
        model = (whole_model if name in WHOLE else lora_model)(layers, DTYPES[precision], vocab_size)
        on, off = pair(name, model, tokens)
        seconds, ratios = interleaved(model, on, off, rounds)
        memory = [peak(model, step) / 1e6 for step in (on, off)]
        gain, median = seconds[1] / seconds[0], statistics.median(ratios)
        figures = (
            f"{seconds[0] * 1e3:9.0f}{seconds[1] * 1e3:9.0f}{gain:7.3f}{median:8.3f}{memory[0]:9.1f}{memory[1]:9.1f}"
        )
        print(f"{name:14}{figures}", flush=True)


def lora_model(layers: int, dtype: torch.dtype, vocab_size: int) -> Transformer:
    args = ModelArgs.from_dict(WIDTHS | {"n_layers": layers, "vocab_size": vocab_size, "tie_word_embeddings": True})
    model, tuning = Transformer(args), TuningArgs(lora_rank=16, lora_alpha=32.0)
    add_tuning(model, tuning)
    mark_trainable(model, tuning)
    for name in [n for n, _ in model.named_parameters()]:
        set_parameter(model, name, initial_value(model, name, seed=0).to(dtype))
    return model.train()


def whole_model(layers: int, dtype: torch.dtype, vocab_size: int) -> Transformer:
    """Every weight trained: fp32, multiplied in `dtype`."""
    args = ModelArgs.from_dict(WIDTHS | {"n_layers": layers, "vocab_size": vocab_size, "tie_word_embeddings": False})
    model = Transformer(args)
    for name in [n for n, _ in model.named_parameters()]:
        set_parameter(model, name, initial_value(model, name, seed=0))
    model.tok_embeddings.compute_dtype = dtype
    return model.train()


def pair(name: str, model: Transformer, tokens: int) -> tuple[Step, Step]:
    """The step with the technique and the one without."""
    lengths = [int(share * tokens) for share in DOCUMENTS]
    row = torch.randint(model.args.vocab_size, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([0, *lengths]).cumsum(0)

    def step(labels: Tensor = row) -> Tensor:
        return model(row, labels=labels, cu_seqlens=bounds)[0]

    if name in ("lora", "lora dropout"):
        dropout = 0.05 if name == "lora dropout" else 0.0
        return (
            lambda: with_adapters(model, LoRA.adapted, dropout, step),
            lambda: with_adapters(model, step_by_step, dropout, step),
        )
    if name == "loss chunk":
        return step, lambda: with_other(loss, "CHUNK_BYTES", 4 * 2**20, step)
    if name == "exp":
        return step, lambda: with_other(loss, "BY_EXP", False, step)
    if name in ("supervised", "last layer"):
        learnt = row.masked_fill(torch.arange(row.shape[1]) % 20 >= 7, -100)
        whole = lambda: with_other(targets, "FEW", 0.0, lambda: step(learnt))  # noqa: E731
        return (lambda: step(learnt), whole) if name == "last layer" else (whole, step)
    if name == "packed":
        padded, labels = padded_rows(row, lengths)
        return step, lambda: model(padded, labels=labels)[0]
    if name == "shared":
        return lambda: model(**shared(row, lengths, True))[0], lambda: model(**shared(row, lengths, False))[0]
    if name == "norm":
        return step, lambda: with_other(RMSNorm, "forward", lambda self, x: rms_norm(x, self.weight, self.eps), step)
    if name == "swiglu":
        return step, lambda: with_other(llama, "swiglu", lambda gate, up: F.silu(gate) * up, step)
    if name == "rotary":
        return step, lambda: with_other(rope, "rotate", plain_rotate, step)
    if name == "attention":
        return step, lambda: with_other(blocks, "faster", lambda q, longest: False, step)
    if name == "tiles":
        return step, lambda: with_other(blocks, "FLASH_ROWS", 1, step)
    if name == "lengths":
        return of_changing_length(model, tokens, True), of_changing_length(model, tokens, False)
    if name == "compile":
        return lambda: with_compiled(model, step), step
    if name in ("rotary too", "turned"):
        other = (rope, "rotate", plain_rotate) if name == "rotary too" else (products, "AMX", False)
        return (
            lambda: with_compiled(model, step),
            lambda: with_other(*other, lambda: with_compiled(model, step)),
        )
    if name == "kept":
        return step, lambda: with_other(blocks, "KEPT", 0, step)
    if name == "tables":
        return taking(spare.take, step), taking(torch.empty_like, step)
    if name == "head":
        weight = model.output.weight.detach()
        return with_head(model, weight.t().contiguous().t(), step), with_head(model, weight, step)
    raise AssertionError(name)


def step_by_step(self: LoRA, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return self.product(x, bias) + self.low_rank(x)


def with_adapters(model: Transformer, adapted: Callable, dropout: float, step: Step) -> Tensor:
    usual, LoRA.adapted = LoRA.adapted, adapted
    for _, linear in linears(model):
        linear.lora_dropout = dropout
    try:
        return step()
    finally:
        LoRA.adapted = usual
        for _, linear in linears(model):
            linear.lora_dropout = 0.0


def with_other(owner: Any, name: str, value: Any, step: Step) -> Tensor:
    usual = getattr(owner, name)
    setattr(owner, name, value)
    try:
        return step()
    finally:
        setattr(owner, name, usual)


def taking(take: Callable, step: Step) -> Step:
    """Gradients' memory by `take` until another step says otherwise: backward comes after the step."""

    def with_it() -> Tensor:
        spare.take = take
        return step()

    return with_it


def with_head(model: Transformer, weight: Tensor, step: Step) -> Step:
    """A head of this weight until another step has another."""
    head = torch.nn.Parameter(weight)

    def with_it() -> Tensor:
        model.output.weight = head
        return step()

    return with_it


def plain_rotate(x: Tensor, table: Tensor) -> Tensor:
    (a, b), (cos, sin) = (t.float().unflatten(-1, (-1, 2)).unbind(-1) for t in (x, table[:, :, :1]))
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)


def with_compiled(model: Transformer, step: Step) -> Tensor:
    for layer in model.layers:
        layer.compute = torch.compile(type(layer).compute).__get__(layer)
    try:
        return step()
    finally:
        for layer in model.layers:
            del layer.compute


def padded_rows(row: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(tokens, labels) of (documents, longest)."""
    padded = torch.nn.utils.rnn.pad_sequence(list(row[0].split(lengths)), batch_first=True)
    labels = [t.clone() for t in row[0].split(lengths)]
    return padded, torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)


def shared(row: Tensor, lengths: list[int], share: bool) -> dict[str, Any]:
    """The same documents, each with the first one's BEGINNING in the place of its own."""
    examples = [
        Example(torch.cat((row[0, :BEGINNING], t[BEGINNING:])).numpy(), BEGINNING + 1) for t in row[0].split(lengths)
    ]
    batch = collate(examples, share)
    packed = Segments(batch.cu_seqlens, row.device, batch.after)
    return {"tokens": batch.tokens, "labels": batch.labels, "cu_seqlens": packed}


def of_changing_length(model: Transformer, tokens: int, pad: bool) -> Step:
    """Documents of other lengths at each call, which together are up to 31 tokens short of `tokens`, a multiple of 32."""
    draw, cpu = random.Random(0), torch.device("cpu")
    precision = "bf16" if pad and model.tok_embeddings.weight.dtype == torch.bfloat16 else "fp32"

    def step() -> Tensor:
        lengths = [int(share * tokens) + draw.randint(-4, 0) for share in DOCUMENTS[1:]]
        lengths.append(tokens - draw.randint(0, 31) - sum(lengths))
        ids = [np.array([draw.randrange(model.args.vocab_size) for _ in range(n)], np.int32) for n in lengths]
        batch = to_device(collate([Example(x, 1) for x in ids]), cpu, precision)
        return model(batch.tokens, labels=batch.labels, cu_seqlens=batch.cu_seqlens)[0]

    return step


def interleaved(model: Transformer, on: Step, off: Step, rounds: int) -> tuple[list[float], list[float]]:
    """(least CPU seconds on and off, off / on of each round); a round before them warms up."""
    taken: list[list[float]] = [[], []]
    for _ in range(rounds + 1):
        for step, seconds in zip((on, off), taken):
            spare.give(model.parameters())
            start = time.process_time()
            step().backward()
            seconds.append(time.process_time() - start)
    return [min(s[1:]) for s in taken], [b / a for a, b in zip(taken[0][1:], taken[1][1:])]


def peak(model: Transformer, step: Step) -> int:
    """The most bytes that one step holds at once, beside what was there before it."""
    from torch.profiler import ProfilerActivity, profile

    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step().backward()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter
    run_tool(main)
