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
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fettle.errors import CheckpointError, UsageError
from fettle.tensors.activations import Activations, InputScale
from fettle.tensors.packed import PackedTensor
from fettle.tensors.quantized import QuantizedTensor
from fettle.tensors.scales import Shared
from fettle.tensors.scheme import Scheme

if TYPE_CHECKING:
    from fettle._native import Matrix, Pool

FORCE = "FETTLE_INSTRUCTIONS"  # of the environment; cpu/features.cpp reads it too
NUMBERS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def plane() -> ModuleType:
    """The compiled module.

    Raises:
        UsageError: it was not built, or FETTLE_INSTRUCTIONS asks for instructions that do not run here.
    """
    try:
        from fettle import _native
    except ImportError as error:
        raise UsageError(f"{missing()}. Install fettle again where there is one, or use --engine torch") from error
    asked, there = os.environ.get(FORCE, ""), _native.features()["available"]
    if asked not in ("", *there):
        raise UsageError(
            f"{FORCE} is {asked!r}; this processor and this build run {', '.join(there)}. Take one, or unset it"
        )
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
    """One line: which instructions run, and why.

    Raises:
        UsageError: FETTLE_INSTRUCTIONS asks for instructions that do not run here.
    """
    absent = missing()
    if absent is not None:
        return f"torch reference on {os.cpu_count()} processors: {absent}"
    found = plane().features()
    return f"native, {found['instructions']} kernels on {os.cpu_count()} processors: {reason(found)}"


def reason(found: Mapping[str, Any]) -> str:
    """Why `found["instructions"]` run, out of what `features()` says."""
    name, best = found["instructions"], found["available"][0]
    if name != best:
        return f"{FORCE} asks for them; {best} kernels would run without it"
    return {
        "avx512_vnni": "this processor has AVX-512 F, BW, DQ, VL and VNNI",
        "avx2": "this processor has AVX2, FMA and F16C, and no AVX-512 VNNI that the system lets programs use",
        "neon_dot": "this processor has NEON with dot products of bytes",
        "portable": "this processor or this build has neither AVX2 nor NEON with dot products",
    }[name]


def default_threads() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def runs_as_codes(scheme: Scheme) -> bool:
    """Whether there is a kernel for the codes of a scheme without remainder; else they are multiplied as values."""
    # two scales in 16 bits: their product is rounded before it meets a code
    two_scales = scheme.has_tensor_scale and scheme.value_dtype != torch.float32
    levels = [] if scheme.grid.is_learned else list(scheme.grid.levels)
    return not (two_scales or scheme.grid.is_learned) and bool(plane().has_units(levels, scheme.grid.bits))


def coded_matrix(weight: QuantizedTensor, pool: Pool) -> Matrix:
    """A compressed weight [out, in] as a matrix: of codes where the kernels have its grid, else of values."""
    scheme = weight.scheme
    if weight.remainder is not None or not runs_as_codes(scheme):
        exact = weight.remainder is None
        return dense_matrix(weight.dequantize(scheme.value_dtype if exact else torch.float32), pool)
    codes = weight.codes.contiguous().numpy()
    return _coded(codes, 8, weight.shape[1], weight.shared, scheme, weight.tensor_scale, pool)


def packed_matrix(weight: PackedTensor, pool: Pool) -> Matrix:
    """A weight whose codes are packed as a matrix of codes, straight from their bits; see `runs_as_codes`.

    Raises:
        CheckpointError: a code for which the grid has no level.
    """
    streams = weight.words.contiguous().numpy().view("uint8")  # [out, bytes]
    shared = Shared(scale=weight.scale, zero_point=weight.zero_point)
    try:
        return _coded(streams, weight.scheme.grid.bits, weight.columns, shared, weight.scheme, None, pool)
    except ValueError as error:
        raise CheckpointError(f"{error}; the file is damaged ({weight.scheme.describe()})") from error


def _coded(
    streams: Any,
    stream_bits: int,
    columns: int,
    shared: Shared,
    scheme: Scheme,
    tensor_scale: Tensor | None,
    pool: Pool,
) -> Matrix:
    matrix: Matrix = plane().coded(
        streams=streams,
        columns=columns,
        stream_bits=stream_bits,
        bits=scheme.grid.bits,
        group=scheme.group_width(columns),
        scales=as_numpy(shared.scale),
        scale_type=NUMBERS[shared.scale.dtype],
        levels=list(scheme.grid.levels),
        zero_codes=None if shared.zero_point is None else shared.zero_point.contiguous().numpy(),
        gain=1.0 if tensor_scale is None else 1 / float(tensor_scale),
        pool=pool,
    )
    return matrix


def rounding_obstacle(activations: Activations) -> str | None:
    """Why the data plane cannot round inputs so, and what to do; None where it can."""
    said = activations.describe()
    if activations.dynamic and activations.granularity == "tensor":
        return (
            f"{said}, found on the spot, makes a token depend on those beside it in a batch, which the native engine "
            "does not do; use --engine torch, or compress with activation_granularity: token"
        )
    narrow = activations.grid == "float" and activations.bits < 8
    if narrow or activations.granularity == "group" or activations.outliers:
        return f"{said}: the native engine has no such inputs; use --engine torch"
    return None


def round_inputs(matrix: Matrix, activations: Activations, fixed: InputScale | None) -> Matrix:
    """Has a matrix read its inputs as the checkpoint quantizes them: the values of their codes, in float32.

    Raises:
        UsageError: inputs that the data plane cannot round; `rounding_obstacle` says why.
    """
    obstacle = rounding_obstacle(activations)
    if obstacle is not None:
        raise UsageError(obstacle)
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
