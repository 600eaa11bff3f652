"""The solver against trying everything."""

from __future__ import annotations

import itertools
import random

import pytest

from fettle.search.knapsack import Option, solve


def by_brute_force(groups: list[list[Option]], limit: int) -> tuple[float, int] | None:
    """Least cost, and the least size that it can be had for."""
    found = [
        (sum(option.cost for option in picks), sum(option.size for option in picks))
        for picks in itertools.product(*groups)
        if sum(option.size for option in picks) <= limit
    ]
    return min(found) if found else None


def totals(groups: list[list[Option]], picks: list[int]) -> tuple[float, int]:
    chosen = [group[pick] for group, pick in zip(groups, picks, strict=True)]
    return sum(option.cost for option in chosen), sum(option.size for option in chosen)


@pytest.mark.parametrize("seed", range(60))
def test_no_choice_is_cheaper(seed: int) -> None:
    draw = random.Random(seed)
    unit = draw.choice([1, 7, 4096])
    groups = [
        [Option(unit * draw.randint(0, 12), float(draw.randint(0, 9))) for _ in range(draw.randint(1, 4))]
        for _ in range(draw.randint(1, 6))
    ]
    largest = sum(max(option.size for option in group) for group in groups)
    for limit in {0, largest // 3, largest // 2, largest, largest + 1}:
        picks, expected = solve(groups, limit), by_brute_force(groups, limit)
        assert (picks is None) == (expected is None)
        if picks is not None:
            assert totals(groups, picks) == expected


@pytest.mark.parametrize("seed", range(10))
def test_costs_of_any_scale(seed: int) -> None:
    draw = random.Random(seed)
    groups = [
        [Option(2**bits * width, 1e-7 * draw.random() * 4.0**-bits) for bits in (2, 3, 4, 8)]
        for width in (draw.randint(900, 5000) for _ in range(5))
    ]
    limit = sum(group[2].size for group in groups)
    picks, expected = solve(groups, limit), by_brute_force(groups, limit)
    assert picks is not None and expected is not None
    assert totals(groups, picks)[0] == pytest.approx(expected[0], rel=1e-12)


def test_a_model_of_many_layers_takes_no_time() -> None:
    draw = random.Random(0)
    groups = [
        [Option(bits * 2**18 + 16 * draw.randint(0, 3), draw.random() * 4.0**-bits) for bits in (2, 3, 4, 5, 6, 8)]
        for _ in range(400)
    ]
    picks = solve(groups, 400 * 2**18 * 4)
    assert picks is not None
    assert totals(groups, picks)[1] <= 400 * 2**18 * 4


def test_nothing_to_choose_and_nothing_that_fits() -> None:
    assert solve([], 0) == []
    assert solve([[Option(5, 1.0)]], 4) is None
    assert solve([[Option(5, 1.0), Option(3, 2.0)]], 4) == [1]
