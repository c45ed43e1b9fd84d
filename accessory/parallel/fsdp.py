"""FSDP2 over the data-parallel ranks, around fairscale's layers, which already split every weight over mp.

    fsdp   a layer's weights are gathered for its forward and again for its backward      least memory
    sdp    gathered once a step, kept until backward is done                              less traffic
    ddp    every rank keeps all of its mp slice; only gradients travel                    most memory, least traffic

The trained parameters are fp32 masters; the policy casts a layer's weights to the compute dtype when it gathers them and
reduces gradients in fp32. Frozen weights are sharded too. Where there is one dp rank FSDP is left out (but for --cpu_offload):
the layers cast the weights that they use (layers.linear), the dtype being that of what the embedding gives them. So do layers
with weights held in NF4, which are gathered as they are: bits that are no numbers must not be cast.
"""

import torch
from torch import nn

from accessory.flags import PRECISIONS
from accessory.parallel import exchange, groups, products
from accessory.parallel.layers import ColumnParallelLinear, VocabParallelEmbedding

DTYPES = dict(zip(PRECISIONS, (torch.bfloat16, torch.float16, torch.float32, torch.float32)))


def sharder(data_parallel: str, precision: str, cpu_offload: bool = False):
    """A function that shards one module over dp: each layer first, the whole model last; with cast=False its parameters are
    gathered in their own dtypes. Every rank calls it alike."""
    dtype = DTYPES[precision]
    if (
        groups.dp_size() == 1 and not cpu_offload
    ):  # nothing to gather: FSDP would copy every weight, in and out, to itself

        def alone(module: nn.Module, cast: bool = True) -> None:
            for inner in module.modules():
                if isinstance(inner, VocabParallelEmbedding):
                    inner.compute_dtype = dtype  # the layers take that of what they are given
            head = getattr(module, "output", None)  # of the whole model
            if isinstance(head, ColumnParallelLinear) and products.turns_head(head.weight, dtype):
                head.weight = nn.Parameter(head.weight.detach().t().contiguous().t())

        return alone

    # here, not above: half a second that --help need not wait
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # cast_forward_inputs=False: its default would cast the fp32 rotary tables, and positions with them, to bf16
    casts, leaves = (
        MixedPrecisionPolicy(param_dtype=to, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for to in (dtype, None)
    )
    offload = CPUOffloadPolicy() if cpu_offload and groups.device().type == "cuda" else OffloadPolicy()
    mesh = groups.dp_mesh(data_parallel)

    # None: layers are freed after their forward; the root is not, backward begins with it
    again = None if data_parallel == "fsdp" else False

    def shard(module: nn.Module, cast: bool = True) -> None:
        policy = casts if cast else leaves
        fully_shard(module, mesh=mesh, reshard_after_forward=again, mp_policy=policy, offload_policy=offload)
        if hasattr(module, "hidden"):  # the whole model's other way in
            register_fsdp_forward_method(module, "hidden")
        if groups.device().type == "cpu":
            module.set_custom_all_gather(exchange.AllGather())
            module.set_custom_reduce_scatter(exchange.ReduceScatter())

    return shard


def gradients_travel(model: nn.Module, data_parallel: str, last: bool) -> None:
    """Call before each micro batch: sdp and ddp add gradients up where they are and reduce once, with the last micro batch.

    fsdp reduces every time, or each rank would hold the unsharded gradients of the whole model."""
    if data_parallel != "fsdp" and groups.dp_size() > 1:
        model.set_requires_gradient_sync(last)


def reshard(model: nn.Module) -> None:
    """Back to this rank's parts after a forward without a backward, which leaves the embedding and the head gathered, under sdp
    and ddp every layer too: parameters are then not those that the optimizer and a checkpoint know."""
    for module in model.modules():
        if hasattr(module, "reshard"):  # FSDP's own, which is not imported where there is one rank
            module.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded parameter or gradient, a plain tensor (possibly with no rows), apart from autograd.

    `DTensor.to_local` asks its dispatcher first, which over the 300 tensors of a step is 5 % of a small model's update."""
    return getattr(tensor, "_local_tensor", tensor)


def rows_of_rank(tensor: torch.Tensor) -> tuple[tuple[int, int], bool]:
    """([first, stop) of this mp rank's rows that this dp rank holds, whether all dp ranks hold them).

    FSDP2 cuts dim 0 into parts of ceil(rows / dp) rows; the last ones may be short or empty. Under ddp nothing is cut."""
    rows, mesh = tensor.shape[0], getattr(tensor, "device_mesh", None)
    if mesh is None or mesh.ndim == 2:
        return (0, rows), True
    part = -(-rows // groups.dp_size())
    return (min(groups.dp_rank() * part, rows), min((groups.dp_rank() + 1) * part, rows)), False
