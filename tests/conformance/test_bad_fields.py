"""Values that no field should have: refused with a reason, or harmless. Over the registry, so new methods are asked."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import pytest
import torch
from tests.conformance.test_pruning_methods import statistics_of
from tests.methods.quantize.problems import random_weight

from fettle.errors import FettleError, RecipeError
from fettle.methods.registry import BASES, METHODS, MODEL_METHODS, NETWORK_METHODS, build, from_fields

NOT_NUMBERS = [float("nan"), float("inf"), -float("inf"), "", "x", [], {}, b"2", 2 + 1j]
ODD_NUMBERS = [-1, -0.5, 0, 1.5, 3, 10**9, 2**63, True, None]
ODD_WORDS = ["4:2", "0:4", "0x4", "2000x1", "GROUP"]
EVERYWHERE = {**METHODS, **MODEL_METHODS, **NETWORK_METHODS, **BASES}
SLOW = {"steps", "tune_steps", "iterations"}  # loops that a bound ends, later than a test likes


def fields_of(cls: type) -> list[str]:
    return [found.name for found in dataclasses.fields(cls)]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", EVERYWHERE)
def test_what_is_no_value_of_a_field_is_refused(name: str) -> None:
    """Numbers that are none, and other types, for every field of every method."""
    cls: Any = EVERYWHERE[name]
    hints = get_type_hints(cls)
    for field in fields_of(cls):
        for value in NOT_NUMBERS:
            if isinstance(value, str) and hints[field] in (str, str | None):
                continue
            with pytest.raises(RecipeError) as refused:
                build(cls, {field: value})
            assert field in str(refused.value), (field, value)


@pytest.mark.parametrize("name", METHODS)
def test_odd_values_are_refused_or_harmless(name: str) -> None:
    """A matrix method that takes a value compresses with it, to finite weights of the bytes that its scheme says."""
    weight, statistics = random_weight(4, 16), statistics_of(16, 4)
    cls: Any = METHODS[name]
    taken = 0
    for field in fields_of(cls):
        for value in [*ODD_NUMBERS, *ODD_WORDS]:
            if field in SLOW and value == 10**9:
                continue
            try:
                method = from_fields(name, {field: value})
                found = method.compress(weight, statistics, dtype="bfloat16")  # type: ignore[union-attr]
            except FettleError as refused:
                assert len(str(refused)) > 20
                continue
            taken += 1
            assert bool(torch.isfinite(found.dequantize()).all()), (field, value)
            assert found.nbytes() == sum(tensor.nbytes for tensor in found.to_state().values()), (field, value)
    assert taken >= len(fields_of(cls)) // 2


@pytest.mark.parametrize("name", [name for name, cls in METHODS.items() if "damping" in fields_of(cls)])
def test_no_damping_on_inputs_that_span_little(name: str) -> None:
    """A gram of rank 3 that nothing was added to has no inverse: what comes out is finite all the same."""
    weight, statistics = random_weight(6, 40), statistics_of(40, 6)
    few = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    method: Any = from_fields(name, {"damping": 0.0})
    found = method.compress(weight, {**statistics, "gram": few.T @ few}, dtype="bfloat16")
    assert bool(torch.isfinite(found.dequantize()).all())
