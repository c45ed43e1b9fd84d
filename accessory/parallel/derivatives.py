"""Where the handwritten derivatives give way to torch's own: under torch.compile, under torch.func, for a second derivative.

    class _Silu(Function):                            y = _Silu.apply(x) if by_hand() else F.silu(x)
        def backward(ctx, gradient):
            if torch.is_grad_enabled():               backward(create_graph=True): what is computed here without autograd would
                return differentiable(F.silu, ..)     be a constant to a second derivative

torch's `once_differentiable` does not do: it raises from a node of the graph that torch.autograd.grad never comes by where it
is asked for some tensors only, and the derivative is then wrong in silence. Proof: tests/unit/test_derivatives.py
"""

from typing import Callable, Sequence

import torch
from torch import Tensor

from accessory.parallel import groups


def transformed() -> bool:
    """Whether torch.func (grad, vmap, jvp, ..) is at work, which takes no autograd function without a rule of its own."""
    return torch._C._are_functorch_transforms_active()


def by_hand() -> bool:
    """Whether a handwritten autograd function is to be used: torch.compile makes a better one by itself."""
    return not torch.compiler.is_compiling() and not transformed()


def differentiable(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], gradient: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of `function(*inputs)`, None for those not wanted, with a graph of their own. `inputs` are those of
    ctx.saved_tensors, which know where they come from."""
    with torch.enable_grad():
        # as views: one input may be another too, or come from it, and is not to be given that one's part
        inputs = [None if x is None else x.view_as(x) for x in inputs]
        y = function(*inputs)
    found = iter(torch.autograd.grad(y, [x for x, wants in zip(inputs, wanted) if wants], gradient, create_graph=True))
    return tuple(next(found) if wants else None for wants in wanted)


def input_like(gradient: Tensor, features: int) -> Tensor:
    """In the place of a linear function's input that was not kept: its gradient is the same for any."""
    return gradient.new_zeros(*gradient.shape[:-1], features).requires_grad_()


def once_only(what: str, remedy: str) -> None:
    """For a backward that has no graph of its own. Raises RuntimeError where it is asked for one."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"a second derivative (create_graph=True) through {what}: {remedy}")


def over_mp(y: Tensor) -> Tensor:
    """y, a result of the whole model: under mp a second derivative through it is refused, fairscale's sums have no graph."""
    if groups.mp_size() > 1 and y.requires_grad and by_hand():
        y.register_hook(lambda _: once_only("a model that is split", "load it at model_parallel_size 1"))
    return y
