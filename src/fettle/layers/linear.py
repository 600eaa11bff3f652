"""A linear that keeps its weight as stored: packed codes, scales, zero points; or a mask and what stayed.

The buffers have the names of the file (`weight_packed`, `weight_scale`, …), so `state_dict` is what a checkpoint holds.
The product goes through `kernels.find`; nothing keeps a dense copy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fettle.kernels import explain, find
from fettle.layers.packed_product import PackedProduct
from fettle.tensors.weights import CompressedWeight, WeightScheme, kernel_format, weight_from_state


class QuantizedLinear(nn.Module):
    """outputs = inputs · weightᵀ + bias, with the weight as codes; takes the place of an `nn.Linear`.

    Attributes:
        in_features: columns of the weight.
        out_features: rows of the weight.
        scheme: what the buffers mean.
        storage: how they are laid out, "pack-quantized", "int-quantized" or "masked".
        bias: [out] or None; a parameter, as in `nn.Linear`.
    """

    def __init__(
        self, state: dict[str, Tensor], shape: tuple[int, int], scheme: WeightScheme, storage: str, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.scheme = scheme
        self.storage = storage
        self._names = tuple(state)
        for name, tensor in state.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_quantized(
        cls, quantized: CompressedWeight, bias: Tensor | None = None, storage: str = "pack-quantized"
    ) -> QuantizedLinear:
        """A linear with this weight [out, in]; packs the codes.

        Raises:
            RecipeError: the storage cannot hold the weight's scheme.
        """
        return cls(quantized.to_state(storage), quantized.shape, quantized.scheme, storage, bias)

    @property
    def quantized(self) -> CompressedWeight:
        """The weight with its codes or its mask unpacked."""
        return weight_from_state(self._state(), self.scheme, self.storage)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, a fresh [out, in]."""
        return self.quantized.dequantize(dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] → [..., out], in the inputs' type; gradients pass to the inputs (`packed_product.py`)."""
        if not (torch.is_grad_enabled() and inputs.requires_grad):
            return self._multiply(inputs)
        product: Tensor = PackedProduct.apply(inputs, self.bias, self._multiply, lambda: self.quantized)  # type: ignore[no-untyped-call]
        return product

    def _multiply(self, inputs: Tensor) -> Tensor:
        kernel = find("linear", kernel_format(self.scheme, self.storage), inputs.device.type)
        return kernel.run(inputs, self._state(), self.scheme, self.bias)

    def extra_repr(self) -> str:
        """What `print` shows, the kernel included."""
        device = self.get_buffer(self._names[0]).device.type
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme.describe()}; {explain('linear', kernel_format(self.scheme, self.storage), device)}"
        )

    def _state(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(name) for name in self._names}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves between devices; a change of type (`.half()`, `.to(dtype)`) reaches the bias, never codes or scales."""
        stored = self._state()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in stored.items():
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self
