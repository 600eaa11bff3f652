"""Torch modules that hold packed tensors in place of dense ones."""

from __future__ import annotations

from fettle.layers.linear import QuantizedLinear

__all__ = ["QuantizedLinear"]
