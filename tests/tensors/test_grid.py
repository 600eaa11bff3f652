"""Grids: the levels, what cannot be one, round trips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fettle.errors import RecipeError
from fettle.tensors.grid import Grid, from_levels, uniform


@given(bits=st.integers(2, 8))
def test_uniform_levels_are_the_signed_integers(bits: int) -> None:
    grid = uniform(bits)
    assert grid.levels == tuple(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert grid.is_uniform
    assert Grid.from_dict(grid.to_dict()) == grid
    assert torch.equal(grid.table(), torch.tensor(grid.levels))


@pytest.mark.parametrize("bits", [1, 9, True, 4.0, "4", None])
def test_impossible_bits(bits: Any) -> None:
    with pytest.raises(RecipeError, match=r"bits=.*allowed: integers 2 to 8"):
        uniform(bits)


def test_other_grids_are_data() -> None:
    grid = from_levels("powers", [-1.0, -0.5, 0.5, 1.0])
    assert (grid.bits, grid.is_uniform) == (2, False)
    assert grid.midpoints().tolist() == [-0.75, 0.0, 0.75]
    assert Grid.from_dict(grid.to_dict()) == grid


@pytest.mark.parametrize(
    "levels", [(), (0.0, 1.0, 2.0), (0.0, 2.0, 1.0, 3.0), (0.0, 1.0, 2.0, float("inf")), (0.0, 1.0)]
)
def test_levels_that_are_no_grid(levels: tuple[float, ...]) -> None:
    with pytest.raises(RecipeError, match="ascending"):
        from_levels("odd", levels)


def test_the_name_uniform_is_taken() -> None:
    with pytest.raises(RecipeError, match="uniform"):
        from_levels("uniform", (0.0, 1.0, 2.0, 3.0))
