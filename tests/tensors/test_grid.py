"""Grids: the levels, what cannot be one, round trips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fettle.errors import RecipeError
from fettle.tensors.grid import Grid, from_levels, learned, uniform


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
    "levels", [(), (0.0,), (0.0, 2.0, 1.0, 3.0), (0.0, 1.0, 2.0, float("inf")), tuple(range(257)), ("a", "b")]
)
def test_levels_that_are_no_grid(levels: Any) -> None:
    with pytest.raises(RecipeError, match="ascending"):
        from_levels("odd", levels)


def test_fewer_levels_than_codes() -> None:
    grid = from_levels("three", (-1.0, 0.0, 2.0))
    assert (grid.bits, grid.level_count) == (2, 3)
    assert grid.table().tolist() == [-1.0, 0.0, 2.0, 2.0]
    assert grid.midpoints().tolist() == [-0.5, 1.0]
    assert Grid.from_dict(grid.to_dict()) == grid
    with pytest.raises(RecipeError, match="in 1 bits"):
        from_levels("three", (-1.0, 0.0, 2.0), bits=1)


@pytest.mark.parametrize("name", ["uniform", "learned"])
def test_names_that_are_taken(name: str) -> None:
    with pytest.raises(RecipeError, match=name):
        from_levels(name, (0.0, 1.0, 2.0, 3.0))


@pytest.mark.parametrize("bits", [0, 9, True, "2"])
def test_impossible_bits_of_learned_levels(bits: Any) -> None:
    with pytest.raises(RecipeError, match=r"bits=.*allowed with learned levels: integers 1 to 8"):
        learned(bits)
    assert Grid.from_dict(learned(3).to_dict()) == learned(3)
