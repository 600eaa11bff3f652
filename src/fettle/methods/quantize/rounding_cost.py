"""Which weights rounding costs most: each weight's own error, and what a group gains when it loses an end.

    own      (w - v)² / [H⁻¹]_jj           v the nearest value in the full range of its group; what is left of the error
                                           once other columns have made up for it
    end      Σ over the group, before - after     for the largest and the smallest weight of each group, which the range
                                           of the others then no longer has to reach

The second is SpQR's leave-one-out (Dettmers et al. 2023, section 3): an end of a range is itself rounded exactly, and
yet it is what the whole group pays for. An outlier may hide behind another, so the places are taken in PASSES parts,
each seen without those before. Cost: three roundings of the weight a pass, tile by tile of rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fettle.methods.quantize.learned_levels import fit_levels
from fettle.methods.quantize.range_search import search_ranges
from fettle.methods.quantize.ranges import in_groups, range_ends, spanning
from fettle.methods.quantize.sharing import COARSE_LEVELS, column_importance
from fettle.tensors.quantized import dequantize_rows, quantize_rows, row_tiles
from fettle.tensors.scales import Shared
from fettle.tensors.scheme import Scheme

PASSES = 4
TINY = 1e-12  # squares of weights below this would vanish


def costliest(weight: Tensor, count: int, scheme: Scheme, inverse_diagonal: Tensor) -> Tensor:
    """The places (row · in + column) of `count` weights that rounding in `scheme` costs most, int64, ascending.

    Args:
        weight: float32 [out, in], finite.
        count: at most out · in.
        scheme: of the codes.
        inverse_diagonal: float32 [in], of the inverse of the inputs' gram.
    """
    size = weight.abs().max()
    left = weight / size if 0 < float(size) < TINY else weight.clone()
    taken = torch.zeros(left.shape, dtype=torch.bool)
    for part in range(PASSES):
        cost = rounding_costs(left, scheme, inverse_diagonal).masked_fill_(taken, -1)
        chosen = largest(cost, count * (part + 1) // PASSES - count * part // PASSES)
        taken.view(-1)[chosen] = True
        left.view(-1)[chosen] = 0  # zero is in every range
    return taken.view(-1).nonzero()[:, 0]


def largest(cost: Tensor, count: int) -> Tensor:
    """The places of the `count` largest costs, int64, ascending."""
    return torch.topk(cost.flatten(), count, sorted=False).indices.sort().values


def rounding_costs(weight: Tensor, scheme: Scheme, inverse_diagonal: Tensor) -> Tensor:
    """By how much the weighted error of all falls where one weight is kept apart, float32 [out, in]."""
    if scheme.has_tensor_scale:  # its small scales count in units that are not chosen yet
        scheme = replace(scheme, scale_dtype="float32")
    importance = inverse_diagonal.mean() / inverse_diagonal
    tiles = [slice(None)] if scheme.granularity == "tensor" else row_tiles(*weight.shape)
    return torch.cat([_tile_costs(weight[rows], scheme, importance) for rows in tiles])


def _tile_costs(tile: Tensor, scheme: Scheme, importance: Tensor) -> Tensor:
    groups, weights = in_groups(tile, scheme), column_importance(importance, tile, scheme)
    before = _errors(groups, scheme, weights)
    cost = before.clone()
    if not scheme.grid.is_learned:  # levels do not hang on the ends
        total = before.sum(-1, keepdim=True)
        for end in (groups.argmax(-1, keepdim=True), groups.argmin(-1, keepdim=True)):
            after = _errors(groups.scatter(-1, end, 0.0), scheme, weights).sum(-1, keepdim=True)
            cost.scatter_(-1, end, torch.maximum(total - after, cost.gather(-1, end)))
    return cost.reshape(len(tile), -1)[:, : tile.shape[1]]


def _errors(groups: Tensor, scheme: Scheme, weights: Tensor) -> Tensor:
    """Weighted squared rounding errors of groups [rows, groups, width] in their full ranges."""
    rows, count, width = groups.shape
    if scheme.grid.is_learned:
        shared = fit_levels(groups, scheme, weights)
    else:
        coarse = scheme.grid.level_count <= COARSE_LEVELS
        scale, zero_point = search_ranges(groups, scheme, weights) if coarse else spanning(*range_ends(groups), scheme)
        shared = Shared(scale=scale, zero_point=zero_point)
    one_each = Shared(
        scale=shared.scale.reshape(-1, 1),
        zero_point=None if shared.zero_point is None else shared.zero_point.reshape(-1, 1),
        levels=None if shared.levels is None else shared.levels.reshape(rows * count, 1, -1),
    )
    alone = replace(scheme, granularity="channel", group_size=None)
    flat = groups.reshape(-1, width)
    values = dequantize_rows(quantize_rows(flat, one_each, alone), one_each, alone).float()
    return (flat - values).square_().reshape(groups.shape).mul_(weights)
