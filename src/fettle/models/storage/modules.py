"""Linears as modules of transformers, which the standard's targets name; and what their module cannot have."""

from __future__ import annotations

from collections.abc import Iterable

from fettle.models.anatomy import Anatomy, Linear


def input_obstacle(linear: Linear) -> str | None:
    """Why the inputs of `linear` cannot be quantized, in words; None if they can."""
    if linear.block is None or linear.role == "router":
        return f"{linear.name} ({linear.role}) is no linear that fettle quantizes inputs for: those of blocks alone"
    if linear.slot.index is not None:
        return f"{linear.name} is a part of a parameter with all experts, and no module of its own"
    return None


def every_linear(anatomy: Anatomy) -> Iterable[Linear]:
    """Those of the blocks, the embedding and the head."""
    yield from anatomy.linears()
    yield from (linear for linear in (anatomy.embedding, anatomy.head) if linear is not None)


def module_name(linear: Linear) -> str:
    """The transformers module of a linear that is one: targets are matched against module names."""
    return linear.slot.parameter.removesuffix(".weight")
