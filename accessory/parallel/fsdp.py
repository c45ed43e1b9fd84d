"""FSDP2 over the data-parallel ranks, around fairscale's layers, which already split every weight over mp.

    fsdp   a layer's weights are gathered for its forward and again for its backward      least memory
    sdp    gathered once a step, kept until backward is done                              less traffic
    ddp    every rank keeps all of its mp slice; only gradients travel                    most memory, least traffic

The trained parameters are fp32 masters; the policy casts a layer's weights to the compute dtype when it gathers them and
reduces gradients in fp32. Frozen weights are sharded too. World size 1 takes the same path.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from accessory.config import flag
from accessory.parallel import groups

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


@dataclass
class ParallelArgs:
    """How the work is divided, and in which precision"""

    model_parallel_size: int = flag(
        1, "ranks that share one replica; any size the model's heads allow, whatever the shards on disk"
    )
    data_parallel: str = flag(
        "fsdp",
        "over the other ranks: fsdp least memory, sdp keeps a step's weights, ddp keeps all",
        choices=("fsdp", "sdp", "ddp"),
    )
    cpu_offload: bool = flag(False, "keep weights and optimizer in host memory between uses (GPU only)")
    precision: str = flag(
        "bf16", "of the arithmetic; trained weights and gradients are fp32 always", choices=tuple(DTYPES)
    )
    checkpointing: bool = flag(False, "recompute activations in backward: less memory, about a third more time")
    compile: bool = flag(False, "compile each layer with torch.compile: faster after a minute of warming up")
    quant: str | None = flag(
        None, "hold the layers' frozen linears in 4 bits (QLoRA): a quarter of their memory", choices=("nf4",)
    )


def sharder(data_parallel: str, precision: str, cpu_offload: bool = False):
    """A function that shards one module over dp: each layer first, the whole model last. Every rank calls it alike."""
    # cast_forward_inputs=False: its default would cast the fp32 rotary tables, and positions with them, to bf16
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy() if cpu_offload and groups.device().type == "cuda" else OffloadPolicy()
    mesh = groups.dp_mesh(data_parallel)

    def shard(module: nn.Module) -> None:
        fully_shard(
            module, mesh=mesh, reshard_after_forward=data_parallel == "fsdp", mp_policy=policy, offload_policy=offload
        )

    return shard


def gradients_travel(model: FSDPModule, data_parallel: str, last: bool) -> None:
    """Call before each micro batch: sdp and ddp add gradients up where they are and reduce once, with the last micro batch.

    fsdp reduces every time, or each rank would hold the unsharded gradients of the whole model."""
    if data_parallel != "fsdp":
        model.set_requires_gradient_sync(last)


def reshard(model: nn.Module) -> None:
    """Back to this rank's parts after a forward without a backward, which sdp and ddp would leave gathered: parameters
    are then not those that the optimizer and a checkpoint know."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded parameter or gradient, a plain tensor (possibly with no rows)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def rows_of_rank(tensor: torch.Tensor) -> tuple[tuple[int, int], bool]:
    """([first, stop) of this mp rank's rows that this dp rank holds, whether all dp ranks hold them).

    FSDP2 cuts dim 0 into parts of ceil(rows / dp) rows; the last ones may be short or empty. Under ddp nothing is cut."""
    rows, mesh = tensor.shape[0], getattr(tensor, "device_mesh", None)
    if mesh is None or mesh.ndim == 2:
        return (0, rows), True
    part = -(-rows // groups.dp_size())
    return (min(groups.dp_rank() * part, rows), min((groups.dp_rank() + 1) * part, rows)), False
