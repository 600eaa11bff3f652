"""Quantizing what the matrices of a block read, while the block runs with dense weights.

What: inside `with QuantizedInputs(…):` every product whose weight is known by its address reads, in place of its
inputs, the values that their codes stand for. So a block of dense float32 weights computes what the written model
computes, bit for bit as `QuantizedLinear` does it on the CPU.

As with `Tap`, a `TorchFunctionMode` is local to its thread. A tap that is entered inside sees the inputs as they came,
before they are rounded: an observer has to know their true range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fettle.models.tap import PRODUCTS
from fettle.tensors.activations import InputQuantizer


class QuantizedInputs(TorchFunctionMode):
    """`quantizers`: address of a weight (`Tensor.data_ptr()`) → what its inputs pass through."""

    def __init__(self, quantizers: Mapping[int, InputQuantizer]) -> None:
        super().__init__()
        self._quantizers = quantizers

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        places = PRODUCTS.get(func)
        if places is not None:
            (read_at, read_as), (weight_at, weight_as) = places
            weight = args[weight_at] if len(args) > weight_at else kwargs.get(weight_as)
            quantizer = self._quantizers.get(weight.data_ptr()) if isinstance(weight, Tensor) else None
            if quantizer is not None and len(args) > read_at:
                args = (*args[:read_at], quantizer(args[read_at]), *args[read_at + 1 :])
            elif quantizer is not None:
                kwargs = {**kwargs, read_as: quantizer(kwargs[read_as])}
        return func(*args, **kwargs)
