"""The reference kernel against a dense product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tensors.test_scheme import random_quantized
from torch.nn.functional import linear

from fettle.errors import UsageError
from fettle.kernels import explain, find, reference
from fettle.tensors import FactoredScheme, Scheme, SparseScheme, uniform


@pytest.mark.parametrize("storage", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize(("granularity", "group_size"), [("group", 32), ("channel", None), ("tensor", None)])
@pytest.mark.parametrize("tile", [1 << 22, 500])
def test_outputs_are_those_of_the_dequantized_weight(
    storage: str,
    zero_point: bool,
    granularity: Any,
    group_size: int | None,
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "TILE_WEIGHTS", tile)
    scheme = Scheme(
        grid=uniform(8), granularity=granularity, group_size=group_size, zero_point=zero_point, scale_dtype="bfloat16"
    )
    weight = random_quantized(scheme, (13, 172))
    inputs, bias = torch.randn(2, 5, 172), torch.randn(13)
    kernel = find("linear", storage, "cpu")
    for b in (None, bias):
        outputs = kernel.run(inputs, weight.to_state(storage), scheme, b)
        expected = linear(inputs, weight.dequantize(), b)
        assert outputs.shape == (2, 5, 13)
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=5e-3)
        if tile > 500:
            assert torch.equal(outputs, expected)


@pytest.mark.parametrize("storage", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("remainder", [SparseScheme(share=0.03), FactoredScheme(rank=3), FactoredScheme(rank=100)])
@pytest.mark.parametrize("shape", [(13, 172), (1, 1), (5, 33), (130, 7)], ids=str)
@pytest.mark.parametrize("tile", [1 << 22, 100])
def test_remainders_are_multiplied_too(
    storage: str, remainder: Any, shape: tuple[int, int], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "TILE_WEIGHTS", tile)
    for scale_dtype in ("bfloat16", "float8_e4m3fn"):
        scheme = Scheme(
            grid=uniform(8), granularity="group", group_size=24, scale_dtype=scale_dtype, remainder=remainder
        )
        weight = random_quantized(scheme, shape)
        inputs, bias = torch.randn(2, 5, shape[1]), torch.randn(shape[0])
        outputs = find("linear", storage, "cpu").run(inputs, weight.to_state(storage), scheme, bias)
        expected = linear(inputs.double(), weight.dequantize().double(), bias.double())
        torch.testing.assert_close(outputs.double(), expected, rtol=1e-5, atol=5e-3)


def test_narrow_inputs_are_computed_wide() -> None:
    scheme = Scheme(grid=uniform(4), granularity="group", group_size=16)
    weight = random_quantized(scheme, (8, 64))
    inputs = torch.randn(3, 64, dtype=torch.bfloat16)
    outputs = find("linear", "pack-quantized", "cpu").run(inputs, weight.to_state(), scheme, None)
    assert outputs.dtype == torch.bfloat16
    assert torch.equal(outputs, linear(inputs.float(), weight.dequantize()).bfloat16())


def test_dispatch_explains_itself_and_refuses_what_it_has_not() -> None:
    assert "reference" in explain("linear", "pack-quantized", "cuda")
    with pytest.raises(UsageError, match="did you mean 'linear × pack-quantized'"):
        find("linear", "packed-quantized", "cpu")
