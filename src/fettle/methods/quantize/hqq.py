"""HQQ: ranges from the weights alone, by an error that forgives outliers.

Badri & Shaji: Half-Quadratic Quantization of large language models, 2023, https://mobiusml.github.io/hqq_blog/.

    minimise over scale s and zero point z   Σ_i |w_i - s·(level(c_i) - z)|^p,   p < 1,   c_i the nearest code

With p below 1 a few large errors cost little, so the range follows the many weights and not the outliers. The power is
split off with a helper e for the error (half-quadratic splitting, Geman & Yang 1995):

    e = shrink_p(w - v, β)        the outliers' part of the error: |x| - (p/β)·|x|^(p-1), below zero nothing
    s, z from w - e               the rest is a quadratic problem
    β ← κ·β                       and the helper gets less and less

The paper keeps the scale and moves a zero point in floating point. Our zero point is a code, as the standard stores it,
so the scale is refit too, by least squares on w - e, and the zero point is the mean of what is left, rounded. Grids
without a zero point fit the scale alone. What has the smallest error Σ|w - v|^p of all steps is kept, the full range
(where it starts) included, so the result is never worse than round to nearest in that error.

Cost: about four passes over the weights an iteration. No data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fettle.errors import RecipeError
from fettle.methods.quantize.fields import GridFields
from fettle.methods.quantize.ranges import FUSED_MAXIMUM, in_groups, in_tensor_units, stored_scale
from fettle.methods.quantize.sharing import choose_shared
from fettle.tensors.quantized import QuantizedTensor, quantize, row_tiles
from fettle.tensors.scales import Shared, stack
from fettle.tensors.scheme import Scheme

BETA, KAPPA = 10.0, 1.01  # the authors' own, in units of the weights' deviation


@dataclass(frozen=True, kw_only=True)
class Hqq(GridFields):
    """HQQ: ranges by an error that forgives outliers; no data."""

    name: ClassVar[str] = "hqq"
    title: ClassVar[str] = "HQQ"
    source: ClassVar[str] = "Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog/"
    statistics: ClassVar[tuple[str, ...]] = ()
    objective: ClassVar[str] = "robust_error"

    norm: float = field(default=0.7, metadata={"help": "p of the error's p-th power", "minimum": 0.1, "maximum": 1.0})
    iterations: int = field(default=20, metadata={"help": "rounds of the two steps", "minimum": 1, "maximum": 1000})

    def validate(self) -> None:
        """Refuses learned levels, which have no range to choose.

        Raises:
            RecipeError: learned levels, or what every method refuses.
        """
        super().validate()
        if self.grid == "learned":
            raise RecipeError(
                "hqq chooses ranges, and learned levels have none; use round_to_nearest or gptq with them"
            )

    def needs(self) -> tuple[str, ...]:
        """No data."""
        return ()

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> QuantizedTensor:
        """Chooses scales, then the nearest codes, for weight [out, in]; needs no statistics."""
        largest = statistics.get(FUSED_MAXIMUM)
        return hqq(weight, self.scheme(dtype), norm=self.norm, iterations=self.iterations, largest=largest)


def hqq(
    weight: Tensor, scheme: Scheme, *, norm: float = 0.7, iterations: int = 20, largest: Tensor | None = None
) -> QuantizedTensor:
    """Codes of weight [out, in] with small Σ|error|^norm; pure. `largest`: see `in_tensor_units`.

    Raises:
        NonFiniteError: NaN or infinity in the weight, or a scale beyond its type.
    """

    def solve(weight: Tensor) -> QuantizedTensor:
        shape = (weight.shape[0], weight.shape[1])
        tiles = [slice(None)] if scheme.granularity == "tensor" else row_tiles(*shape)
        shared = stack([_fit(weight[rows], scheme, norm, iterations) for rows in tiles])
        return quantize(weight, shared.scale, shared.zero_point, scheme)

    return in_tensor_units(weight, scheme, solve, largest)


def shrink(error: Tensor, beta: float, norm: float) -> Tensor:
    """The generalised soft threshold: the part of an error that the power forgives."""
    size = error.abs()
    return error.sign() * (size - (norm / beta) * size.clamp(min=1e-8).pow(norm - 1)).clamp_(min=0)


def _fit(tile: Tensor, scheme: Scheme, norm: float, iterations: int) -> Shared:
    """Scale and zero point of each group of a tile [rows, in]; where a short group was filled, the zeros fit."""
    best = choose_shared(tile, scheme, clip="none")
    scale, zero_point, groups = best.scale, best.zero_point, in_groups(tile, scheme)
    # Everything in units of the group's deviation, so that beta means the same whatever the weights' size.
    unit = groups.square().mean(-1, keepdim=True).sqrt().clamp_(min=torch.finfo(torch.float32).tiny)
    values, units = _rounded(groups, best, scheme)
    least = _power(groups - values, norm)
    beta = BETA
    for _ in range(iterations):
        target = groups - shrink((groups - values) / unit, beta, norm) * unit
        scale, zero_point = _refit(target, units, scale, zero_point, scheme)
        tried = Shared(scale=scale, zero_point=zero_point)
        values, units = _rounded(groups, tried, scheme)
        error = _power(groups - values, norm)
        better = error < least
        best, least = best.where(tried, better), torch.minimum(error, least)
        beta *= KAPPA
    return best


def _refit(
    target: Tensor, units: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme
) -> tuple[Tensor, Tensor | None]:
    """The scale by least squares for these units (levels less zero), then the zero point for that scale."""
    energy = units.square().sum(-1)
    fitted = (units * target).sum(-1) / energy
    usable = (energy > 0) & (fitted > 0) & torch.isfinite(fitted)
    scale = stored_scale(torch.where(usable, fitted, scale.float()), scheme)
    if zero_point is None:
        return scale, None
    codes = units + zero_point.float().unsqueeze(-1)
    wanted = (codes - target / scale.float().unsqueeze(-1)).mean(-1)
    return scale, wanted.round_().clamp_(0, 2**scheme.grid.bits - 1).to(torch.uint8)


def _rounded(groups: Tensor, shared: Shared, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Nearest values as they are stored, and their units (levels less zero), for groups [rows, groups, width]."""
    step = shared.scale.float().unsqueeze(-1)
    units = groups / step
    grid = scheme.grid
    if not grid.is_uniform:
        units = grid.table(device=groups.device)[torch.bucketize(units, grid.midpoints(groups.device))]
    elif shared.zero_point is None:
        units.round_().clamp_(grid.levels[0], grid.levels[-1])
    else:
        zero = shared.zero_point.float().unsqueeze(-1)
        units.round_().clamp_(min=-zero, max=2**grid.bits - 1 - zero)
    return (units * step).to(scheme.value_dtype).float(), units


def _power(error: Tensor, norm: float) -> Tensor:
    """Σ|error|^norm of each group."""
    return error.abs().pow(norm).sum(-1)
