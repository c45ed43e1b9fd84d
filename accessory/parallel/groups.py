"""Who works with whom: model-parallel (mp) and data-parallel (dp) groups, from fairscale, with device meshes derived from them.

    world of 8, mp 4:      mp groups, adjacent     [0 1 2 3] [4 5 6 7]     share one replica of the model
                           dp groups, strided      [0 4] [1 5] [2 6] [3 7] hold the same slice, see other data
    4 query-head groups, 2 kv heads:  kv groups    [0 1] [2 3] ...         hold the same kv head

Everything runs on CPU with gloo too. World size 1 is a case, not a branch: `init()` without torchrun makes a one-rank group
over an in-memory store (no port), so a notebook needs no launcher.
"""

import contextlib
import io
import os
import socket
from datetime import timedelta
from typing import Any, Callable

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
SAVE_HOURS = 2  # how long a saving thread waits for the others

_cache: dict = {}  # meshes and kv groups of the present world; emptied by destroy()


def device() -> torch.device:
    """This rank's device: the GPU of LOCAL_RANK, or the CPU where there is none (or none was asked for)."""
    return _cache.get("device") or default_device()


def default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


def checked(given: torch.device | str) -> torch.device:
    """The device; ValueError where it is none that there is here."""
    try:
        where = torch.device(given)
    except (RuntimeError, TypeError):
        where = torch.device("meta")
    if where.type == "cuda" and torch.cuda.is_available() and (where.index or 0) < torch.cuda.device_count():
        return default_device() if where.index is None else where
    if where.type == "cuda":
        raise ValueError(
            f"device {given!r}: torch sees {torch.cuda.device_count()} GPU(s) here; leave it out, or 'cpu'"
        )
    if where.type != "cpu":
        raise ValueError(f"device {given!r}: expected 'cpu', 'cuda' or 'cuda:N'")
    return where


def init(model_parallel_size: int = 1, on: torch.device | str | None = None, timeout_minutes: float = 30) -> None:
    """Makes the groups. Every rank calls it; calling again with the same size is harmless.

    `on`: the device, "cpu", "cuda" or "cuda:N"; none: this rank's GPU or the CPU, or that of an earlier call. Raises ValueError
    when the size does not divide the number of processes (fairscale alone would clamp it in silence), or there is no such device."""
    where = device() if on is None else checked(on)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"]) if launched else 1
    # before ranks meet: one that refuses at once would leave another in the middle of connecting
    if model_parallel_size < 1 or world % model_parallel_size:
        allowed = [n for n in range(1, world + 1) if world % n == 0]
        raise ValueError(
            f"--model_parallel_size {model_parallel_size} does not fit the {world} running process(es): use "
            f"{' or '.join(map(str, allowed))}, or start a multiple of {max(model_parallel_size, 1)} (--nproc_per_node)"
        )
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        if launched:
            _meet(backend, timedelta(minutes=timeout_minutes))
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if fairscale_groups.model_parallel_is_initialized():
        if mp_size() != model_parallel_size:
            raise ValueError(f"model_parallel_size {model_parallel_size}: this process already runs at {mp_size()}")
        if on is not None:
            _cache["device"] = where
        return
    sizes = all_gather_object(model_parallel_size)
    if set(sizes) != {model_parallel_size}:  # making the groups would wait for ever
        raise ValueError(
            f"--model_parallel_size is not the same on every rank ({', '.join(map(str, sizes))}): start them alike"
        )
    with contextlib.redirect_stdout(io.StringIO()):  # fairscale prints
        fairscale_groups.initialize_model_parallel(model_parallel_size)
    _cache["device"] = where


def _meet(backend: str, timeout: timedelta) -> None:
    try:
        dist.init_process_group(backend, timeout=timeout)
    except RuntimeError as error:
        asked = [f"{name}={os.environ[name]}" for name in INTERFACES if name in os.environ]
        given = f"{', '.join(asked)} is set" if asked else "they take the one that the host's name stands for"
        raise ValueError(
            f"rank {os.environ['RANK']} cannot reach the others from {socket.gethostname()} ({str(error).strip().splitlines()[0]}): name the network interface that the nodes share in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (`ip -brief address` lists them; {given})"
        ) from error


def ensure() -> None:
    """Makes a one-rank world when nothing was set up: what a notebook needs. Under torchrun `init()` comes first."""
    if not fairscale_groups.model_parallel_is_initialized():
        init(1)


def destroy() -> None:
    """Forgets groups and process group; every rank calls it. A barrier first, or a late rank may see its peers vanish."""
    if dist.is_initialized():
        dist.barrier()
        fairscale_groups.destroy_model_parallel()
        _cache.clear()
        dist.destroy_process_group()


