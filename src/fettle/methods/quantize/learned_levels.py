"""Learned levels: each tensor, row or group finds the 2^bits values that stand for its weights best.

    minimise over levels l_1 ≤ … ≤ l_k    Σ_i h_i · min_a (w_i - l_a)²

One-dimensional k-means (Lloyd 1957): every weight to its nearest level, every level to the weighted mean of its
weights; the error only falls. With h = 1 it is the weight sharing of Deep Compression (Han et al. 2016,
https://arxiv.org/abs/1510.00149); with h the gram's diagonal, the sensitivity-weighted k-means of SqueezeLLM (Kim et
al. 2023, https://arxiv.org/abs/2306.07629, which takes the Fisher diagonal).

Two starts, equal shares of the weights and equal steps of the range, and the better end of the two: Lloyd stays in the
valley in which it starts. A level that no weight is nearest to keeps its place.

Cost: at most 2 · PASSES passes over the weights of a tile, a binary search each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fettle.errors import NonFiniteError
from fettle.methods.quantize.ranges import NOT_FINITE
from fettle.tensors.scales import Shared
from fettle.tensors.scheme import Scheme

PASSES = 24


def fit_levels(groups: Tensor, scheme: Scheme, importance: Tensor) -> Shared:
    """Levels of each group [rows, groups, width] with little weighted squared error.

    Args:
        groups: as `in_groups` gives them, float32.
        scheme: a learned grid; its width, and the type of the levels.
        importance: h ≥ 0, [1, groups, width] (or as `groups`); zero where a short group was filled.

    Raises:
        NonFiniteError: NaN or infinity in a weight, or a level beyond its type.
    """
    if not bool(torch.isfinite(groups).all()):
        raise NonFiniteError(NOT_FINITE)
    rows, count, width = groups.shape
    flat = groups.reshape(rows * count, width)
    weights = importance.expand(rows, count, width).reshape(rows * count, width).clamp(min=0)
    # A group without importance still has weights to stand for.
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, torch.ones_like(weights))
    found = [lloyd(flat, weights, start) for start in _starts(flat, weights, 2**scheme.grid.bits)]
    errors = [weighted_error(flat, weights, levels) for levels in found]
    levels = torch.where((errors[1] < errors[0]).unsqueeze(1), found[1], found[0])
    stored = levels.to(scheme.value_dtype)
    if not bool(torch.isfinite(stored).all()):
        raise NonFiniteError(
            f"a level of {float(levels.abs().max()):.3g} is needed, which {scheme.scale_dtype} cannot hold; set "
            "scale_dtype: bfloat16 or float32"
        )
    return Shared(scale=stored.new_ones(rows, count), levels=stored.reshape(rows, count, -1))


def lloyd(values: Tensor, weights: Tensor, levels: Tensor, passes: int = PASSES) -> Tensor:
    """Levels [n, k], ascending, after at most `passes` passes over values and weights [n, width]."""
    for _ in range(passes):
        codes = nearest_levels(values, levels)
        mass = torch.zeros_like(levels).scatter_add_(1, codes, weights)
        sums = torch.zeros_like(levels).scatter_add_(1, codes, weights * values)
        moved = torch.where(mass > 0, sums / mass.clamp(min=torch.finfo(mass.dtype).tiny), levels).sort(dim=1).values
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels


def nearest_levels(values: Tensor, levels: Tensor) -> Tensor:
    """int64 [n, width]: the nearest of levels [n, k] for each of values [n, width]."""
    return torch.searchsorted(((levels[:, 1:] + levels[:, :-1]) / 2).contiguous(), values.contiguous())


def weighted_error(values: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """Σ h (w - nearest level)² of each row, [n]."""
    chosen = levels.gather(1, nearest_levels(values, levels))
    return (values - chosen).square_().mul_(weights).sum(1)


def _starts(values: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ascending levels [n, count] to start from: middles of equal shares of the weight, and of the range."""
    ordered, places = values.sort(dim=1)
    mass = weights.gather(1, places).cumsum(1)
    shares = (torch.arange(count, device=values.device) + 0.5) / count
    wanted = mass[:, -1:] * shares
    index = torch.searchsorted(mass.contiguous(), wanted.contiguous()).clamp_(max=values.shape[1] - 1)
    low, high = ordered[:, :1], ordered[:, -1:]
    return ordered.gather(1, index), low + (high - low) * shares
