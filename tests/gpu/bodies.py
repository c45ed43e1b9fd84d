"""What must hold on every device, as functions of one. tests/gpu runs them on a GPU at size, tests/unit/test_device_paths.py tiny on the CPU.

random_checkpoint   weights drawn as they are read, on the device: no file, no download
train               main_finetune's steps over it, with the plan of --dry_run beside the measured peak
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from accessory import log
from accessory.checkpoint import resume
from accessory.checkpoint.pieces import MOMENTS
from accessory.checkpoint.save import Saver
from accessory.data.loader import first_batches
from accessory.data.sft import Example
from accessory.flags import ParallelArgs
from accessory.generation.engine import generate
from accessory.model import ModelArgs, Transformer, quant, shard_dim
from accessory.model.attention import Segments, attend
from accessory.model.llama import global_shape, kv_copied
from accessory.model.lora import TuningArgs, mark_trainable, named_seed, partial_grad
from accessory.model.pretrained import build, fill, quantise
from accessory.parallel import groups
from accessory.parallel.fsdp import local
from accessory.parallel.grads import GradientRules
from accessory.train import loop, objectives, optim, plan
from accessory.train.start import materialise
from accessory.train.state import TrainState

TINY = {"dim": 48, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "hidden_dim": 80, "vocab_size": 101}
LORA = {"lora_rank": 8, "lora_alpha": 16.0}


FIGURES: list[str] = []  # what tests/gpu/conftest.py prints at the end


def note(figure: str) -> None:
    FIGURES.append(figure)


# --- random weights and data ------------------------------------------------------------------------------------------


class RandomSource:
    """A checkpoint that is drawn when it is read: a function of (seed, name), whole on `device`, then cut."""

    def __init__(self, args: ModelArgs, dtype: torch.dtype, device: torch.device):
        spare = {"output.weight"} if args.tie_word_embeddings else set()
        self.shapes = {n: global_shape(args, n) for n, _ in Transformer(args).named_parameters() if n not in spare}
        self.kind, self.device = dtype, device

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self.kind

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(named_seed(0, name))
        whole = torch.randn(self.shapes[name], generator=generator, device=self.device, dtype=torch.float32)
        whole = 1 + 0.1 * whole if "norm" in name else whole.mul_(self.shapes[name][-1] ** -0.5)
        return (whole if dim is None else whole.narrow(dim, start, stop - start)).to(self.kind)


def random_checkpoint(
    sizes: dict[str, Any], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Any, ModelArgs]:
    """(what open_pretrained gives, sizes)."""
    args = ModelArgs.from_dict({"tie_word_embeddings": False} | sizes)
    source = RandomSource(args, dtype, torch.device(device))
    return SimpleNamespace(source=source, path="random", kind="random", params=args.to_dict(), adapter=None), args


class Examples(list):
    """Examples with the counts that the plan reads."""

    @property
    def report(self) -> Any:
        tokens = sum(len(e.ids) for e in self)
        return SimpleNamespace(tokens=tokens, supervised_tokens=sum(len(e.ids) - max(1, e.prompt_len) for e in self))


def counting(lengths: Sequence[int], vocab: int, prompt: float = 0.5) -> Examples:
    """A random prompt of that share of each length; the answer counts on from its last token: something to learn."""
    draw, made = np.random.RandomState(0), Examples()
    for length in lengths:
        head = draw.randint(3, vocab, size=max(1, int(length * prompt)))
        answer = (head[-1] + np.arange(1, length - len(head) + 1)) % vocab
        made.append(Example(np.concatenate([head, answer]).astype(np.int32), len(head)))
    return made


# --- a training run ---------------------------------------------------------------------------------------------------


@dataclass
class Run:
    model: Transformer
    optimizer: torch.optim.Optimizer
    records: list[dict[str, float]]  # metrics.jsonl
    planned: dict[str, float]  # bytes in 10^9, as --dry_run says
    state: TrainState

    @property
    def losses(self) -> np.ndarray:
        return np.array([r["loss"] for r in self.records if "loss" in r])

    @property
    def speeds(self) -> np.ndarray:
        return np.array([r["tokens_per_second"] for r in self.records if "loss" in r])


def train(
    directory: Path,
    device: torch.device | str,
    sizes: dict[str, Any],
    data: Examples,
    *,
    steps: int,
    tuning: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    lr: float = 3e-3,
    batch_size: int = 4,
    validate: bool = False,
    sample: bool = False,
    draw_on: str | None = None,
    objective: Callable = objectives.next_token,
    **parallel_flags: Any,
) -> Run:
    """`steps` optimizer steps of main_finetune's own path on one rank. `dtype`: the file's, which frozen weights keep.

    Weights are drawn on `draw_on`, none: where the run is; devices draw differently."""
    groups.init(1, on=device)
    where = groups.device()
    parallel, tuning_args = ParallelArgs(**parallel_flags), TuningArgs(**(tuning or {}))
    torch.set_float32_matmul_precision("high" if parallel.precision == "tf32" else "highest")
    optim_args = optim.OptimArgs(lr=lr, lr_scheduler="constant", warmup_ratio=0.0)
    loop_args = loop.LoopArgs(batch_size=batch_size, max_steps=steps, eval_steps=10**6, save_steps=10**6)
    checkpoint, args = random_checkpoint(sizes, dtype, draw_on or where)
    model = build(checkpoint, args, tuning_args)
    mark_trainable(model, tuning_args)
    quantise(model, parallel)
    figures = plan.plan(model, checkpoint, parallel, loop_args, optim_args, data, steps)
    materialise(model, checkpoint, parallel, 0)
    optimizer = optim.adamw(model, optim_args)
    rules = GradientRules(
        model, args.kv_heads, shard_dim, partial_grad, kv_copied, cut_over_dp=parallel.data_parallel != "ddp"
    )
    run_log = log.RunLog(directory, 0, (), None, steps)
    state = loop.fit(
        model, optimizer, rules, objective, data, TrainState(), loop_args, optim_args,
        precision=parallel.precision, data_parallel=parallel.data_parallel, num_workers=0, run_log=run_log,
        evaluate=(lambda: loop.evaluate(model, objectives.next_token, data[:3], 2, False)) if validate else None,
        sample=(lambda step: generate(model, [[3, 4, 5], [6]], 3)) if sample else None, save_best=False, save=lambda s: None,
    )  # fmt: skip
    run_log.close()
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return Run(model, optimizer, records, figures["gigabytes"], state)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """The largest relative difference of two curves."""
    return float(np.abs(a / b - 1).max())


# --- bodies -----------------------------------------------------------------------------------------------------------


def steps_wait_for_nothing(directory: Path, device: str, sizes: dict, data: Examples, **options: Any) -> None:
    """From the third step to the last, whatever lets the host wait for the GPU raises: torch's own watch over it."""
    steps, seen = 8, 0

    def watched(model: torch.nn.Module, batch: Any) -> Any:
        nonlocal seen
        seen += 1
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error" if 3 <= seen < steps else "default")
        return objectives.next_token(model, batch)

    try:
        train(directory, device, sizes, data, steps=steps, objective=watched, **options)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert seen == steps


