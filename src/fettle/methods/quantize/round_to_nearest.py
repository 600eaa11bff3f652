"""Round to nearest: every weight gets the closest level of its group's range. No data, one pass.

    code = clamp(round(w / scale) + zero_point, 0, 2^bits - 1)

The baseline of the field, and what every other method must beat. With `clip: search` the range of each group shrinks to
where the squared error of its weights is least: an outlier is cut off where that makes the others finer (the idea of
OCTAV, Sakr et al. 2022, and of the `mse` option of GPTQ's code, here by search and then by least squares).

Cost: out · in operations, memory one tile of rows; the search about fifty times that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fettle.methods.quantize.fields import UniformFields
from fettle.methods.quantize.range_search import search_ranges
from fettle.methods.quantize.ranges import in_groups, range_ends, spanning
from fettle.tensors.quantized import QuantizedTensor, quantize, row_tiles
from fettle.tensors.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class RoundToNearest(UniformFields):
    """Round to nearest, with the full range of each group or a searched one."""

    name: ClassVar[str] = "round_to_nearest"
    title: ClassVar[str] = "Round to nearest"
    source: ClassVar[str] = "the baseline; clipping search after Sakr et al. 2022, https://arxiv.org/abs/2206.06501"
    statistics: ClassVar[tuple[str, ...]] = ()
    objective: ClassVar[str] = "weight_error"

    clip: Literal["none", "search"] = field(
        default="none", metadata={"help": "the full range of each group, or the one with the least squared error"}
    )

    def needs(self) -> tuple[str, ...]:
        """No data."""
        return ()

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> QuantizedTensor:
        """Chooses scales, then the nearest codes, for weight [out, in]; needs no statistics."""
        return round_to_nearest(weight, self.scheme(dtype), clip=self.clip)


def round_to_nearest(weight: Tensor, scheme: Scheme, *, clip: str = "none") -> QuantizedTensor:
    """The nearest codes of weight [out, in] in `scheme`; pure.

    Raises:
        NonFiniteError: NaN or infinity in the weight, or a scale beyond its type.
    """
    scale, zero_point = choose_ranges(weight, scheme, clip=clip)
    return quantize(weight, scale, zero_point, scheme)


def choose_ranges(
    weight: Tensor, scheme: Scheme, *, clip: str, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of every group of weight [out, in], tile by tile of rows.

    Args:
        weight: [out, in].
        scheme: what shares a scale, grid, types.
        clip: "none" for the full range, "search" for the range with the least error.
        importance: float32 [in], how much each column's error counts in the search; None for equal.
    """
    shape = (weight.shape[0], weight.shape[1])
    tiles = [slice(None)] if scheme.granularity == "tensor" else row_tiles(*shape)
    scales, zero_points = [], []
    for rows in tiles:
        groups = in_groups(weight[rows], scheme)
        if clip == "search":
            scale, zero_point = search_ranges(groups, scheme, _column_importance(importance, weight[rows], scheme))
        else:
            scale, zero_point = spanning(*range_ends(groups), scheme)
        scales.append(scale)
        zero_points.append(zero_point)
    found = [zero_point for zero_point in zero_points if zero_point is not None]
    return torch.cat(scales), torch.cat(found) if found else None


def _column_importance(importance: Tensor | None, tile: Tensor, scheme: Scheme) -> Tensor:
    """Importance of each column in the shape of the groups, zero where a short group was filled."""
    if importance is None:
        importance = torch.ones(tile.shape[1])
    return in_groups(importance.expand(tile.shape if scheme.granularity == "tensor" else (1, tile.shape[1])), scheme)
