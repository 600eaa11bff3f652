"""Quantizing what the matrices of a block read, while the block runs with dense weights.

What: inside `with QuantizedInputs(…):` every product whose weight is known by its address reads, in place of its
inputs, the values that their codes stand for. So a block of dense float32 weights computes what the written model
computes, bit for bit as `QuantizedLinear` does it on the CPU.

As with `Tap`, a `TorchFunctionMode` is local to its thread. A tap that is entered inside sees the inputs as they came,
before they are rounded: an observer has to know their true range.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fettle.models.products import Product, ProductMode
from fettle.tensors.activations import InputQuantizer


class QuantizedInputs(ProductMode):
    """`quantizers`: address of a weight (`Tensor.data_ptr()`) → what its inputs pass through."""

    def __init__(self, quantizers: Mapping[int, InputQuantizer]) -> None:
        super().__init__()
        self._quantizers = quantizers

    def multiplied(self, product: Product) -> Tensor:
        """The product of the rounded inputs, where there are codes for them."""
        quantizer = self._quantizers.get(product.address)
        return product.run(product.read if quantizer is None else quantizer(product.read))
