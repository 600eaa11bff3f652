"""Codes times codes against the product of the values that they stand for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tensors.test_scheme import random_quantized

from fettle.errors import UsageError
from fettle.kernels import integers
from fettle.kernels.integers import integer_linear
from fettle.kernels.reference import reference_linear
from fettle.tensors import Activations, Scheme, uniform
from fettle.tensors.activations import InputScale

STATIC = Activations(dynamic=False, granularity="tensor", zero_point=True)
APART = replace(STATIC, outliers=0.01)


@pytest.mark.parametrize("shape", [(13, 172), (1, 1), (7, 33), (64, 65)], ids=str)
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize(("granularity", "group_size"), [("group", 32), ("channel", None), ("tensor", None)])
@pytest.mark.parametrize(
    "activations",
    [
        Activations(),
        Activations(zero_point=True),
        Activations(bits=4, granularity="tensor", zero_point=True),
        STATIC,
        APART,
    ],
    ids=lambda a: a.describe(),
)
def test_integers_give_what_values_give(
    shape: tuple[int, int],
    zero_point: bool,
    granularity: Any,
    group_size: int | None,
    activations: Activations,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheme = Scheme(
        grid=uniform(8), granularity=granularity, group_size=group_size, zero_point=zero_point, activations=activations
    )
    weight = random_quantized(scheme, shape)
    if scheme.has_input_scale:
        weight = replace(weight, input_scale=InputScale.spanning(-1.0, 1.5, activations, torch.float32))
    inputs, bias = torch.randn(2, 5, shape[1], generator=torch.Generator().manual_seed(1)) + 0.3, torch.ones(shape[0])
    state = weight.to_state("int-quantized")
    expected = reference_linear("int-quantized")(inputs, state, scheme, bias)
    for pieces in (1 << 16, 20):
        monkeypatch.setattr(integers, "EXACT_COLUMNS", pieces)
        found = integer_linear(inputs, state, scheme, bias)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_largest_sums_are_exact() -> None:
    columns = 1 << 16
    codes, weight = torch.full((1, columns), -128, dtype=torch.int8), torch.full((1, columns), -128, dtype=torch.int8)
    sums = integers._centred(codes, torch.zeros(1, 1).long(), weight, torch.zeros(1).long())
    assert int(sums) == 128 * 128 * columns


def test_inputs_as_they_are_are_refused() -> None:
    scheme = Scheme(grid=uniform(8), granularity="channel")
    state = random_quantized(scheme, (3, 4)).to_state("int-quantized")
    with pytest.raises(UsageError, match="needs a scheme with activations"):
        integer_linear(torch.randn(2, 4), state, scheme, None)
