"""Training steps on several gloo (NCCL) ranks of one machine; the program starts its ranks itself.

settings: way (WAYS), world (ranks), batch, length, units, compile. data: model (a directory of consolidated.00.pth and params.json), hf (the same for
transformers). Every way: fp32, the same weights and tokens, forward, backward, clipping by the norm over all ranks, fused
AdamW. CPU time is that of all ranks together; more.sent_mb what rank 0 sends in a step (traffic.py), more.formula_mb what it
should be, of ours.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from bench import measure
from bench.sides.traffic import Traffic

RATE, CLIP = 1e-4, 1.0
Way = tuple[Callable[[Tensor], Tensor], float]  # (step(tokens (B, T)) -> this rank's mean loss, bytes by the formula)


def ours(data: dict, settings: dict, mp: int, exchanges: bool = True) -> Way:
    """`exchanges`: without, FSDP gathers and scatters by gloo's own collectives."""
    from accessory.model.lora import TuningArgs
    from bench.sides import own_step

    own_step.groups.init(mp, on=settings["device"])
    tuning = TuningArgs(lora_rank=settings["lora_rank"]) if settings.get("lora_rank") else None
    parallel = own_step.ParallelArgs(precision="fp32", model_parallel_size=mp, compile=settings.get("compile", False))
    model, args = own_step.load(data["model"], parallel, tuning)
    if not exchanges:
        use_gloo(model)
    step = own_step.Step(model, args.kv_heads)
    return lambda tokens: step(tokens, tokens), formula(model, args, settings, mp)


def use_gloo(model) -> None:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(DefaultAllGather())
            module.set_custom_reduce_scatter(DefaultReduceScatter())


def formula(model, args, settings: dict, mp: int) -> float:
    """Bytes that one rank sends in a step.

    mp: a layer's two all-reduces forward and two backward, of B T D numbers each, the first layer's last one only where the
    embedding learns; one more in the embedding and one before the head (of the rows with a label); three numbers a row in the
    loss; once a step the gradients that are addends (LoRA's). dp: a layer's weights are gathered for the forward and for the
    backward, the embedding's and the head's once, every gradient of a trained one reduced and scattered."""
    from accessory.model.lora import partial_grad

    dp, B, T = settings["world"] // mp, settings["batch"], settings["length"]
    rows = B * (T - 1)
    addends = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and partial_grad(n))
    sums = 4 * args.n_layers + (1 if model.tok_embeddings.weight.requires_grad else 0)
    numbers = sums * B * T * args.dim + rows * args.dim + 3 * rows + addends if mp > 1 else 0
    layers = sum(p.numel() for p in model.layers.parameters())
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    reduced = 2 * (mp - 1) / mp * numbers
    return 4 * (reduced + (dp - 1) / dp * (every + layers + trained))


def tensor_parallel(data: dict, settings: dict, sequence: bool) -> Way:
    """torch's own: parallelize_module over a plain LLaMA, the loss over the cut vocabulary; `sequence`: norms on T/2 tokens."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import loss_parallel, parallelize_module

    from bench.sides.plain_llama import Llama

    files = Path(data["model"])
    model = Llama(json.loads((files / "params.json").read_text()))
    model.load_state_dict(torch.load(files / "consolidated.00.pth", weights_only=True))
    model = model.to(settings["device"])
    parallelize_module(
        model, init_device_mesh(torch.device(settings["device"]).type, (settings["world"],)), plan(model, sequence)
    )
    compiled(model.layers, settings)
    update = updater(model)

    def step(tokens: Tensor) -> Tensor:
        with loss_parallel():
            logits = model(tokens)[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
        update()
        return plain(loss.detach())

    return step, 0.0


def plan(model, sequence: bool) -> dict[str, Any]:
    """The plan of PyTorch's tensor-parallel tutorial (and torchtitan's), with sequence parallel or without."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import parallel as tp

    cut = Shard(1) if sequence else Replicate()
    found: dict[str, Any] = {
        "tok_embeddings": tp.RowwiseParallel(input_layouts=Replicate(), output_layouts=cut),
        "output": tp.ColwiseParallel(input_layouts=cut, output_layouts=Shard(-1), use_local_output=False),
    }
    if sequence:
        found["norm"] = tp.SequenceParallel()
    for i in range(len(model.layers)):
        at = f"layers.{i}."
        found |= {at + n: tp.ColwiseParallel() for n in ("attention.wq", "attention.wk", "attention.wv")}
        found |= {at + n: tp.ColwiseParallel() for n in ("feed_forward.w1", "feed_forward.w3")}
        found |= {at + n: tp.RowwiseParallel(output_layouts=cut) for n in ("attention.wo", "feed_forward.w2")}
        if sequence:
            whole = {"input_layouts": (cut, None), "desired_input_layouts": (Replicate(), None)}
            found |= {at + n: tp.SequenceParallel() for n in ("attention_norm", "ffn_norm")}
            found[at + "attention"] = tp.PrepareModuleInput(**whole)
            found[at + "feed_forward"] = tp.PrepareModuleInput(**{k: v[:1] for k, v in whole.items()})
    return found


