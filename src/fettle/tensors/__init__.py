"""What a compressed weight is: codes that index a grid of levels, times a scale.

Grid             the levels                                     grid.py
Scheme           grid + granularity + scale type + zero point   scheme.py
QuantizedTensor  codes, scale, zero point, scheme               quantized.py
MaskedTensor     a mask and what stayed, plain or as codes      masked.py
SparseTensor     a few weights kept apart, with their places    sparse.py
FactoredTensor   two thin matrices beside the codes             factored.py
Activations      what codes stand for a linear's inputs         activations.py
pack_bits        codes as the standard's int32 words            packing.py
"""

from __future__ import annotations

from fettle.tensors.activations import Activations
from fettle.tensors.factored import FactoredScheme, FactoredTensor
from fettle.tensors.grid import Grid, uniform
from fettle.tensors.masked import MaskedScheme, MaskedTensor
from fettle.tensors.quantized import QuantizedTensor, quantize
from fettle.tensors.scheme import Scheme
from fettle.tensors.sparse import SparseScheme, SparseTensor

__all__ = [
    "Activations",
    "FactoredScheme",
    "FactoredTensor",
    "Grid",
    "MaskedScheme",
    "MaskedTensor",
    "QuantizedTensor",
    "Scheme",
    "SparseScheme",
    "SparseTensor",
    "quantize",
    "uniform",
]
