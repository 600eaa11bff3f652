"""Scales and zero points from the range of the weights that share them.

    asymmetric   low = min(w, 0), high = max(w, 0)
                 scale = (high - low) / (2^bits - 1), zero point = round(-low / scale)
    symmetric    scale = max|w| / highest level           (2^(bits-1) - 1 on the uniform grid)
    other grids  scale = max(high / highest level, low / lowest level)

Zero is always in the range, so that zero weights stay zero. A scale is rounded to the type in which it is stored before
anything is chosen with it: the stored scale is the one that was used. A group of zeros gets the scale 1, which keeps
every code at zero (on a grid without zero the smallest scale that there is); a scale too small for its type becomes the
smallest that the type has.

Scales of float8_e4m3fn have too little range for a model's weights: there the weight is multiplied by one float32 for
the whole tensor first, highest level · 448 / max|w|, so that the largest scale is the largest that the type has (the NV
layout, which stores this number); `in_tensor_units` does that around any solver. Where linears share the number, max|w|
is that of all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from fettle.errors import NonFiniteError
from fettle.tensors.quantized import QuantizedTensor
from fettle.tensors.scheme import Scheme


def in_tensor_units(
    weight: Tensor, scheme: Scheme, solve: Callable[[Tensor], QuantizedTensor], largest: Tensor | None = None
) -> QuantizedTensor:
    """What `solve` makes of weight [out, in], in units of the tensor scale where the scheme has one.

    Args:
        weight: [out, in].
        scheme: of its codes.
        solve: the weight in those units → codes.
        largest: float32 [1], max|w| of all linears that share the tensor scale; None where none does.

    Raises:
        NonFiniteError: NaN or infinity in the weight.
    """
    if not scheme.has_tensor_scale:
        return solve(weight)
    largest = weight.float().abs().max() if largest is None else largest
    if not bool(torch.isfinite(largest)):
        raise NonFiniteError(NOT_FINITE)
    top = max(-scheme.grid.levels[0], scheme.grid.levels[-1]) * torch.finfo(scheme.torch_scale_dtype).max
    unit = top / largest if float(largest) > 0 else torch.ones_like(largest)
    if not bool(torch.isfinite(unit)):  # so small that every code but that of zero is out of reach
        unit = torch.full_like(largest, torch.finfo(torch.float32).max)
    return replace(solve(weight.float() * unit), tensor_scale=unit.reshape(1))


FUSED_MAXIMUM = "fused_maximum"  # in the statistics where linears share a tensor scale: `largest`
NOT_FINITE = (
    "the weight holds NaN or infinity, which no code can stand for; check the checkpoint, or leave this linear out "
    "with where:"
)


def in_groups(weight: Tensor, scheme: Scheme) -> Tensor:
    """The weights that share a scale side by side: [rows, in] → [rows, groups, width], float32.

    A short last group is filled with zeros, which change neither a range nor an error that gives them no weight. With
    one scale for the whole tensor: [1, 1, rows·in].
    """
    tile = weight.float()
    if scheme.granularity == "tensor":
        return tile.reshape(1, 1, -1)
    rows, in_features = tile.shape
    width, groups = scheme.group_width(in_features), scheme.group_count(in_features)
    if groups * width != in_features:
        tile = pad(tile, (0, groups * width - in_features))
    return tile.reshape(rows, groups, width)


def range_ends(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The range of each group, zero included: low ≤ 0 ≤ high, both [rows, groups], for [rows, groups, width].

    Raises:
        NonFiniteError: NaN or infinity in a weight.
    """
    low, high = torch.aminmax(groups, dim=-1)
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise NonFiniteError(NOT_FINITE)
    return low.clamp_(max=0), high.clamp_(min=0)


def spanning(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scale (`value_dtype`) and zero point (uint8 or None) that span low ≤ 0 ≤ high; all [rows, groups].

    Raises:
        NonFiniteError: a scale beyond its type.
    """
    if not scheme.zero_point:
        lowest, highest = scheme.grid.levels[0], scheme.grid.levels[-1]
        if scheme.grid.is_uniform:
            lowest = -highest  # the code below it would be for one end alone
        return stored_scale(torch.maximum(low / lowest, high / highest), scheme), None
    steps = 2**scheme.grid.bits - 1
    scale = stored_scale(high / steps - low / steps, scheme)
    return scale, (-low / scale.float()).round_().clamp_(0, steps).to(torch.uint8)


def stored_scale(scale: Tensor, scheme: Scheme) -> Tensor:
    """`scale` rounded to the type in which it is stored, positive and finite, as `value_dtype`.

    Raises:
        NonFiniteError: a scale beyond the type.
    """
    dtype = scheme.torch_scale_dtype
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal
    if dtype in (torch.float16, torch.float8_e4m3fn):  # they live on their subnormals
        smallest *= limits.eps
    elif dtype == torch.float8_e8m0fnu:
        smallest = torch.finfo(torch.float32).smallest_normal  # smaller ones are flushed to zero by some CPUs
    if scheme.grid.has_zero:
        wanted = torch.where(scale > 0, scale.clamp(min=smallest), torch.ones_like(scale))
    else:
        wanted = scale.clamp(min=smallest)
    stored = wanted.to(dtype).to(scheme.value_dtype)
    if not bool(torch.isfinite(stored).all()):
        raise NonFiniteError(
            f"a scale of {float(scale.max()):.3g} is needed, and {scheme.scale_dtype} ends at {limits.max:.3g}; set "
            "scale_dtype: bfloat16 or float32, or more bits"
        )
    return stored
