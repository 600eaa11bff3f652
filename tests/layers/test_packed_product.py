"""The gradient of a product with codes is that of the dense product, and keeps nothing dense."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from fettle.layers import QuantizedLinear
from fettle.methods.quantize.low_rank import LowRankCorrection
from fettle.methods.quantize.outliers import SparseOutliers
from fettle.methods.quantize.round_to_nearest import RoundToNearest
from fettle.tensors.quantized import QuantizedTensor

METHODS = {
    "4 bits": RoundToNearest(bits=4, group_size=8, asymmetric=True),
    "2 bits, a row": RoundToNearest(bits=2, group_size=None),
    "8 bits": RoundToNearest(bits=8, group_size=None),
    "ternary": RoundToNearest(grid="ternary", group_size=8),
}


def quantized(name: str) -> QuantizedTensor:
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    return METHODS[name].compress(weight, {}, dtype="float32")


@pytest.mark.parametrize(
    ("name", "storage"),
    [*((name, "pack-quantized") for name in METHODS), ("8 bits", "int-quantized")],  # one byte a code is for 8 bits
)
def test_gradients_are_those_of_the_dense_product(name: str, storage: str) -> None:
    found = quantized(name)
    layer = QuantizedLinear.from_quantized(found, torch.ones(12), storage)
    layer.bias.requires_grad_(True)
    inputs = torch.randn(2, 3, 20, requires_grad=True)
    other, bias = inputs.detach().clone().requires_grad_(), torch.ones(12, requires_grad=True)
    pull = torch.randn(2, 3, 12)
    outputs = layer(inputs)
    dense = linear(other, found.dequantize(), bias)
    (outputs * pull).sum().backward()
    (dense * pull).sum().backward()
    assert torch.allclose(outputs, dense, atol=1e-5)
    assert torch.allclose(inputs.grad, other.grad, atol=1e-5)
    assert torch.allclose(layer.bias.grad, bias.grad, atol=1e-5)


@pytest.mark.parametrize(
    "method", [SparseOutliers(bits=3, group_size=8), LowRankCorrection(bits=3, group_size=8, rank=2)]
)
def test_a_remainder_takes_part_in_the_gradient(method: SparseOutliers | LowRankCorrection) -> None:
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
    statistics = {"gram": torch.eye(20)}
    found = method.compress(weight, statistics, dtype="float32")
    assert found.remainder is not None
    layer = QuantizedLinear.from_quantized(found)
    inputs = torch.randn(4, 20, requires_grad=True)
    layer(inputs).sum().backward()
    assert torch.allclose(inputs.grad, found.dequantize().sum(0).expand(4, -1), atol=1e-5)


def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass() -> None:
    layer = QuantizedLinear.from_quantized(quantized("4 bits"))
    kept: list[int] = []
    inputs = torch.randn(1, 20, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(inputs).sum()
    assert all(size < 12 * 20 for size in kept)


def test_without_gradients_the_kernel_runs_as_before() -> None:
    layer = QuantizedLinear.from_quantized(quantized("4 bits"))
    inputs = torch.randn(3, 20)
    assert layer(inputs).grad_fn is None
    with torch.no_grad():
        assert torch.equal(layer(inputs.requires_grad_()), layer(inputs.detach()))
