"""One option for each group, so that all sizes together fit and all costs together are least: solved exactly.

The multiple-choice knapsack problem. Groups are added one by one; what is kept is the frontier: the pairs (size, cost)
of which no other is smaller and cheaper at once. Two cuts keep it short and lose no optimum:

    feasibility   size + the smallest sizes of the groups to come must fit
    bound         cost + the least that the groups to come can cost by Lagrange's relaxation must not exceed the cost of
                  a choice that is known to fit:  Σ min_o (cost_o + λ·size_o) - λ·(limit - size),  λ by bisection

Sizes are integers, and those of a model's matrices have a large common divisor, so the frontier is short anyway: it
has no more entries than there are different sums of sizes. Dynamic programming over bytes would need as many cells as
that divisor allows, whether they can be reached or not. Of equally good choices the smallest wins, then the one that
comes first; floating-point sums run in the order of the groups.

Cost: groups · frontier · options, and one integer each to walk back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Sizes = NDArray[np.int64]
Costs = NDArray[np.float64]

Number = TypeVar("Number", int, float)

BISECTIONS = 100
SLACK = 1e-9  # of the known cost: rounding must not cut the optimum off


@dataclass(frozen=True)
class Option:
    """One way to store a group."""

    size: int
    cost: float


def solve(groups: Sequence[Sequence[Option]], limit: int) -> list[int] | None:
    """The index of the chosen option of each group; None where even the smallest do not fit."""
    if not groups:
        return []
    sizes = [np.array([option.size for option in group], dtype=np.int64) for group in groups]
    costs = [np.array([option.cost for option in group], dtype=np.float64) for group in groups]
    smallest_rest = _rest([int(size.min()) for size in sizes])
    if smallest_rest[0] > limit:
        return None
    price, known = _price(sizes, costs, limit)
    relaxed_rest = _rest([float((cost + price * size).min()) for size, cost in zip(sizes, costs, strict=True)])
    ceiling = known + SLACK * abs(known)

    size, cost = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for place, (own_size, own_cost) in enumerate(zip(sizes, costs, strict=True)):
        all_sizes = (size[:, None] + own_size[None, :]).ravel()
        all_costs = (cost[:, None] + own_cost[None, :]).ravel()
        fits = all_sizes + smallest_rest[place + 1] <= limit
        bound = all_costs + relaxed_rest[place + 1] - price * (limit - all_sizes)
        kept = np.flatnonzero(fits & (bound <= ceiling))
        kept = kept[np.lexsort((kept, all_costs[kept], all_sizes[kept]))]
        kept = kept[_first_of_each_minimum(all_costs[kept])]
        trail.append((kept // len(own_size), kept % len(own_size)))
        size, cost = all_sizes[kept], all_costs[kept]
    return _walk_back(trail, int(np.argmin(cost)))


def _first_of_each_minimum(costs: Costs) -> NDArray[np.bool_]:
    """Where a cost is below all before it: the frontier of pairs that are sorted by size."""
    before = np.concatenate(([np.inf], np.minimum.accumulate(costs)[:-1]))
    found: NDArray[np.bool_] = costs < before
    return found


def _walk_back(trail: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], end: int) -> list[int]:
    chosen = []
    for parents, options in reversed(trail):
        chosen.append(int(options[end]))
        end = int(parents[end])
    return chosen[::-1]


def _rest(values: Sequence[Number]) -> list[Number]:
    """The sum of all values from each place on, and 0 behind the last."""
    sums: list[Number] = [values[0] * 0]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return sums[::-1]


def _price(sizes: Sequence[Sizes], costs: Sequence[Costs], limit: int) -> tuple[float, float]:
    """The price of a byte at which the cheapest options about fit, and the cost of the best such choice that fits."""

    def at(price: float) -> tuple[int, float]:
        picks = [int(np.lexsort((size, cost + price * size))[0]) for size, cost in zip(sizes, costs, strict=True)]
        return (
            sum(int(size[pick]) for size, pick in zip(sizes, picks, strict=True)),
            float(sum(cost[pick] for cost, pick in zip(costs, picks, strict=True))),
        )

    total, known = at(0.0)
    if total <= limit:
        return 0.0, known
    smallest = [int(np.lexsort((cost, size))[0]) for size, cost in zip(sizes, costs, strict=True)]
    known = float(sum(cost[pick] for cost, pick in zip(costs, smallest, strict=True)))
    low, high = 0.0, 1.0
    while at(high)[0] > limit and high < 1e300:
        high *= 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        total, cost = at(middle)
        if total <= limit:
            high, known = middle, min(known, cost)
        else:
            low = middle
    return high, known
