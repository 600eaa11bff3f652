"""Weights in the layout of the native data plane (`fettle._native`, C++ in native/), and whether there is one.

    outputs [tokens, out] = inputs [tokens, in] · weightᵀ

Two ways to multiply. With float32 inputs a value is what the reference has: rounded to the scale's type, summed in
float32. With integer inputs, the fast way, a block of at most 128 columns of a token becomes bytes first,

    code = round(x · 127 / max|x|)        output = Σ_blocks scale_of_weight · max|x| / 127 · Σ (unit - zero) · code

exact in 32-bit integers inside a block. Grids whose levels are not equally far apart (normal float, power of two) are
multiplied as units of 7 bits: a level is off by at most 1/254 of the span of all of them.

What becomes codes: grids of equal steps of any width, and grids of at most 16 levels. What becomes values (in the type
that the reference rounds them to): dense weights, learned tables, wider grids of unequal levels, 16-bit scales
under a tensor scale, and weights with a remainder, in float32.

Where a checkpoint quantizes inputs itself (W8A8), its codes are what a product reads, as values in float32 and rounded
as the reference rounds them; nothing is rounded twice.

The module is compiled when fettle is installed. Without a compiler it is missing, `missing()` says so, and everything
runs through the torch reference.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fettle.errors import UsageError
from fettle.tensors.activations import Activations, InputScale
from fettle.tensors.quantized import QuantizedTensor

if TYPE_CHECKING:
    from fettle._native import Matrix, Pool

NUMBERS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def plane() -> ModuleType:
    """The compiled module.

    Raises:
        UsageError: it was not built.
    """
    try:
        from fettle import _native
    except ImportError as error:
        raise UsageError(f"{missing()}. Install fettle again where there is one, or use --engine torch") from error
    return _native


def missing() -> str | None:
    """Why there is no native data plane, in words; None where there is one."""
    try:
        from fettle import _native  # noqa: F401
    except ImportError as found:
        told = "" if "cannot import name" in str(found) else f"; it is there, and does not load: {found}"
        return f"the native data plane is not built (that takes a C++17 compiler when fettle is installed){told}"
    return None


def explain_runtime() -> str:
    """One line: which instructions run, and why."""
    absent = missing()
    if absent is not None:
        return f"torch reference on {os.cpu_count()} processors: {absent}"
    found = plane().features()
    reasons = {
        "avx2": "this processor has AVX2, FMA and F16C",
        "portable": "this processor or this build has no AVX2",
    }
    beside = ", and AVX-512 VNNI, for which there are no kernels yet" if found["avx512_vnni"] else ""
    name = found["instructions"]
    return f"native, {name} kernels on {os.cpu_count()} processors: {reasons[name]}{beside}"


def default_threads() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def coded_matrix(weight: QuantizedTensor, pool: Pool) -> Matrix:
    """A compressed weight [out, in] as a matrix: of codes where the kernels have its grid, else of values."""
    grid, scheme = weight.scheme.grid, weight.scheme
    levels = [] if grid.is_learned else list(grid.levels)
    # two scales in 16 bits: their product is rounded before it meets a code
    two_scales = weight.tensor_scale is not None and scheme.value_dtype != torch.float32
    if two_scales or grid.is_learned or weight.remainder is not None or not plane().has_units(levels, grid.bits):
        exact = weight.remainder is None
        return dense_matrix(weight.dequantize(scheme.value_dtype if exact else torch.float32), pool)
    columns = weight.shape[1]
    gain = 1.0 if weight.tensor_scale is None else 1 / float(weight.tensor_scale)
    matrix: Matrix = plane().coded(
        streams=weight.codes.contiguous().numpy(),
        columns=columns,
        stream_bits=8,
        bits=grid.bits,
        group=scheme.group_width(columns),
        scales=as_numpy(weight.scale),
        scale_type=NUMBERS[weight.scale.dtype],
        levels=levels,
        zero_codes=None if weight.zero_point is None else weight.zero_point.contiguous().numpy(),
        gain=gain,
        pool=pool,
    )
    return matrix


def round_inputs(matrix: Matrix, activations: Activations, fixed: InputScale | None) -> Matrix:
    """Has a matrix read its inputs as the checkpoint quantizes them: the values of their codes, in float32.

    Raises:
        UsageError: one scale for all inputs of a call, found on the spot: a token would depend on its neighbours.
    """
    if activations.dynamic and activations.granularity == "tensor":
        raise UsageError(
            f"{activations.describe()}, found on the spot, makes a token depend on those beside it in a batch, which "
            "the native engine does not do; use --engine torch, or compress with activation_granularity: token"
        )
    kind = "e4m3" if activations.grid == "float" else "asymmetric" if activations.zero_point else "symmetric"
    scale = 0.0 if fixed is None else float(fixed.scale)
    point = 0.0 if fixed is None or fixed.zero_point is None else float(fixed.zero_point)
    plane().set_rounding(matrix, kind, activations.bits, scale, point)
    return matrix


def dense_matrix(values: Tensor, pool: Pool) -> Matrix:
    """Values [out, in] of 16 or 32 bits as a matrix."""
    matrix: Matrix = plane().dense(as_numpy(values), NUMBERS[values.dtype], pool)
    return matrix


def as_numpy(values: Tensor) -> Any:
    """The numbers as numpy has them: bfloat16, which it lacks, and float16 as the bits of uint16."""
    flat = values.detach().cpu().contiguous()
    return flat.numpy() if flat.dtype == torch.float32 else flat.view(torch.uint16).numpy()
