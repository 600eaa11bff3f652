"""How codes lie in a file: six storages of the compressed-tensors standard.

    storage                codes                                              scales
    pack-quantized         weight_packed int32 [out, ⌈in·bits/32⌉]            as they are
    int-quantized          weight int8 [out, in]                              as they are
    float-quantized        weight float8_e4m3fn [out, in]                     as they are
    mxfp8-quantized        weight float8_e4m3fn [out, in], groups of 32       float8_e8m0fnu, written as uint8
    mxfp4-pack-quantized   weight_packed uint8 [out, in/2], groups of 32      float8_e8m0fnu, written as uint8
    nvfp4-pack-quantized   weight_packed uint8 [out, in/2], groups of 16      float8_e4m3fn, and one float32

Everywhere else in fettle a code is the index of a level, in ascending order. In the last four it is what hardware
reads: the bit pattern of a small float, two of four bits in a byte, the left one in the low half (OCP Microscaling
formats 1.0, section 5.3). A pattern for -0 is read as zero and never written; e4m3's patterns for NaN are damage.

Cost: a table look-up for each code.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from fettle.tensors.grid import Grid
from fettle.tensors.levels import named
from fettle.tensors.packing import pack_bits, packed_width, unpack_bits
from fettle.tensors.remainder import TensorSpec

Storage = Literal[
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "mxfp8-quantized",
    "mxfp4-pack-quantized",
    "nvfp4-pack-quantized",
]
FLOAT4, FLOAT8 = named("float", 4), named("float", 8)
WITH_SHAPE = ("pack-quantized",)  # says the weight's shape in a tensor of its own: packing rounds up
PACKED_FLOATS = ("mxfp4-pack-quantized", "nvfp4-pack-quantized")
EXPONENT_SCALES = ("mxfp8-quantized", "mxfp4-pack-quantized")  # float8_e8m0fnu under the name of its bytes, uint8
_NO_CODE = 255  # no grid of small floats has so many levels


def float_storage(grid: Grid, group_size: int | None, scale_dtype: str) -> Storage | None:
    """The storage that the standard has for these floats; None where it has none, and for all other grids."""
    if grid == FLOAT8 and scale_dtype in ("float16", "bfloat16", "float32"):
        return "float-quantized"
    known: dict[tuple[Grid, int | None, str], Storage] = {
        (FLOAT8, 32, "float8_e8m0fnu"): "mxfp8-quantized",
        (FLOAT4, 32, "float8_e8m0fnu"): "mxfp4-pack-quantized",
        (FLOAT4, 16, "float8_e4m3fn"): "nvfp4-pack-quantized",
    }
    return known.get((grid, group_size, scale_dtype))


def code_tensor(storage: str) -> str:
    """The name of the tensor that holds the codes."""
    return "weight_packed" if storage in WITH_SHAPE + PACKED_FLOATS else "weight"


def code_spec(storage: str, shape: tuple[int, int], bits: int) -> dict[str, TensorSpec]:
    """Name, type and shape of the tensors that `pack_codes` gives."""
    rows, columns = shape
    if storage in WITH_SHAPE:
        return {
            "weight_packed": (torch.int32, (rows, packed_width(columns, bits))),
            "weight_shape": (torch.int64, (2,)),
        }
    if storage in PACKED_FLOATS:
        return {"weight_packed": (torch.uint8, (rows, columns // 2))}
    return {"weight": (torch.int8 if storage == "int-quantized" else torch.float8_e4m3fn, shape)}


def pack_codes(codes: Tensor, grid: Grid, storage: str) -> dict[str, Tensor]:
    """Codes uint8 [out, in] as they are stored."""
    if storage in WITH_SHAPE:
        return {"weight_packed": pack_bits(codes, grid.bits), "weight_shape": torch.tensor(codes.shape)}
    if storage == "int-quantized":
        return {"weight": signed(codes, grid.bits)}
    patterns = _patterns(grid).to(codes.device)[codes.int()]
    if storage in PACKED_FLOATS:
        return {"weight_packed": patterns[:, ::2] | (patterns[:, 1::2] << 4)}
    return {"weight": patterns.view(torch.float8_e4m3fn)}


def unpack_codes(stored: Tensor, grid: Grid, storage: str, in_features: int) -> Tensor:
    """The inverse for some rows of the tensor `code_tensor(storage)`: uint8 [rows, in].

    Patterns that are no number give a code beyond the grid's levels.

    Raises:
        CheckpointError: packed codes have another type or too few or too many words.
    """
    if storage in WITH_SHAPE:
        return unpack_bits(stored, grid.bits, in_features)
    if storage == "int-quantized":
        return unsigned(stored, grid.bits)
    patterns = stored.view(torch.uint8)
    if storage in PACKED_FLOATS:
        patterns = torch.stack((patterns & 15, patterns >> 4), dim=-1).reshape(len(stored), in_features)
    return _codes_of(grid).to(stored.device)[patterns.int()]


def told_shape(stored: Tensor, storage: str) -> list[int]:
    """The weight's shape that weight_shape, or else the tensor of codes, says."""
    if storage in WITH_SHAPE:
        return [int(length) for length in stored.tolist()]
    shape = list(stored.shape)
    return [*shape[:-1], 2 * shape[-1]] if storage in PACKED_FLOATS and shape else shape


def signed(codes: Tensor, bits: int) -> Tensor:
    """Codes as the standard's int8 numbers: 0 … 2**bits-1 becomes -2**(bits-1) … 2**(bits-1)-1."""
    return codes.to(torch.int16).sub_(2 ** (bits - 1)).to(torch.int8)


def unsigned(numbers: Tensor, bits: int) -> Tensor:
    """The inverse of `signed`."""
    return numbers.to(torch.int16).add_(2 ** (bits - 1)).to(torch.uint8)


@cache
def _patterns(grid: Grid) -> Tensor:
    """The bit pattern of each level, uint8 [levels]."""
    if grid == FLOAT8:
        return torch.tensor(grid.levels).to(torch.float8_e4m3fn).view(torch.uint8)
    zero = grid.levels.index(0.0)  # magnitudes count up from here on either side; the sign is the top bit of four
    return torch.tensor([code - zero if code >= zero else 8 + zero - code for code in range(grid.level_count)]).byte()


@cache
def _codes_of(grid: Grid) -> Tensor:
    """The code of each bit pattern, uint8 [2**bits]; `_NO_CODE` for NaN."""
    codes = torch.full((2**grid.bits,), _NO_CODE, dtype=torch.uint8)
    codes[_patterns(grid).int()] = torch.arange(grid.level_count, dtype=torch.uint8)
    codes[2 ** (grid.bits - 1)] = grid.levels.index(0.0)  # -0
    return codes
