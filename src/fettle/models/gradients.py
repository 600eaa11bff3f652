"""The gradient of a block's error for its weights, as they stand in the block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fettle.models.anatomy import Linear
from fettle.models.module_tree import part_of
from fettle.models.skeleton import Skeleton


def require_gradients_(skeleton: Skeleton, linears: Sequence[Linear], wanted: bool) -> None:
    """Turns the recording of gradients on or off for the parameters that hold these weights."""
    for linear in linears:
        skeleton.slot_parameter(linear).requires_grad_(wanted)


@torch.enable_grad()
def weight_gradients(
    skeleton: Skeleton, index: int, hidden: Tensor, error: Callable[[Tensor], Tensor], linears: Sequence[Linear]
) -> tuple[float, list[Tensor]]:
    """`error` of a block's output, and its gradient for each weight, [out, in].

    Args:
        skeleton: with the block loaded and `require_gradients_` on for the linears.
        index: of the block.
        hidden: [1, tokens, hidden], what enters it.
        error: the block's output [1, tokens, hidden] → a scalar.
        linears: of this block. Several threads may ask at once: nothing is written.
    """
    parameters = [skeleton.slot_parameter(linear) for linear in linears]
    distinct = list({id(parameter): parameter for parameter in parameters}.values())
    value = error(skeleton.run_block_as_is(index, hidden))
    found = torch.autograd.grad(value, distinct, allow_unused=True)  # an expert may have seen no token
    gradients = {
        id(parameter): torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(distinct, found, strict=True)
    }
    parts = [part_of(gradients[id(p)], linear) for p, linear in zip(parameters, linears, strict=True)]
    return float(value.detach()), parts