def logits_and_loss_are_those_of_transformers(
    device: str, dtype: torch.dtype, bound: float, tokens: int = 48, **sizes: Any
) -> None:
    """`bound`: how far the loss may be from theirs in fp32, relatively. Logits are to be no further from theirs in fp32 than
    their own in `dtype` (they rotate in `dtype`, we in fp32); in fp32 they are theirs within `bound` of their scale."""
    from tests.unit.test_llama import carry, peer

    theirs = peer(**sizes)
    ours = carry(theirs, **sizes).to(device, dtype)
    ids = torch.randint(3, theirs.config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        exact = theirs.to(device)(ids).logits
        half, got = theirs.to(dtype)(ids).logits.float(), ours(ids).float()
        loss, count, _ = ours(ids, labels=ids)
    truth = F.cross_entropy(exact[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    error, peers = (
        (x - exact).square().mean().sqrt().item() / exact.square().mean().sqrt().item() for x in (got, half)
    )
    note(
        f"{device} {dtype}: logits {error:.1e} (rms) from transformers' in fp32, its own in that dtype {peers:.1e}; loss {loss.item() / count.item():.5f} against {truth:.5f}"
    )
    assert abs(loss.item() / count.item() / truth - 1) <= bound
    if dtype == torch.float32:
        assert (got - exact).abs().max() <= bound * exact.abs().max()
    else:
        assert error <= 1.1 * peers


def packed_attention_is_that_of_each_sequence(
    device: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    lengths: list[int],
    bound: float,
    after: Sequence[int] | None = None,
) -> Segments:
    """attend() over packed rows and its gradients, against fp32 softmax(q k^T) v written out, one sequence at a time, each with
    those that it comes `after`."""
    draw = torch.Generator().manual_seed(0)
    total, bounds = sum(lengths), np.cumsum([0, *lengths])
    q, k, v, weight = (
        torch.randn(1, total, h, head_dim, generator=draw).to(device, dtype) for h in (heads, kv_heads, kv_heads, heads)
    )
    before = [-1] * len(lengths) if after is None else list(after)
    packed = Segments(torch.from_numpy(bounds.astype(np.int32)), q.device, torch.tensor(before))
    ours, plain = [t.clone().requires_grad_() for t in (q, k, v)], [t.float().requires_grad_() for t in (q, k, v)]
    y = attend(*ours, packed, None)
    (y.float() * weight.float()).sum().backward()
    truth = torch.zeros_like(plain[0])
    for i in set(range(len(before))) - set(before):
        rows = torch.arange(bounds[i], bounds[i + 1])
        while (i := before[i]) >= 0:
            rows = torch.cat((torch.arange(bounds[i], bounds[i + 1]), rows))
        rows = rows.to(device)
        truth = truth.index_copy(1, rows, written_out(*(t[0, rows] for t in plain)).unsqueeze(0))
    (truth * weight.float()).sum().backward()
    assert y.shape == truth.shape and y.dtype == dtype
    for name, got, want in [("y", y, truth), *((n, a.grad, b.grad) for n, a, b in zip("qkv", ours, plain))]:
        difference = ((got.float() - want).abs().max() / want.abs().max()).item()
        assert difference <= bound, (name, difference)
    return packed


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one sequence: q (T, H, Dh), k and v (T, K, Dh)."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
    future = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("hts,shd->thd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


def variants_learn_alike(
    directory: Path,
    device: str,
    sizes: dict,
    data: Examples,
    variants: dict[str, dict],
    bounds: dict[str, float],
    **common: Any,
) -> dict[str, Run]:
    """Loss curves of runs that differ in some flags; `bounds`: how far each may be from the first, relatively."""
    runs = {
        name: train(directory / str(i), device, sizes, data, **common | flags)
        for i, (name, flags) in enumerate(variants.items())
    }
    first = next(iter(runs.values())).losses
    assert first[-3:].mean() < 0.9 * first[:3].mean(), first  # something is learnt
    for name, bound in bounds.items():
        difference = apart(runs[name].losses, first)
        note(f"{device} {name}: loss curve {difference:.1e} from {next(iter(runs))}")
        assert difference <= bound, (name, runs[name].losses, first)
    return runs


def nf4_learns_alike(directory: Path, device: str, sizes: dict, data: Examples, bound: float, **common: Any) -> None:
    """Over a base held in NF4: checkpointed, gathered in other ways, compiled, the loss curve is the eager one's."""
    variants = {
        "nf4": {},
        "nf4, sdp, checkpointing": {"data_parallel": "sdp", "checkpointing": True},
        "nf4, ddp": {"data_parallel": "ddp", "validate": True, "sample": True},
        "nf4, compile": {"compile": True, "checkpointing": True},
    }
    bounds = dict.fromkeys(list(variants)[1:], bound)
    variants_learn_alike(directory, device, sizes, data, variants, bounds, tuning=LORA, quant="nf4", **common)


def nf4_bytes_are_the_cpus(device: str, shape: tuple[int, int] = (300, 448)) -> None:
    """Packed on the device, a weight has the very bytes it has packed on the CPU, and comes back as the same numbers."""
    groups.ensure()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    layout = quant.Layout(*shape, 0, 0, *shape)
    here, there = (quant.pack(weight.to(d), layout, torch.bfloat16) for d in ("cpu", device))
    assert torch.equal(here.view(torch.uint8), there.cpu().view(torch.uint8))
    for dtype in (torch.float32, torch.bfloat16):
        exact = quant.dequantise(here, layout, quant.tables("cpu"), dtype)
        assert torch.equal(quant.dequantise(there, layout, quant.tables(device), dtype).cpu(), exact)


def calibrated_nf4_is_as_good_as_the_cpus(device: str, sizes: dict[str, Any], data: Examples) -> None:
    """Not the same bits: sums in another order turn a few choices. Layers' outputs are as near to the exact ones, and nearer
    than with nearest levels."""

    def hidden(where: str, kind: str | None, tokens: int) -> torch.Tensor:
        groups.init(1, on=where)
        checkpoint, args = random_checkpoint(sizes, torch.float32, "cpu")
        model = build(checkpoint, args, TuningArgs(**LORA))
        mark_trainable(model, TuningArgs(**LORA))
        quantise(model, ParallelArgs(precision="fp32", quant=kind))
        batches = first_batches(data, 10**6, seed=0, dp_rank=0, dp_size=1)
        fill(model, checkpoint, lambda name: None, groups.device(), calibrate_on=batches if tokens else None)
        found = []
        model.norm.register_forward_pre_hook(lambda _, given: found.append(given[0].cpu()))
        with torch.no_grad():
            for batch in batches:
                model.eval()(batch.tokens.to(where), cu_seqlens=batch.cu_seqlens)
        return torch.cat(found, 1)

    exact = hidden("cpu", None, 0)
    nearest, here, there = (
        (hidden(where, "nf4", tokens) - exact).norm() for where, tokens in (("cpu", 0), ("cpu", 1), (device, 1))
    )
    print(f"error beside nearest levels: CPU {here / nearest:.3f}, {device} {there / nearest:.3f}")
    assert there < 0.95 * nearest and abs(there / here - 1) < 0.1


def fp16_scales_its_loss(
    directory: Path, device: str, sizes: dict, data: Examples, bound: float, **common: Any
) -> None:
    """fp16 learns what fp32 learns; the scale starts at 2^16, and every step skipped for it halves it."""
    exact = train(directory / "fp32", device, sizes, data, precision="fp32", **common)
    half = train(directory / "fp16", device, sizes, data, precision="fp16", **common)
    skipped = int(half.records[-1]["skipped_steps"])
    assert skipped <= 3 and half.state.loss_scale["value"] == 2.0 ** (16 - skipped)
    if skipped == 0:
        assert apart(half.losses, exact.losses) <= bound, (half.losses, exact.losses)
    assert half.losses[-3:].mean() < 0.9 * half.losses[:3].mean()


class Nothing:
    """Beside resume/: nothing."""

    about, lay_out, write = dict, staticmethod(lambda *given: None), staticmethod(lambda *given: None)
    complete = staticmethod(lambda directory, step: [])


def trained_state(run: Run) -> dict[str, Tensor]:
    """This rank's trained parameters and moments, the tensors themselves."""
    trained = [(n, p) for n, p in run.model.named_parameters() if p.requires_grad]
    found = {n: local(p.detach()) for n, p in trained}
    return found | {f"{n}/{m}": local(run.optimizer.state[p][m]) for n, p in trained for m in MOMENTS}


def saved_state_returns(directory: Path, device: str, sizes: dict, data: Examples, **common: Any) -> None:
    """Weights and moments, saved in one run and read into another, are bit for bit the same, although the first changed all of
    them as soon as the save had begun; a second save takes the same host memory."""
    first = train(directory / "a", device, sizes, data, steps=3, **common)
    names = [n for n, p in first.model.named_parameters() if p.requires_grad]
    saver = Saver(directory / "run", first.model, first.optimizer, names, Nothing(), None)
    kept = {n: t.clone() for n, t in trained_state(first).items()}
    places: list[dict[str, int]] = []
    for step in (2, 3):
        for name, tensor in trained_state(first).items():
            tensor.copy_(kept[name])
        saver.start(step, first.state.to_json())
        for tensor in trained_state(first).values():
            tensor.fill_(-1)
        places.append({n: t.data_ptr() for n, t in saver.snapshot.tensors.items() if n in kept})
    saver.finish()
    assert places[0] == places[1]
    for name, tensor in trained_state(first).items():
        assert tensor.numel() == 0 or saver.snapshot.tensors[name].is_pinned() == tensor.is_cuda, name
    other = train(directory / "b", device, sizes, data, steps=1, lr=1e-4, **common)
    assert resume.load(directory / "run" / "latest", other.model, other.optimizer)["step"] == 3
    found = trained_state(other)
    assert found.keys() == kept.keys()
    assert [n for n in kept if not torch.equal(kept[n], found[n])] == []


def greedy_tokens(
    device: str, sizes: dict, prompts: list[list[int]], new: int
) -> tuple[list[list[int]], list[list[int]]]:
    """(with the cache, without it): fp32, the same weights on every device."""
    groups.init(1, on=device)
    checkpoint, args = random_checkpoint(sizes, torch.float32)
    model = build(checkpoint, args, TuningArgs())
    materialise(model, checkpoint, ParallelArgs(precision="fp32"), 0)
    cached = generate(model.eval(), prompts, new)
    plain = []
    with torch.no_grad():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(new):
                ids.append(model(torch.tensor([ids], device=groups.device()))[0, -1].argmax().item())
            plain.append(ids[len(prompt) :])
    return cached, plain
