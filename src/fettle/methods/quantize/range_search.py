"""The range of each group with the least weighted squared error: shrink, round, refit.

    minimise over scale s, zero point z   Σ_i h_i (w_i - s·(level(c_i) - z))²,   c_i the nearest code for s and z

1. Shrink both ends of the full range by steps and keep the best (the `mse` option of GPTQ's code); with a zero point,
   then each end alone, as an outlier stands on one side.
2. Given the codes the error is quadratic in s: s = Σ h w q / Σ h q², q = level - z. Refit, round again, keep what is
   better; the alternation is Lloyd's, so the error only falls.

A candidate is kept only where it is better, with the scale as it will be stored. Cost: about 12 (with a zero point 20)
times 8 passes over the weights of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fettle.methods.quantize.ranges import range_ends, spanning, stored_scale
from fettle.tensors.scheme import Scheme

SHRINKS = {  # both ends together; where fewer levels make cutting off more worth it, further down
    1: (0.7, 0.5, 0.3),  # of two levels every scale gives the same codes, and the refit finds the best
    2: (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
    3: (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5),
}
FINE_SHRINKS = (0.98, 0.95, 0.92, 0.88, 0.84, 0.8, 0.7)  # from 4 bits on
END_SHRINKS = (0.92, 0.84, 0.7, 0.5)  # then each end alone, with a zero point
REFITS = 2


def search_ranges(groups: Tensor, scheme: Scheme, importance: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each group [rows, groups, width] with the least error that the search finds.

    Args:
        groups: as `in_groups` gives them.
        scheme: grid, zero point or none, scale type.
        importance: h ≥ 0, [1, groups, width] (or as `groups`); zero where a short group was filled.

    Returns:
        scale in the scheme's type and zero point uint8 or None, both [rows, groups].
    """
    low, high = range_ends(groups)
    best = _Best(groups, spanning(low, high, scheme), scheme, importance)
    kept_low, kept_high = low, high
    for shrink in SHRINKS.get(scheme.grid.bits, FINE_SHRINKS):
        better = best.keep_better_(spanning(low * shrink, high * shrink, scheme)).to(low.dtype)
        kept_low, kept_high = torch.lerp(kept_low, low * shrink, better), torch.lerp(kept_high, high * shrink, better)
    if scheme.zero_point:
        low, high = kept_low, kept_high
        for shrink in END_SHRINKS:
            better = best.keep_better_(spanning(low * shrink, high, scheme)).to(low.dtype)
            kept_low = torch.lerp(kept_low, low * shrink, better)
        for shrink in END_SHRINKS:
            best.keep_better_(spanning(kept_low, high * shrink, scheme))
    for _ in range(REFITS):
        best.keep_better_((best.refitted(), best.zero_point))
    return best.scale, best.zero_point


class _Best:
    """The best scale and zero point so far of each group, and the error with them."""

    def __init__(self, groups: Tensor, start: tuple[Tensor, Tensor | None], scheme: Scheme, importance: Tensor) -> None:
        self.groups, self.scheme, self.importance = groups, scheme, importance
        self.scale, self.zero_point = start
        self.error, _ = _error(groups, *start, scheme, importance)

    def keep_better_(self, tried: tuple[Tensor, Tensor | None]) -> Tensor:
        """Takes what is tried where its error is less; says where, [rows, groups]."""
        error, _ = _error(self.groups, *tried, self.scheme, self.importance)
        better = error < self.error
        self.scale = torch.where(better, tried[0], self.scale)
        if self.zero_point is not None and tried[1] is not None:
            self.zero_point = torch.where(better, tried[1], self.zero_point)
        self.error = torch.minimum(error, self.error)
        return better

    def refitted(self) -> Tensor:
        """The scale with the least error for the codes that the best one gives, as it will be stored."""
        _, units = _error(self.groups, self.scale, self.zero_point, self.scheme, self.importance)
        weighted = self.importance * units
        energy = (weighted * units).sum(-1)
        fitted = weighted.mul_(self.groups).sum(-1).div_(energy)
        usable = (energy > 0) & (fitted > 0) & torch.isfinite(fitted)
        return stored_scale(torch.where(usable, fitted, self.scale.float()), self.scheme)


def _error(
    groups: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme, importance: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted squared error [rows, groups] with nearest codes, and the chosen levels less zero, one a weight."""
    step = scale.float().unsqueeze(-1)
    units = groups / step
    grid = scheme.grid
    if not grid.is_uniform:
        units = grid.table(device=groups.device)[torch.bucketize(units, grid.midpoints(groups.device))]
    elif zero_point is None:
        units.round_().clamp_(grid.levels[0], grid.levels[-1])
    else:
        zero = zero_point.float().unsqueeze(-1)
        units.round_().clamp_(min=-zero, max=2**grid.bits - 1 - zero)
    error = (groups - units * step).square_().mul_(importance).sum(-1)
    return error, units
