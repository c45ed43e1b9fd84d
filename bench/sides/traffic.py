"""Bytes that this rank's collectives carry, counted where torch dispatches them, also in backward and in FSDP's hooks.

with Traffic(world) as sent: step()
sent.wire     bytes this rank sends: what it sends to one rank, and of collectives in a ring 2 (n-1)/n of an all-reduce's message,
              (n-1)/n of a gather's or scatter's whole
sent.calls    {op: [calls, bytes of the messages]}
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    def __init__(self, world: int):
        super().__init__()
        self.world, self.calls = world, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self._count(space, name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, space: str, name: str, args: tuple) -> None:
        kind = next((k for k in ("reduce_scatter", "gather", "reduce", "broadcast", "send") if k in name), None)
        if kind is None:  # wait_tensor, barrier, recv
            return
        sizes = [sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, torch.Tensor)) for arg in args]
        whole = max(sizes)  # of a gather the output, of a scatter the input
        if kind == "gather" and space != "c10d" and "out" not in name:
            whole *= self.world
        entry = self.calls.setdefault(kind, [0, 0])
        entry[0], entry[1] = entry[0] + 1, entry[1] + whole

    @property
    def wire(self) -> float:
        share = (self.world - 1) / self.world
        shares = {"reduce": 2 * share, "send": 1.0}
        return sum(size * shares.get(kind, share) for kind, (_, size) in self.calls.items())
