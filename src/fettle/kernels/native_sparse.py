"""Pruned weights on the native data plane: as what stayed where that is read faster, else as a dense matrix.

    skipping reads   codes of up to 4 bits: 8 bits an entry;  wider codes: 12;  numbers: their own bits and 8
    dense reads      the bits of a code or number, for every weight

An entry says how far it is from the last one of its row, so there is no bit a weight that was pruned; rows of a tile
wait for the fullest (native/formats/sparse.h has the layout), which at random masks costs half as much again at 75%. So
four bits were faster from 75% on (1.2 times; 1.8 at 90%), eight bits from 50% on (1.6). What runs is what is smaller in
the kernels' layout by `margin`; `benchmarks/kernels/sparse_matmul.py` measures where that is.

Codes with zero points, without a level of zero, learned, or in groups of at most 16 have no sparse kernel. They become
dense codes whose pruned ones stand for zero; only where a grid cannot say zero, or levels are learned, dense numbers.

Many tokens go through the dense kernels, a tile at a time, made dense in the second-level cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fettle.kernels.native import NUMBERS, as_numpy, coded_matrix, dense_matrix, plane
from fettle.tensors.masked import MaskedTensor
from fettle.tensors.quantized import QuantizedTensor

if TYPE_CHECKING:
    from fettle._native import Matrix, Pool

NARROWEST_GROUP = 17  # columns that share a scale: narrower groups fill no window


def margin(weight_bits: int) -> float:
    """The share of the dense layout's bytes above which skipping is not worth its arithmetic.

    The dense kernel of up to 4 bits is fast enough to wait for memory; wider ones take longer than skipping does.
    """
    return 0.75 if weight_bits <= 4 else 0.95


def masked_matrix(weight: MaskedTensor, pool: Pool, rows: Sequence[int] | slice | None = None) -> Matrix:
    """A pruned weight [out, in], or some of its rows, as the matrix that is read fastest."""
    sparse = sparse_matrix(weight, pool, rows)
    dense_bytes = _dense_bytes(weight, len(weight.kept) if rows is None else len(weight.kept[rows]))
    return (
        sparse
        if sparse is not None and sparse.nbytes < margin(_bits(weight)) * dense_bytes
        else dense_twin(weight, pool, rows)
    )


def sparse_matrix(weight: MaskedTensor, pool: Pool, rows: Sequence[int] | slice | None = None) -> Matrix | None:
    """What stayed, in the layout that skips; None where there is no kernel for it."""
    kept = weight.kept if rows is None else weight.kept[rows]
    if isinstance(weight.values, Tensor):
        values = _numbers(weight, rows)
        matrix: Matrix = plane().sparse_numbers(as_numpy(values), NUMBERS[values.dtype], pool)
        return matrix
    codes = _codes(weight.values, kept, rows)
    scheme, columns = codes.scheme, kept.shape[1]
    grid, width = scheme.grid, scheme.group_width(kept.shape[1])
    levels = [] if grid.is_learned else list(grid.levels)
    zero_free = scheme.zero_point or 0.0 not in levels
    two_scales = codes.tensor_scale is not None and scheme.value_dtype != torch.float32
    narrow = width < NARROWEST_GROUP and width < columns
    if zero_free or two_scales or narrow or not plane().has_units(levels, grid.bits):
        return None
    matrix = plane().sparse_codes(
        codes=codes.codes.contiguous().numpy(),
        kept=np.ascontiguousarray(kept.numpy().view(np.uint8)),
        bits=grid.bits,
        group=width,
        scales=as_numpy(codes.scale),
        scale_type=NUMBERS[codes.scale.dtype],
        levels=levels,
        gain=1.0 if codes.tensor_scale is None else 1 / float(codes.tensor_scale),
        pool=pool,
    )
    return matrix


def dense_twin(weight: MaskedTensor, pool: Pool, rows: Sequence[int] | slice | None = None) -> Matrix:
    """The same weight, zeros and all: codes where a code stands for zero, else numbers."""
    if isinstance(weight.values, Tensor):
        return dense_matrix(_numbers(weight, rows), pool)
    kept = weight.kept if rows is None else weight.kept[rows]
    codes = _codes(weight.values, kept, rows)
    grid, point = codes.scheme.grid, codes.zero_point
    if point is not None:
        width = codes.scheme.group_width(kept.shape[1])
        wide = point.repeat_interleave(width, dim=1)[:, : kept.shape[1]].expand(kept.shape)
        return coded_matrix(replace(codes, codes=torch.where(kept, codes.codes, wide)), pool)
    if not grid.is_learned and 0.0 in grid.levels:
        zero = torch.tensor(grid.levels.index(0.0), dtype=torch.uint8)
        return coded_matrix(replace(codes, codes=torch.where(kept, codes.codes, zero)), pool)
    return dense_matrix(codes.dequantize().masked_fill_(~kept, 0.0), pool)


def _numbers(weight: MaskedTensor, rows: Sequence[int] | slice | None) -> Tensor:
    values = weight.dequantize(weight.scheme.torch_value_dtype)
    return values if rows is None else values[rows]


def _codes(weight: QuantizedTensor, kept: Tensor, rows: Sequence[int] | slice | None) -> QuantizedTensor:
    """The codes of some rows."""
    if rows is None:
        return weight
    whole = weight.scheme.granularity == "tensor"
    return replace(
        weight,
        codes=weight.codes[rows],
        scale=weight.scale if whole else weight.scale[rows],
        zero_point=weight.zero_point if whole or weight.zero_point is None else weight.zero_point[rows],
        levels=None if weight.levels is None else weight.levels[rows],
    )


def _bits(weight: MaskedTensor) -> int:
    codes = weight.values
    return 8 * codes.element_size() if isinstance(codes, Tensor) else codes.scheme.grid.bits


def _dense_bytes(weight: MaskedTensor, rows: int) -> int:
    """Of the dense layout, about: without the padding of groups and tiles."""
    columns = weight.shape[1]
    if isinstance(weight.values, Tensor):
        return rows * columns * _bits(weight) // 8
    codes = weight.values
    shared = codes.scale.element_size() * rows * codes.scheme.group_count(columns)
    return rows * columns * codes.scheme.grid.bits // 8 + shared
