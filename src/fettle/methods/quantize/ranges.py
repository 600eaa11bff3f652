"""Scales and zero points from the range of the weights that share them.

    asymmetric   low = min(w, 0), high = max(w, 0)
                 scale = (high - low) / (2^bits - 1), zero point = round(-low / scale)
    symmetric    scale = max|w| / highest level           (2^(bits-1) - 1 on the uniform grid)

Zero is always in the range, so that zero weights stay zero. A scale is rounded to the type in which it is stored before
anything is chosen with it: the stored scale is the one that was used. A group of zeros gets the scale 1, which keeps
every code at zero; a scale too small for its type becomes the smallest that the type has.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fettle.errors import NonFiniteError
from fettle.tensors.scheme import Scheme


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
        raise NonFiniteError(
            "the weight holds NaN or infinity, which no code can stand for; check the checkpoint, or leave this linear "
            "out with where:"
        )
    return low.clamp_(max=0), high.clamp_(min=0)


def spanning(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scale (in the scheme's type) and zero point (uint8 or None) that span low ≤ 0 ≤ high; all [rows, groups].

    Raises:
        NonFiniteError: a scale beyond its type.
    """
    if not scheme.zero_point:
        return stored_scale(torch.maximum(-low, high) / scheme.grid.levels[-1], scheme), None
    steps = 2**scheme.grid.bits - 1
    scale = stored_scale(high / steps - low / steps, scheme)
    return scale, (-low / scale.float()).round_().clamp_(0, steps).to(torch.uint8)


def stored_scale(scale: Tensor, scheme: Scheme) -> Tensor:
    """`scale` in the type in which it is stored, positive and finite.

    Raises:
        NonFiniteError: a scale beyond the type.
    """
    dtype = scheme.torch_scale_dtype
    limits = torch.finfo(dtype)
    # Half precision lives on its subnormals (6e-8 to 6e-5); those of the wide types are flushed to zero by some CPUs.
    smallest = limits.smallest_normal * limits.eps if dtype == torch.float16 else limits.smallest_normal
    stored = torch.where(scale > 0, scale.clamp(min=smallest), torch.ones_like(scale)).to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise NonFiniteError(
            f"a scale of {float(scale.max()):.3g} is needed, and {scheme.scale_dtype} ends at {limits.max:.3g}; set "
            "scale_dtype: bfloat16 or float32, or more bits"
        )
    return stored
