"""One tensor scale for linears that runtimes multiply as one.

vLLM and its like lay query, key and value, and gate and up, below each other and multiply once. Scales of 8 bits come
in units of one number for the whole tensor (the NV layout), and a kernel takes one such number: where the parts were
written with several, one of them is taken for all, and codes no longer mean what they meant. So the parts get one: that
of the largest |weight| of them all, as llm-compressor's observers do it. It costs next to nothing: e4m3 scales keep
their relative precision over fifteen powers of two.

Which linears are fused, nobody writes into a checkpoint; here those of a block with such roles (`FUSED_ROLES`) that
read the same inputs and get the same scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fettle.methods.protocols import TensorScaled
from fettle.methods.quantize.ranges import FUSED_MAXIMUM
from fettle.models.parts import FUSED_ROLES, Linear
from fettle.pipeline.layout import Compression
from fettle.pipeline.stream import Seen


def fused_maxima(items: Sequence[Compression], weight_of: Callable[[Linear], Tensor]) -> dict[str, Tensor]:
    """Linear → the largest |weight| of all that share its tensor scale, float32 [1]; only those that share one.

    Args:
        items: what is compressed together.
        weight_of: a linear's weight as its method will see it.
    """
    groups: dict[tuple[object, ...], list[Linear]] = {}
    for item in items:
        together = next((roles for roles in FUSED_ROLES if item.linear.role in roles), None)
        shares = isinstance(item.method, TensorScaled) and item.method.tensor_scale == "fused"
        if together is not None and shares and getattr(item.scheme, "has_tensor_scale", False):
            groups.setdefault((together, item.linear.input_group, item.scheme), []).append(item.linear)
    found: dict[str, Tensor] = {}
    for linears in groups.values():
        if len(linears) > 1:
            largest = torch.stack([weight_of(linear).float().abs().amax().reshape(1).cpu() for linear in linears])
            found.update({linear.name: largest.amax(0) for linear in linears})
    return found


def with_maximum(known: Seen | None, name: str, maxima: Mapping[str, Tensor]) -> Seen | None:
    """What is known of a linear, and the largest weight of those that share its tensor scale where some do."""
    if name not in maxima:
        return known
    own = {FUSED_MAXIMUM: maxima[name]}
    return Seen(statistics=own, tokens=0) if known is None else replace(known, statistics=known.statistics | own)
