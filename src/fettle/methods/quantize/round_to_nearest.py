"""Round to nearest: every weight gets the closest level of its group's range. No data, one pass.

    code = clamp(round(w / scale) + zero_point, 0, 2^bits - 1)

On another grid than the uniform one: the closest level times the scale. `learned_levels.py` finds learned levels.

The baseline of the field, and what every other method must beat. With `clip: search` the range of each group shrinks to
where the squared error of its weights is least: an outlier is cut off where that makes the others finer (the idea of
OCTAV, Sakr et al. 2022, and of the `mse` option of GPTQ's code, here by search and then by least squares).

Cost: out · in operations, memory one tile of rows; the search about fifty times that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from fettle.methods.quantize.fields import GridFields
from fettle.methods.quantize.ranges import FUSED_MAXIMUM, in_tensor_units
from fettle.methods.quantize.sharing import choose_shared
from fettle.tensors.quantized import QuantizedTensor, quantize
from fettle.tensors.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class RoundToNearest(GridFields):
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
        return round_to_nearest(weight, self.scheme(dtype), clip=self.clip, largest=statistics.get(FUSED_MAXIMUM))


def round_to_nearest(
    weight: Tensor, scheme: Scheme, *, clip: str = "none", largest: Tensor | None = None
) -> QuantizedTensor:
    """The nearest codes of weight [out, in] in `scheme`; pure. `largest`: see `in_tensor_units`.

    Raises:
        NonFiniteError: NaN or infinity in the weight, or a scale beyond its type.
    """

    def solve(weight: Tensor) -> QuantizedTensor:
        shared = choose_shared(weight, scheme, clip=clip)
        return quantize(weight, shared.scale, shared.zero_point, scheme, levels=shared.levels)

    return in_tensor_units(weight, scheme, solve, largest)
