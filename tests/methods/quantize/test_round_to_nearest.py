"""Round to nearest: the conventions, exactly; and every range that is hard."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.methods.quantize.problems import random_weight

from fettle.errors import NonFiniteError
from fettle.methods.quantize.errors import weight_error
from fettle.methods.quantize.round_to_nearest import round_to_nearest
from fettle.methods.quantize.sharing import choose_shared
from fettle.tensors import Scheme, uniform
from fettle.tensors.grid import from_levels


def scheme_of(bits: int, *, asymmetric: bool, group_size: int | None = 32, scale_dtype: str = "float32") -> Scheme:
    return Scheme(
        grid=uniform(bits),
        granularity="group" if group_size else "channel",
        group_size=group_size,
        zero_point=asymmetric,
        scale_dtype=scale_dtype,
    )


def test_asymmetric_convention() -> None:
    weight = torch.tensor([[-0.5, 0.25, 1.0, 0.0]])
    found = round_to_nearest(weight, scheme_of(4, asymmetric=True, group_size=4))
    assert found.scale.item() == pytest.approx(0.1)
    assert found.zero_point is not None and found.zero_point.item() == 5
    assert found.codes.tolist() == [[0, 7, 15, 5]]  # 2.5 rounds to even: 2 + 5


def test_symmetric_convention() -> None:
    weight = torch.tensor([[-0.7, 0.26, 0.36, 0.0]])
    found = round_to_nearest(weight, scheme_of(4, asymmetric=False, group_size=4))
    assert found.scale.item() == pytest.approx(0.1)
    assert found.zero_point is None
    assert found.codes.tolist() == [[1, 11, 12, 8]]


def test_a_range_always_holds_zero() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0]])
    found = round_to_nearest(weight, scheme_of(8, asymmetric=True, group_size=None))
    assert found.zero_point is not None and found.zero_point.item() == 0
    assert found.scale.item() == pytest.approx(3 / 255)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_codes_are_nearest_for_the_scale_as_it_is_stored(scale_dtype: str, asymmetric: bool) -> None:
    weight = random_weight(6, 70)
    found = round_to_nearest(weight, scheme_of(6, asymmetric=asymmetric, scale_dtype=scale_dtype))
    assert found.scale.dtype == getattr(torch, scale_dtype)
    step = found.scale.float().repeat_interleave(32, dim=1)[:, :70]
    zero = 32.0 if found.zero_point is None else found.zero_point.float().repeat_interleave(32, dim=1)[:, :70]
    inside = (found.codes > 0) & (found.codes < 63)
    miss = (weight - (found.codes.float() - zero) * step).abs()
    assert bool((miss <= step * 0.5001)[inside].all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("shape", [(7, 172), (5, 20), (4, 1)])
def test_searched_ranges_never_lose(bits: int, asymmetric: bool, shape: tuple[int, int]) -> None:
    weight = random_weight(*shape)
    scheme = scheme_of(bits, asymmetric=asymmetric)
    full, searched = round_to_nearest(weight, scheme), round_to_nearest(weight, scheme, clip="search")
    assert weight_error(weight, searched) <= weight_error(weight, full) * (1 + 1e-6)
    if bits <= 3 and shape == (7, 172):
        assert weight_error(weight, searched) < 0.96 * weight_error(weight, full)


def test_an_outlier_is_cut_off_where_that_pays() -> None:
    weight = torch.linspace(-1, 1, 256).repeat(2, 1)
    weight[:, 5] = 2.5
    scheme = scheme_of(3, asymmetric=True, group_size=256)
    assert weight_error(weight, round_to_nearest(weight, scheme, clip="search")) < 0.8 * weight_error(
        weight, round_to_nearest(weight, scheme)
    )


def test_importance_decides_whose_error_counts() -> None:
    weight = random_weight(4, 32)
    weight[:, 0] *= 6
    scheme = scheme_of(3, asymmetric=False)
    heavy, light = torch.ones(32), torch.ones(32)
    heavy[0], light[0] = 1000.0, 0.0
    with_first = choose_shared(weight, scheme, clip="search", importance=heavy).scale
    without = choose_shared(weight, scheme, clip="search", importance=light).scale
    assert bool((with_first > without).all())


def test_any_grid_searches_too() -> None:
    grid = from_levels("bent", [-1.0, -0.55, -0.3, -0.1, 0.0, 0.2, 0.5, 1.0])
    scheme = Scheme(grid=grid, granularity="group", group_size=32)
    weight = random_weight(5, 70)
    full, searched = round_to_nearest(weight, scheme), round_to_nearest(weight, scheme, clip="search")
    assert weight_error(weight, searched) <= weight_error(weight, full)


@pytest.mark.parametrize("clip", ["none", "search"])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-9, 3e-6, -1e-9, 5.0, -5.0])
def test_constant_groups(clip: str, asymmetric: bool, scale_dtype: str, value: float) -> None:
    weight = torch.full((2, 40), value)
    found = round_to_nearest(weight, scheme_of(4, asymmetric=asymmetric, scale_dtype=scale_dtype), clip=clip)
    values = found.dequantize()
    assert bool((found.scale > 0).all()) and bool(torch.isfinite(values).all())
    smallest = 5e-7 if scale_dtype == "float16" else 1e-37
    assert bool(((values - value).abs() <= max(abs(value) * 0.02, smallest)).all())


def test_zero_weights_stay_zero_beside_others() -> None:
    weight = random_weight(4, 64)
    weight[:, ::3] = 0
    for asymmetric in (False, True):
        values = round_to_nearest(weight, scheme_of(3, asymmetric=asymmetric), clip="search").dequantize()
        assert not values[:, ::3].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("clip", ["none", "search"])
def test_weights_that_are_no_numbers_are_refused(bad: float, clip: str) -> None:
    weight = random_weight(4, 64)
    weight[2, 33] = bad
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        round_to_nearest(weight, scheme_of(4, asymmetric=True), clip=clip)


def test_a_scale_beyond_its_type_is_refused_and_says_the_way_out() -> None:
    weight = torch.full((2, 8), 1e6)
    with pytest.raises(NonFiniteError, match=r"float16 ends at 6.55e\+04.*bfloat16"):
        round_to_nearest(weight, scheme_of(4, asymmetric=False, scale_dtype="float16"))
    round_to_nearest(weight, scheme_of(4, asymmetric=False, scale_dtype="bfloat16"))


def test_the_largest_range_of_float32_does_not_overflow() -> None:
    weight = torch.tensor([[-3e38, 3e38, 0.0, 1e38]])
    values = round_to_nearest(weight, scheme_of(4, asymmetric=True, group_size=None)).dequantize()
    assert bool(torch.isfinite(values).all())


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_one_scale_for_more_than_a_group(granularity: Any) -> None:
    weight = random_weight(5, 37)
    scheme = Scheme(grid=uniform(8), granularity=granularity, zero_point=True)
    found = round_to_nearest(weight, scheme)
    assert tuple(found.scale.shape) == scheme.scale_shape((5, 37))
    assert weight_error(weight, found) < 1e-3
