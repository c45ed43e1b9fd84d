"""What autograd keeps for backward, made smaller: instead of a tensor, how it is made again.

    with Remade() as remade:             h = norm(x)            autograd of w(h) wants h;
        remade.note(h, lambda: norm(x))  y = w(h)               it keeps the recipe, and norm(x) is taken again in backward

Unlike a checkpoint of the whole layer nothing dear is done twice: only what a recipe says. Test: tests/unit/test_checkpointing.py
"""

from typing import Callable

import torch
from torch import Tensor


class Remade(torch.autograd.graph.saved_tensors_hooks):
    """While it is entered, a noted tensor that autograd would keep, whole and in its own order of elements, is kept as its
    recipe; all else as ever. A recipe is run in backward without gradients, once for all that want the tensor: on every mp
    rank in the same order, so that it may be collective. Eager only: torch.compile decides by itself what it keeps."""

    def __init__(self) -> None:
        super().__init__(self._pack, _unpack)
        self._known: dict[int, tuple[Tensor, _Recipe]] = {}

    def __enter__(self) -> "Remade":
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._known.clear()  # autograd keeps this object as long as the graph: it must not keep the tensors
        super().__exit__(*error)

    def note(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        """`make()` gives the tensor again, equal to the bit."""
        if tensor.requires_grad and tensor.numel():
            self._known[tensor.untyped_storage().data_ptr()] = (tensor, _Recipe(make))

    def _pack(self, tensor: Tensor) -> "Tensor | tuple[_Recipe, torch.Size]":
        noted, recipe = self._known.get(tensor.untyped_storage().data_ptr(), (None, None))
        if noted is None or tensor.numel() != noted.numel() or tensor.dtype != noted.dtype:
            return tensor
        if not tensor.is_contiguous() or not noted.is_contiguous():
            return tensor
        recipe.wanted += 1
        return recipe, tensor.shape


class _Recipe:
    def __init__(self, make: Callable[[], Tensor]):
        self.make, self.wanted, self.made = make, 0, None

    def __call__(self) -> Tensor:
        if self.made is None:
            with torch.no_grad():
                self.made = self.make()
        made, self.wanted = self.made, self.wanted - 1
        if self.wanted <= 0:  # the last that wants it; a second backward makes it anew
            self.made = None
        return made


def _unpack(kept: "Tensor | tuple[_Recipe, torch.Size]") -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    recipe, shape = kept
    return recipe().view(shape)
