"""Grids by name: against torch's own float types, the published NF4 table, and counting."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from fettle.errors import RecipeError
from fettle.tensors.levels import GridName, named, weight_sharing_ratio

# Table of appendix E of QLoRA, https://arxiv.org/abs/2305.14314
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def finite_values(dtype: torch.dtype) -> list[float]:
    patterns = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype).float()
    return sorted({float(value) for value in patterns if math.isfinite(value)})


@pytest.mark.parametrize(("name", "dtype"), [("float", torch.float8_e4m3fn), ("float_e5m2", torch.float8_e5m2)])
def test_eight_bit_floats_are_torchs_finite_numbers(name: str, dtype: torch.dtype) -> None:
    assert list(named(name, 8).levels) == finite_values(dtype)


def test_small_floats_are_those_of_the_mx_standard() -> None:
    four = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert list(named("float", 4).levels) == [-value for value in four[:0:-1]] + four
    six = named("float", 6).levels
    assert (len(six), six[-1], six[32]) == (63, 7.5, 0.125)


def test_normal_float_is_the_published_table() -> None:
    assert named("normal_float").levels == pytest.approx(NF4, abs=2e-7)


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_float_of_other_widths(bits: int) -> None:
    levels = named("normal_float", bits).levels
    assert (len(levels), levels[0], levels[-1]) == (2**bits, -1.0, 1.0)
    assert 0.0 in levels


def test_powers_of_two() -> None:
    assert named("power_of_two", 3).levels == (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
    for bits in range(2, 9):
        levels = named("power_of_two", bits).levels
        assert len(levels) == 2**bits - 1
        assert all(math.frexp(abs(level))[0] == 0.5 for level in levels if level)


@pytest.mark.parametrize("bits", range(3, 9))
def test_additive_powers_of_two_are_sums_of_two_powers(bits: int) -> None:
    levels = named("additive_power_of_two", bits).levels
    assert len(levels) <= 2**bits
    assert levels[-1] == 1.0
    unit = min(level for level in levels if level > 0)
    powers = {0.0, *(2.0**k for k in range(-40, 8))}
    # 1 stands for the largest sum, which is either one power or 1 + 1/2
    for top in (1.0, 1.5):
        sums = [level * top for level in levels if level > 0]
        if all(any(abs(value - power) in powers for power in powers) for value in sums):
            break
    else:
        pytest.fail(f"{levels} with the unit {unit}")
    # finer than plain powers in the upper half: that is what the second term is for
    if bits > 3:
        assert sum(level > 0.5 for level in levels) > sum(level > 0.5 for level in named("power_of_two", bits).levels)


def test_the_coarse_ones() -> None:
    assert (named("ternary").levels, named("ternary").bits) == ((-1.0, 0.0, 1.0), 2)
    assert (named("binary").levels, named("binary").bits) == ((-1.0, 1.0), 1)


def test_every_grid_has_a_default_width() -> None:
    for name in get_args(GridName):
        grid = named(name)
        assert grid.name == name
        assert grid.level_count <= 2**grid.bits


@pytest.mark.parametrize(
    ("name", "bits", "allowed"),
    [
        ("float", 5, "4, 6, 8"),
        ("ternary", 4, "2"),
        ("binary", 2, "1"),
        ("normal_float", 1, "2, 3"),
        ("float", True, "4"),
    ],
)
def test_widths_that_cannot_be(name: str, bits: int, allowed: str) -> None:
    with pytest.raises(RecipeError, match=rf"bits={bits}.*grid '{name}'; allowed: {allowed}"):
        named(name, bits)


def test_a_near_name_is_offered() -> None:
    with pytest.raises(RecipeError, match="ternary"):
        named("ternery")


def test_weight_sharing_ratio_by_hand() -> None:
    # 16 weights of 32 bits that share 4: 16·2 bits of codes and 4·32 of values, the example of Deep Compression
    assert weight_sharing_ratio(16, 4) == pytest.approx(3.2)
