"""The memory of large gradients, handed from the optimizer to the next backward (CPU).

    backward --take--> gradient --> optimizer --give--> kept beside its parameter --take--> backward of the next step

glibc maps a block of more than 32 MiB anew whenever it is asked for, whatever was freed before (under accessory.launch, 128). The
tables of a vocabulary are such blocks, and to find their fresh pages takes longer than to fill them (docs/LOG.md). Only what a backward took is kept: of any
other gradient it would wait in vain. A GPU's allocator keeps memory by itself, and FSDP has gradients of its own; neither is
touched. `trim` gives back what the heap holds of the compiler's work. Test: tests/unit/test_spare.py
"""

import ctypes
import gc
import sys
from typing import Iterable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

LEAST = 2**25  # bytes, the largest that glibc would find among what was freed

# of each parameter that takes, its gradient's memory or None
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_graphs = 0  # compiled when `trim` was last called


def give(parameters: Iterable[Tensor]) -> None:
    """Their gradients, which nobody reads any more, and which become None."""
    for p in parameters:
        gradient, p.grad = p.grad, None
        if type(gradient) is Tensor and gradient.device.type == "cpu" and gradient.nbytes > LEAST and p in _kept:
            whole = gradient.untyped_storage().nbytes() == gradient.nbytes  # no part of what others hold too
            if whole and gradient.stride() == p.stride():
                _kept[p] = gradient


def take(parameter: Tensor) -> Tensor:
    """Like `parameter` in shape and dtype, with any content: what was given of it, or fresh memory."""
    spare = _kept.get(parameter)
    _kept[parameter] = None
    like = (parameter.shape, parameter.stride(), parameter.dtype)
    if spare is not None and (spare.shape, spare.stride(), spare.dtype) == like:
        return spare
    return torch.empty_like(parameter)


def trim() -> None:
    """Once a step, after which it gives the heap's free pages back to the system if layers were compiled in it: among what the
    compiler leaves, large tensors find no place, and the heap would stay so much larger. Only where the C library is glibc."""
    global _graphs
    compiler = sys.modules.get("torch._dynamo.utils")  # not imported for this: 2 s of every run
    graphs = compiler.counters["stats"]["unique_graphs"] if compiler else 0
    if graphs != _graphs and sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        gc.collect()
        libc.malloc_trim(ctypes.c_size_t(0))
    _graphs = graphs
