"""Counts that add up: against brute force over all splits, and by their properties."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.search.counts import Curve, cheapest_counts, settle


def test_the_cheapest_split_is_that_of_all_splits() -> None:
    curves = [
        Curve(counts=(0, 1, 2, 3), costs=(0, 1, 4, 9)),
        Curve(counts=(0, 1, 2, 3), costs=(0, 0.5, 1.5, 8)),
        Curve(counts=(0, 1, 2, 3), costs=(0, 3, 6, 9)),
    ]
    for total in range(10):
        found = cheapest_counts(curves, total)
        assert sum(found) == total
        best = min(
            sum(curve.costs[count] for curve, count in zip(curves, split, strict=True))
            for split in itertools.product(range(4), repeat=3)
            if sum(split) == total
        )
        assert sum(curve.costs[int(count)] for curve, count in zip(curves, found, strict=True)) == pytest.approx(best)


def test_the_hull_leaves_out_what_is_above_it() -> None:
    assert Curve(counts=(0, 1, 2), costs=(0, 5, 4)).hull() == [(0, 0), (2, 4)]


@given(
    wanted=st.lists(st.integers(-50, 1200).map(lambda tenths: tenths / 10), min_size=1, max_size=5),
    unit=st.sampled_from([1, 1, 3]),
    share=st.floats(0, 1),
)
def test_counts_settle_within_their_limits(wanted: list[float], unit: int, share: float) -> None:
    limits = [(unit, 99)] * len(wanted)
    total = round(share * 99 * len(wanted))
    found = settle(wanted, limits, total)
    assert all(0 <= count <= 99 and count % unit == 0 for count in found)
    assert 0 <= total - sum(found) < unit


def test_what_fits_already_stays() -> None:
    assert settle([10.0, 20.0, 30.0], [(1, 50)] * 3, 60) == [10, 20, 30]
    assert settle([10.4, 20.4, 30.2], [(1, 50)] * 3, 61) == [11, 20, 30]