def fully_sharded(data: dict, settings: dict) -> Way:
    """transformers' model under FSDP2, layer by layer, as its examples do."""
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(data["hf"], dtype=torch.float32).to(settings["device"])
    compiled(model.model.layers, settings)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    update = updater(model)

    def step(tokens: Tensor) -> Tensor:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        update()
        return loss.detach()

    return step, 0.0


def compiled(layers, settings: dict) -> None:
    """Layer by layer, as torchtitan does."""
    if settings.get("compile"):
        for layer in layers:
            layer.compile()


def updater(model) -> Callable[[], None]:
    """Clipping and fused AdamW. Cut and whole parameters apart: torch's lists take one kind."""
    kinds: dict[bool, list] = {}
    for p in model.parameters():
        kinds.setdefault(hasattr(p, "to_local"), []).append(p)
    optimizer = torch.optim.AdamW([{"params": ps} for ps in kinds.values()], lr=RATE, weight_decay=0.0, fused=True)

    def update() -> None:
        norms = [plain(torch.nn.utils.get_total_norm([p.grad for p in ps])) for ps in kinds.values()]
        total = torch.linalg.vector_norm(torch.stack(norms))
        for ps in kinds.values():
            torch.nn.utils.clip_grads_with_norm_(ps, CLIP, total)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def plain(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


WAYS: dict[str, Callable[[dict, dict], Way]] = {
    "ours_mp": lambda d, s: ours(d, s, s["world"]),
    "ours_dp": lambda d, s: ours(d, s, 1),
    "ours_dp_gloo": lambda d, s: ours(d, s, 1, exchanges=False),
    "dtensor": lambda d, s: tensor_parallel(d, s, sequence=False),
    "dtensor_sequence": lambda d, s: tensor_parallel(d, s, sequence=True),
    "hf_fully_shard": fully_sharded,
}
SAME_TOKENS = ("ours_mp", "dtensor", "dtensor_sequence")  # of all ranks; the others see their own


def one_rank() -> None:
    work = measure.begin()
    data, settings, device = work["data"], work["settings"], work["device"]
    rank, world = int(os.environ["RANK"]), settings["world"]
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    step, expected = WAYS[settings["way"]](data, settings | {"device": device})
    seed = 0 if settings["way"] in SAME_TOKENS else rank
    shape, draw = (settings["batch"], settings["length"]), torch.Generator().manual_seed(seed)
    tokens, losses = torch.randint(data["vocab"], shape, generator=draw).to(device), []
    with Traffic(world) as sent:
        losses.append(step(tokens))
    timed = measure.timed(lambda: losses.append(step(tokens)), 1, settings["units"], device)
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, {"loss": [float(x) for x in losses[:2]]} | timed)
    if rank == 0:
        spread = 1 if seed == 0 and settings["way"] in SAME_TOKENS else world
        more = {"sent_mb": sent.wire / 1e6, "formula_mb": expected / 1e6}
        more |= {
            f"{kind}_{what}": n for kind, entry in sent.calls.items() for what, n in zip(("calls", "bytes"), entry)
        }
        if expected:
            more["sent_over_formula"] = sent.wire / expected
        measure.report(
            loss=[sum(values) / world for values in zip(*(e["loss"] for e in everyone))],
            tokens=tokens.numel() * spread,
            seconds=timed["seconds"],
            cpu_seconds=[sum(unit) for unit in zip(*(e["cpu_seconds"] for e in everyone))],
            peak_mb=max(e["peak_mb"] for e in everyone),
            more=more,
        )
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    """Starts the ranks; the first one prints the result."""
    world = json.loads(Path(sys.argv[1]).read_text())["settings"]["world"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world)}
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env=os.environ | where | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(world)
    ]
    while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
        time.sleep(0.05)
    for rank in ranks:  # a rank whose neighbour has failed would wait for it
        if rank.poll() is None:
            rank.kill()
    return max(abs(rank.wait()) for rank in ranks)


if __name__ == "__main__":
    sys.exit(main() if "RANK" not in os.environ else one_rank())
