"""Which channels go, given how much each is missed.

    layer     every group loses the same share of the width that it began with
    global    the channels that are missed least anywhere, until the share of all is gone; no group below `least`

Widths count from the original, so rounds that go to 30%, 60% and 80% leave what one of 80% would. A grouped convolution
loses the same positions in each of its groups, judged by the sum over them; a width is rounded down to a multiple where
one is asked. Of equal channels the first stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fettle.errors import RecipeError
from fettle.methods.filters.dependencies import ChannelGroup

Scope = Literal["layer", "global"]


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How much goes, and where from.

    Attributes:
        sparsity: the share of the original channels that goes.
        scope: from each group alike, or wherever they are missed least.
        least: the share of a group's original width that stays at least, where the scope is global.
        multiple: widths are multiples of this.
    """

    sparsity: float
    scope: Scope = "layer"
    least: float = 0.1
    multiple: int = 1


def widths_for(groups: Sequence[ChannelGroup], original: Mapping[str, int], shares: Shares) -> dict[str, int]:
    """The width of every group, where each loses the same share.

    Raises:
        RecipeError: a group would be left without filters.
    """
    return {group.name: _floor(group, original[group.name], 1 - shares.sparsity, shares.multiple) for group in groups}


def removed_channels(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    original: Mapping[str, int],
    shares: Shares,
) -> dict[str, list[int]]:
    """The positions that go from each group, ascending, by the group's name.

    Args:
        groups: as they are now.
        scores: float [size] for each, comparable across groups where the scope is global.
        original: the width that each group began with.
        shares: what is asked.

    Raises:
        RecipeError: a group would be left without filters, or so many cannot go.
    """
    folded = {group.name: scores[group.name].view(group.repeats, -1).sum(0) for group in groups}  # [positions]
    if shares.scope == "layer":
        widths = widths_for(groups, original, shares)
    else:
        widths = _global_widths(groups, folded, original, shares)
    removed = {}
    for group in groups:
        order = torch.sort(folded[group.name], descending=True, stable=True).indices
        gone = order[min(widths[group.name], group.size) // group.repeats :]
        positions = group.size // group.repeats
        removed[group.name] = sorted(int(p) + part * positions for p in gone for part in range(group.repeats))
    return removed


def _global_widths(
    groups: Sequence[ChannelGroup], folded: Mapping[str, Tensor], original: Mapping[str, int], shares: Shares
) -> dict[str, int]:
    """The widths that keep the best channels of all groups together."""
    floors = {g.name: _at_least(g, original[g.name], shares) for g in groups}
    keep = round(sum(original[g.name] for g in groups) * (1 - shares.sparsity))
    if sum(floors.values()) > keep:
        raise RecipeError(
            f"prune_filters: sparsity={shares.sparsity:g} leaves {keep} channels, but least={shares.least:g} keeps "
            f"{sum(floors.values())}; ask for less, or give a smaller least"
        )
    ranked = []  # a channel beyond its group's floor: score, group, how many it stands for
    for number, group in enumerate(groups):
        values = torch.sort(folded[group.name], descending=True, stable=True).values / group.repeats
        for value in values[floors[group.name] // group.repeats :].tolist():
            ranked.append((-value, number, group.repeats))
    widths, left = dict(floors), keep - sum(floors.values())
    for _, number, count in sorted(ranked):
        if left >= count:
            widths[groups[number].name] += count
            left -= count
    step = shares.multiple
    return {g.name: min(g.size, max(_unit(g, step), widths[g.name] // _unit(g, step) * _unit(g, step))) for g in groups}


def _at_least(group: ChannelGroup, width: int, shares: Shares) -> int:
    unit = _unit(group, shares.multiple)
    return min(group.size, max(unit, math.ceil(width * shares.least / unit - 1e-9) * unit))


def _unit(group: ChannelGroup, multiple: int) -> int:
    return math.lcm(group.repeats, multiple)


def _floor(group: ChannelGroup, width: int, share: float, multiple: int) -> int:
    unit = _unit(group, multiple)
    found = math.floor(width * share / unit + 1e-9) * unit
    if found < 1:
        of = f" in multiples of {unit}" if unit > 1 else ""
        raise RecipeError(
            f"prune_filters: sparsity={1 - share:g} leaves no filter of the {width} of {group.name}{of}; ask for less"
            + (", or give a smaller multiple" if multiple > 1 else ", or use scope: global")
        )
    return found
