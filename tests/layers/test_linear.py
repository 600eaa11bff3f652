"""The linear that keeps codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tensors.test_scheme import random_quantized
from torch import nn
from torch.nn.functional import linear

from fettle.layers import QuantizedLinear
from fettle.tensors import FactoredScheme, Scheme, SparseScheme, uniform

SCHEME = Scheme(grid=uniform(4), granularity="group", group_size=32, zero_point=True, scale_dtype="bfloat16")


def test_it_answers_as_the_dense_linear() -> None:
    weight, bias, inputs = random_quantized(SCHEME, (7, 172)), torch.randn(7), torch.randn(2, 3, 172)
    layer = QuantizedLinear.from_quantized(weight, bias)
    assert torch.equal(layer(inputs), linear(inputs, weight.dequantize(), bias))
    assert (layer.in_features, layer.out_features) == (172, 7)


@pytest.mark.parametrize("storage", ["pack-quantized", "int-quantized"])
def test_the_state_is_what_the_file_holds(storage: str) -> None:
    scheme = Scheme(grid=uniform(8), granularity="channel", zero_point=True)
    weight = random_quantized(scheme, (7, 40))
    layer = QuantizedLinear.from_quantized(weight, storage=storage)
    state = layer.state_dict()
    stored = weight.to_state(storage)
    assert sorted(state) == sorted(stored)
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert sum(buffer.nbytes for buffer in layer.buffers()) == weight.nbytes(storage)  # no dense copy anywhere
    assert torch.equal(layer.quantized.codes, weight.codes)
    assert torch.equal(layer.dequantize(), weight.dequantize())
    other = QuantizedLinear.from_quantized(random_quantized(scheme, (7, 40), seed=1), storage=storage)
    other.load_state_dict(state)
    assert torch.equal(other.dequantize(), weight.dequantize())


def test_a_change_of_type_reaches_the_bias_only() -> None:
    weight = random_quantized(SCHEME, (7, 64))
    model = nn.Sequential(QuantizedLinear.from_quantized(weight, torch.randn(7)))
    model.to(torch.float16)
    layer = model[0]
    assert isinstance(layer, QuantizedLinear)
    assert layer.bias is not None and layer.bias.dtype == torch.float16
    assert torch.equal(layer.quantized.dequantize(), weight.dequantize())
    assert model(torch.randn(2, 64, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("remainder", [SparseScheme(share=0.05), FactoredScheme(rank=3)])
def test_what_stands_beside_the_codes_is_kept_and_multiplied(remainder: Any) -> None:
    scheme = replace(SCHEME, remainder=remainder)
    weight, inputs = random_quantized(scheme, (7, 172)), torch.randn(2, 3, 172)
    layer = QuantizedLinear.from_quantized(weight).to(torch.float16)
    assert sorted(layer.state_dict()) == sorted(scheme.state_spec((7, 172)))
    assert sum(buffer.nbytes for buffer in layer.buffers()) == weight.nbytes()
    assert torch.equal(layer.dequantize(), weight.dequantize())
    torch.testing.assert_close(layer(inputs), linear(inputs, weight.dequantize()), rtol=1e-5, atol=1e-4)
    assert remainder.describe() in repr(layer)


def test_it_prints_its_scheme_and_kernel() -> None:
    text = repr(QuantizedLinear.from_quantized(random_quantized(SCHEME, (7, 64))))
    assert SCHEME.describe() in text
    assert "reference" in text
