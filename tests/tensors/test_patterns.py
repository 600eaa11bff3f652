"""Patterns: what they mean, how many they prune, what cannot be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.errors import RecipeError
from fettle.tensors.patterns import parse_pattern


@pytest.mark.parametrize(
    ("text", "shape", "sparsity", "pruned"),
    [
        ("layer", (7, 172), 0.5, 602),
        ("layer", (3, 3), 0.5, 4),  # 4.5 to the even neighbour
        ("layer", (1, 1), 0.9, 0),  # one always stays
        ("row", (7, 33), 0.5, 7 * 16),
        ("row", (5, 20), 0.95, 5 * 19),
        ("2:4", (3, 8), 0.5, 12),
        ("4:8", (3, 16), 0.5, 24),
        ("1:4", (2, 8), 0.75, 12),
        ("4x4", (8, 8), 0.5, 32),
        ("2x16", (4, 48), 0.4, 2 * 32),
    ],
)
def test_counts_are_exact(text: str, shape: tuple[int, int], sparsity: float, pruned: int) -> None:
    assert parse_pattern(text).pruned_count(shape, sparsity) == pruned
    assert parse_pattern(text).spelled() == text


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), sparsity=st.floats(0, 0.999))
def test_the_count_is_the_nearest_and_something_stays(rows: int, columns: int, sparsity: float) -> None:
    count = parse_pattern("layer").pruned_count((rows, columns), sparsity)
    assert 0 <= count < rows * columns
    assert abs(count - sparsity * rows * columns) <= (0.5 if count < rows * columns - 1 else 1)


@pytest.mark.parametrize("text", ["", "4:2", "4:4", "0:4", "1x1", "0x4", "rows", "2:4:8", "2048x1", " 2:4"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"allowed: layer, row, N:M"):
        parse_pattern(text)


def test_a_shape_that_a_pattern_does_not_divide_is_refused_with_the_numbers() -> None:
    with pytest.raises(RecipeError, match=r"3:4 needs inputs in multiples of 4, and a weight of 5 x 6 has 6"):
        parse_pattern("3:4").check_shape((5, 6))
    with pytest.raises(RecipeError, match=r"rows in multiples of 4"):
        parse_pattern("4x2").check_shape((6, 6))
