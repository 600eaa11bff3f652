"""Refinement: the error never rises, and ends where no single code can lower it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.quantize.problems import correlated_gram, random_weight
from tests.tensors.test_scheme import with_remainder
from torch import Tensor

from fettle.methods.quantize import refine as module
from fettle.methods.quantize import sweep
from fettle.methods.quantize.refine import less_remainder, refine
from fettle.methods.quantize.round_to_nearest import round_to_nearest
from fettle.tensors import FactoredScheme, QuantizedTensor, Scheme, SparseScheme, uniform
from fettle.tensors.grid import from_levels

GROUPS = Scheme(grid=uniform(3), granularity="group", group_size=16, zero_point=True, scale_dtype="bfloat16")
SCHEMES = [
    GROUPS,
    replace(GROUPS, zero_point=False),
    replace(GROUPS, group_size=200),
    replace(GROUPS, granularity="channel", group_size=None, scale_dtype="float32"),
    replace(GROUPS, granularity="tensor", group_size=None),
    Scheme(grid=from_levels("bent", [-1.0, -0.4, 0.0, 0.7]), granularity="group", group_size=16),
]


def exact_error(weight: Tensor, found: QuantizedTensor, gram: Tensor, damping: float) -> float:
    difference = weight.double() - found.dequantize().double()
    damped = gram.double() + damping * torch.eye(len(gram), dtype=torch.float64)
    return float(((difference @ damped) * difference).sum())


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.describe())
@pytest.mark.parametrize("damping", [0.0, 5.0])
def test_no_pass_raises_the_error(scheme: Scheme, damping: float) -> None:
    weight, gram = random_weight(6, 300), correlated_gram(300)
    found = round_to_nearest(weight, scheme)
    errors = [exact_error(weight, found, gram, damping)]
    for _ in range(4):
        found = refine(found, weight, gram, damping=damping, passes=1)
        errors.append(exact_error(weight, found, gram, damping))
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[1] < 0.8 * errors[0]


def test_it_ends_where_no_single_code_is_better() -> None:
    weight, gram = random_weight(3, 40), correlated_gram(40)
    found = refine(round_to_nearest(weight, GROUPS), weight, gram, damping=1.0, passes=100)
    least = exact_error(weight, found, gram, 1.0)
    for row in range(3):
        for column in range(40):
            for code in range(8):
                codes = found.codes.clone()
                codes[row, column] = code
                assert exact_error(weight, replace(found, codes=codes), gram, 1.0) >= least * (1 - 1e-6)


def test_blocks_and_tiles_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = random_weight(7, 90), correlated_gram(90)
    start = round_to_nearest(weight, replace(GROUPS, granularity="tensor", group_size=None))
    first = refine(start, weight, gram, damping=1.0, passes=3)
    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(sweep, "ROW_TILE", 2)
    monkeypatch.setattr(sweep, "TILE_WEIGHTS", 0)
    assert torch.equal(refine(start, weight, gram, damping=1.0, passes=3).codes, first.codes)


def test_no_pass_is_no_change() -> None:
    weight = random_weight(3, 40)
    start = round_to_nearest(weight, GROUPS)
    assert refine(start, weight, torch.eye(40), damping=0.0, passes=0) is start


@pytest.mark.parametrize("remainder", [SparseScheme(share=0.03), FactoredScheme(rank=3)])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float8_e4m3fn"])
def test_what_stands_beside_the_codes_is_left_alone_and_counted(remainder: Any, scale_dtype: str) -> None:
    scheme = replace(GROUPS, zero_point=False, scale_dtype=scale_dtype)
    weight, gram = random_weight(6, 70), correlated_gram(70)
    start = with_remainder(round_to_nearest(weight, scheme), remainder)
    assert start.remainder is not None
    whole = weight + less_remainder(torch.zeros(6, 70), start.remainder).neg()  # the weight that these codes stand for
    found = refine(start, whole, gram, damping=0.0, passes=3)
    assert found.remainder is start.remainder
    assert found.scheme == start.scheme and found.tensor_scale is start.tensor_scale
    assert exact_error(whole, found, gram, 0.0) < 0.8 * exact_error(whole, start, gram, 0.0)
    alone = refine(replace(start, remainder=None, scheme=scheme), weight, gram, damping=0.0, passes=3)
    assert exact_error(whole, found, gram, 0.0) == pytest.approx(exact_error(weight, alone, gram, 0.0), rel=0.01)
