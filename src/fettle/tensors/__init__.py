"""What a compressed weight is: codes that index a grid of levels, times a scale.

Grid             the levels                                     grid.py
Scheme           grid + granularity + scale type + zero point   scheme.py
QuantizedTensor  codes, scale, zero point, scheme               quantized.py
Activations      what codes stand for a linear's inputs         activations.py
pack_bits        codes as the standard's int32 words            packing.py
"""

from __future__ import annotations

from fettle.tensors.activations import Activations
from fettle.tensors.grid import Grid, uniform
from fettle.tensors.quantized import QuantizedTensor, quantize
from fettle.tensors.scheme import Scheme

__all__ = ["Activations", "Grid", "QuantizedTensor", "Scheme", "quantize", "uniform"]