def forget_model_parallel() -> None:
    """Keeps the process group and forgets its division, so that `init` can divide it anew (a pool of test workers does)."""
    fairscale_groups.destroy_model_parallel()
    _cache.clear()


def mp_group() -> dist.ProcessGroup:
    return fairscale_groups.get_model_parallel_group()


def dp_group() -> dist.ProcessGroup:
    return fairscale_groups.get_data_parallel_group()


def mp_size() -> int:
    return fairscale_groups.get_model_parallel_world_size()


def mp_rank() -> int:
    return fairscale_groups.get_model_parallel_rank()


def dp_size() -> int:
    return fairscale_groups.get_data_parallel_world_size()


def dp_rank() -> int:
    return fairscale_groups.get_data_parallel_rank()


def rank() -> int:
    """Global rank; 0 when nothing is set up, so that printing code needs no case."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def kv_group(n_kv_heads: int) -> dist.ProcessGroup | None:
    """The neighbouring mp ranks that hold the same kv head; None unless mp > n_kv_heads. Collective at the first call."""
    copies = mp_size() // n_kv_heads
    if copies <= 1:
        return None
    key = ("kv", copies)
    if key not in _cache:
        for first in range(0, world_size(), copies):  # mp ranks are adjacent and copies divides mp
            ranks = list(range(first, first + copies))
            group = dist.new_group(ranks)
            if rank() in ranks:
                _cache[key] = group
    return _cache[key]


def dp_mesh(data_parallel: str) -> DeviceMesh:
    """The mesh FSDP shards over: 1-D over dp for fsdp and sdp; (replicate = dp, shard = 1) for ddp. Collective at first."""
    key = ("dp_mesh", data_parallel == "ddp", device().type)
    if key not in _cache:
        if data_parallel == "ddp":
            shape, names = (dp_size(), 1, mp_size()), ("replicate", "shard", "mp")
            _cache[key] = init_device_mesh(device().type, shape, mesh_dim_names=names)["replicate", "shard"]
        else:
            _cache[key] = DeviceMesh.from_group(dp_group(), device().type, mesh_dim_names=("dp",))
    return _cache[key]


def sent(tensor: Tensor, to: torch.device) -> Tensor:
    """A tensor of the host, on its way to a device: pinned, so that nobody waits for it."""
    if tensor.device == to or tensor.device.type != "cpu":
        return tensor.to(to)
    return tensor.pin_memory().to(to, non_blocking=True)


def all_reduce(tensor: Tensor, group: dist.ProcessGroup | None = None, op: str = "sum") -> Tensor:
    """In place, over `group` (None: the world); returns the tensor. Every rank of the group calls it."""
    dist.all_reduce(tensor, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], group=group)
    return tensor


def any_rank(*flags: bool) -> list[bool]:
    """Of each flag, whether it is true on some rank. Every rank calls it."""
    return (all_reduce(torch.tensor(flags, dtype=torch.float32)) > 0).tolist()


def save_group() -> dist.ProcessGroup:
    """The world once more, on the CPU, for the threads that write checkpoints: a group is one thread's at a time.

    Patient: rank 0 may be hashing a large base meanwhile. Collective at the first call."""
    if "save" not in _cache:
        _cache["save"] = dist.new_group(backend="gloo", timeout=timedelta(hours=SAVE_HOURS))
    return _cache["save"]


def all_gather_object(value, group: dist.ProcessGroup | None = None) -> list:
    """`value` of every rank, by global rank (`group`: the world, or `save_group()`). Every rank calls it. Plain Python data
    only."""
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value):
    """Rank 0's value on every rank. Every rank calls it. Plain Python data only."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_first_rank(work: Callable[[], Any]) -> Any:
    """What `work()` gives on rank 0, on every rank: for reading that once is enough. Every rank calls it; a ValueError or
    OSError of rank 0 is raised on all, as a ValueError with the same text."""
    result, error = None, None
    if rank() == 0:
        try:
            result = work()
        except (OSError, ValueError) as failed:
            error = str(failed)
    result, error = broadcast_object((result, error))
    if error is not None:
        raise ValueError(error)
    return result


def barrier() -> None:
    dist.barrier()


def together(error: BaseException | None, result: Any = None, group: dist.ProcessGroup | None = None) -> list:
    """Every rank calls it after a step that may fail on some rank only: all raise if one failed, none is left waiting.
    Otherwise every rank's `result`, by rank.

    The failing rank raises its own error; the others a ValueError with the first failing rank's text."""
    text = None if error is None else f"{error}" or type(error).__name__
    everyone = all_gather_object((text, result), group)
    if error is not None:
        raise error
    for other, (text, _) in enumerate(everyone):
        if text is not None:
            raise ValueError(text if text.startswith("rank ") else f"rank {other}: {text}")
    return [value for _, value in everyone]
