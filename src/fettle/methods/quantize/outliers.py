"""Sparse outliers: the few weights that rounding would cost most are kept apart, and the codes fit what is left.

Dettmers et al.: SpQR, 2023, https://arxiv.org/abs/2306.03078; Kim et al.: SqueezeLLM, 2023,
https://arxiv.org/abs/2306.07629.

    weight = values of the codes + sparse remainder        ⌊outliers · out · in⌋ entries of 16 bits for the linear

`importance: rounding` keeps those by which the error of all falls most, (w - v)² / [H⁻¹]_jj for a weight alone, with H
the damped gram of the inputs, and what a group gains by a shorter range (SpQR; `rounding_cost.py`). `magnitude` keeps
the largest w² / [H⁻¹]_jj, without a gram the largest weights (the sparse part of SqueezeLLM). A share is fixed
beforehand, where SpQR takes all above a threshold, so that the file's bytes are known before any work. And what is kept
is not the weight in place of its code but what is missing at its place, a difference that 16 bits hold more exactly.

    codes     of the weight with zeros at the kept places: they do not widen a range
    entries   s minimising (e - s)·H·(e - s)ᵀ over the kept places of each row, e = w - v: k x k normal equations
    again     codes and scales of what is left now, by coordinate descent (`refine.py`), then entries; ROUNDS times

Without GPTQ nothing is done again; without a gram the entries are w - v. The best state of all is taken.

Cost: GPTQ's, one in³/3 for the diagonal of the inverse, and a small system a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fettle.errors import NonFiniteError
from fettle.methods.quantize.fields import GridFields
from fettle.methods.quantize.ranges import FUSED_MAXIMUM
from fettle.methods.quantize.rounding_cost import costliest, largest
from fettle.methods.quantize.solvers import Solver, SolverName
from fettle.tensors.quantized import QuantizedTensor
from fettle.tensors.scheme import Scheme
from fettle.tensors.sparse import LARGEST_SHARE, SparseScheme, SparseTensor

ROUNDS = 2
Importance = Literal["rounding", "magnitude"]


@dataclass(frozen=True, kw_only=True)
class SparseOutliers(GridFields):
    """Keeps the weights that rounding would cost most beside the codes, in 16 bits with their places."""

    name: ClassVar[str] = "sparse_outliers"
    title: ClassVar[str] = "Sparse outliers"
    source: ClassVar[str] = "after SpQR, Dettmers et al. 2023, https://arxiv.org/abs/2306.03078"
    statistics: ClassVar[tuple[str, ...]] = ("gram", "drift")
    objective: ClassVar[str] = "output_error"

    outliers: float = field(
        default=0.005,
        metadata={
            "help": "share of a linear's weights that are kept apart; 0 for none",
            "minimum": 0.0,
            "maximum": LARGEST_SHARE,
        },
    )
    solver: SolverName = field(default="gptq", metadata={"help": "what chooses the codes of the others"})
    importance: Importance = field(
        default="rounding",
        metadata={
            "help": "what is kept: what rounding would cost most, or the largest weights, as the inputs feel them"
        },
    )

    def needs(self) -> tuple[str, ...]:
        """What GPTQ needs; nothing for the largest weights beside the nearest codes."""
        if self.solver == "gptq":
            return ("gram", "drift")
        return ("gram",) if self.importance == "rounding" else ()

    def scheme(self, dtype: str) -> Scheme:
        """The codes' scheme with the outliers beside them."""
        codes = super().scheme(dtype)
        scheme = replace(codes, remainder=SparseScheme(share=self.outliers) if self.outliers > 0 else None)
        scheme.validate()
        return scheme

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> QuantizedTensor:
        """Chooses what is kept, then codes for the rest, for weight [out, in]."""
        wanted = {name: statistics[name] for name in (*self.needs(), FUSED_MAXIMUM) if name in statistics}
        return sparse_outliers(weight, wanted, self.scheme(dtype), solver=self.solver, importance=self.importance)


def sparse_outliers(
    weight: Tensor,
    statistics: Mapping[str, Tensor],
    scheme: Scheme,
    *,
    solver: SolverName = "gptq",
    importance: Importance = "rounding",
) -> QuantizedTensor:
    """Codes and kept weights of weight [out, in] in `scheme`; pure.

    Raises:
        NonFiniteError: NaN or infinity in the weight or the gram, or a scale or an entry beyond its type.
    """
    solving = Solver(solver, weight, statistics, scheme)
    shape, kept = (weight.shape[0], weight.shape[1]), scheme.remainder
    count = kept.count(shape) if isinstance(kept, SparseScheme) else 0
    if not count:
        return replace(solving.codes(solving.target), scheme=scheme)
    places = kept_places(solving, scheme, count, importance)
    rest = solving.target.clone()
    rest.view(-1)[places] = 0
    dtype = scheme.remainder_spec(shape)["weight_sparse_values"][0]
    best = _with_entries(replace(solving.codes(rest), scheme=scheme), solving, places, dtype)
    for _ in range(ROUNDS if solver == "gptq" else 0):
        best = solving.better(best, _with_entries(solving.again(best), solving, places, dtype))
    return best


def kept_places(solving: Solver, scheme: Scheme, count: int, importance: Importance) -> Tensor:
    """The places (row · in + column) of what is kept of the target, int64 [count], ascending."""
    if importance == "rounding":
        return costliest(solving.target, count, scheme.codes_alone, solving.inverse_diagonal)
    # the root orders as the square does, and does not vanish for tiny weights
    return largest(solving.target.abs() * solving.inverse_diagonal.rsqrt(), count)


def _with_entries(found: QuantizedTensor, solving: Solver, places: Tensor, dtype: torch.dtype) -> QuantizedTensor:
    """The same codes with the best entries at these places."""
    shape = found.shape
    error = solving.target - replace(found, remainder=None).dequantize()
    plain = SparseTensor.at(places, _stored(error.view(-1)[places], dtype), shape)
    exact = replace(found, remainder=plain)
    if solving.gram is None:
        return exact
    fitted = fit_entries(error, plain, solving.gram, solving.damping)
    return solving.better(exact, replace(found, remainder=SparseTensor.at(places, _stored(fitted, dtype), shape)))


def fit_entries(error: Tensor, places: SparseTensor, gram: Tensor, damping: float) -> Tensor:
    """float32 [count]: for each row the s with the least (e - s)·H·(e - s)ᵀ at its places, H = gram + damping.

    s = H_SS⁻¹·(H·e)_S, where S are the row's columns.
    """
    fitted = torch.empty(len(places.values))
    offsets, columns = places.offsets.tolist(), places.columns.long()
    for row, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if start == stop:
            continue
        own = columns[start:stop]
        slopes = gram[own] @ error[row] + damping * error[row, own]
        bend = gram[own.unsqueeze(1), own].clone()
        bend.diagonal().add_(damping)
        lower, info = torch.linalg.cholesky_ex(bend)
        fitted[start:stop] = error[row, own]  # what a system that is not definite keeps
        if int(info) == 0:
            fitted[start:stop] = torch.cholesky_solve(slopes.unsqueeze(1), lower)[:, 0]
    return torch.where(torch.isfinite(fitted), fitted, error[places.places()])


def _stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    stored = values.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise NonFiniteError(
            f"an outlier of {float(values.abs().max()):.3g} is beyond {str(dtype).removeprefix('torch.')}; set "
            "scale_dtype: bfloat16"
        )
    return stored
