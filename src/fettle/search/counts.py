"""Whole numbers that add up: how many weights each linear loses, when all together must lose an exact number.

cheapest_counts   curves of cost over count → counts with the least sum of costs
settle            wanted counts → counts in whole units, within bounds, with the exact sum
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

HALVINGS = 100


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What losing so many weights costs one linear: ascending counts from 0, and a cost for each."""

    counts: tuple[float, ...]
    costs: tuple[float, ...]

    def hull(self) -> list[tuple[float, float]]:
        """The lower convex hull, as (count, cost) from the first count to the last."""
        kept: list[tuple[float, float]] = []
        for point in zip(self.counts, self.costs, strict=True):
            while len(kept) > 1 and _slope(kept[-2], kept[-1]) >= _slope(kept[-1], point):
                kept.pop()
            kept.append(point)
        return kept


def _slope(first: tuple[float, float], second: tuple[float, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])


def cheapest_counts(curves: Sequence[Curve], total: float) -> list[float]:
    """Counts that add up to `total` (or to all that the curves reach) with the least sum of hull costs.

    The segments of all hulls are taken by their slopes; a convex curve's come in their own order by themselves.
    """
    segments = sorted(
        (_slope(first, second), place, second[0] - first[0])
        for place, curve in enumerate(curves)
        for first, second in itertools.pairwise(curve.hull())
    )
    counts, left = [0.0] * len(curves), float(total)
    for _, place, length in segments:
        taken = min(length, left)
        counts[place] += taken
        left -= taken
    return counts


def settle(wanted: Sequence[float], limits: Sequence[tuple[int, int]], total: int) -> list[int]:
    """Counts near `wanted`, multiples of each unit from 0 to each largest, that add up to `total`.

    Where units are larger than 1 the sum misses `total` by less than the smallest unit that still fits. All wanted
    counts are moved by the same share of their largest until they fit; what whole units leave goes to the largest
    fractions, earlier ones first.

    Args:
        wanted: one for each, any number.
        limits: (unit, largest), the largest a multiple of the unit.
        total: what they should add up to; cut to what the limits can hold.
    """
    total = min(total, sum(largest for _, largest in limits))

    def moved(by: float) -> list[float]:
        pairs = zip(wanted, limits, strict=True)
        return [min(max(count + by * largest, 0.0), float(largest)) for count, (_, largest) in pairs]

    low, high = -1.0 - max(1.0, _excess(wanted, limits)), 1.0 + max(1.0, _excess(wanted, limits))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(moved(middle)) < total else (low, middle)
    exact = moved(high)
    counts = [int(count // unit) * unit for count, (unit, _) in zip(exact, limits, strict=True)]
    fractions = [(counts[i] - exact[i]) / limits[i][0] for i in range(len(counts))]  # the most missing first
    for place in sorted(range(len(counts)), key=lambda i: (fractions[i], i)) * 2:
        unit, largest = limits[place]
        if unit <= total - sum(counts) and counts[place] + unit <= largest:
            counts[place] += unit
    return counts


def _excess(wanted: Sequence[float], limits: Sequence[tuple[int, int]]) -> float:
    """How far any wanted count lies beyond its largest, in shares of it."""
    return max((abs(count) / max(1, largest) for count, (_, largest) in zip(wanted, limits, strict=True)), default=0.0)
