"""The kernel of vector codes against a dense product."""

from __future__ import annotations

import pytest
import torch
from tests.tensors.test_vectors import example
from torch.nn.functional import linear

from fettle.kernels import vectors
from fettle.layers import QuantizedLinear
from fettle.tensors.vectors import VectorScheme


@pytest.mark.parametrize("scale_dtype", ["float16", "float8_e4m3fn"])
@pytest.mark.parametrize("shape", [(7, 20), (16, 64), (1, 1)], ids=str)
def test_products_are_those_of_the_dense_weight(
    shape: tuple[int, int], scale_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = example(*shape, VectorScheme(bits=3, scale_dtype=scale_dtype))
    bias = torch.arange(shape[0]).float()
    inputs = torch.randn(2, 5, shape[1], generator=torch.Generator().manual_seed(1))
    layer = QuantizedLinear.from_quantized(weight, bias)
    expected = linear(inputs, weight.dequantize(), bias)
    assert torch.equal(layer(inputs), expected)
    assert torch.equal(layer.dequantize(), weight.dequantize())
    monkeypatch.setattr(vectors, "TILE_WEIGHTS", 3 * shape[1])  # several tiles of rows
    torch.testing.assert_close(layer(inputs), expected)
    assert layer(inputs.bfloat16()).dtype == torch.bfloat16
    assert "vector-codes" in repr(layer)
