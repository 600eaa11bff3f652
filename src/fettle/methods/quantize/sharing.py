"""What each group shares, by the scheme: a scale, a scale and a zero point, or a table of learned levels."""

from __future__ import annotations

from torch import Tensor, ones

from fettle.methods.quantize.learned_levels import fit_levels
from fettle.methods.quantize.range_search import search_ranges
from fettle.methods.quantize.ranges import in_groups, range_ends, spanning
from fettle.tensors.quantized import row_tiles
from fettle.tensors.scales import Shared, stack
from fettle.tensors.scheme import Scheme

COARSE_LEVELS = 3  # of so few levels the ends say nothing about the weights between them


def choose_shared(weight: Tensor, scheme: Scheme, *, clip: str, importance: Tensor | None = None) -> Shared:
    """Scales and zero points, or levels, of every group of weight [out, in], tile by tile of rows.

    Args:
        weight: [out, in].
        scheme: what shares a scale, grid, types.
        clip: "none" for the full range, "search" for the range with the least error; ternary and binary grids are
            always searched, and learned levels have no range.
        importance: float32 [in], how much each column's error counts in the search; None for equal.

    Raises:
        NonFiniteError: NaN or infinity in the weight, or a scale beyond its type.
    """
    shape = (weight.shape[0], weight.shape[1])
    tiles = [slice(None)] if scheme.granularity == "tensor" else row_tiles(*shape)
    return stack([_choose(weight[rows], scheme, clip, importance) for rows in tiles])


def _choose(tile: Tensor, scheme: Scheme, clip: str, importance: Tensor | None) -> Shared:
    groups = in_groups(tile, scheme)
    if scheme.grid.is_learned:
        return fit_levels(groups, scheme, column_importance(importance, tile, scheme))
    if clip == "search" or scheme.grid.level_count <= COARSE_LEVELS:
        scale, zero_point = search_ranges(groups, scheme, column_importance(importance, tile, scheme))
    else:
        scale, zero_point = spanning(*range_ends(groups), scheme)
    return Shared(scale=scale, zero_point=zero_point)


def column_importance(importance: Tensor | None, tile: Tensor, scheme: Scheme) -> Tensor:
    """Importance of each column in the shape of the groups, zero where a short group was filled."""
    if importance is None:
        importance = ones(tile.shape[1], device=tile.device)
    return in_groups(importance.expand(tile.shape if scheme.granularity == "tensor" else (1, tile.shape[1])), scheme)
