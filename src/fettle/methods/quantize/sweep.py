"""GPTQ's sweep: one factorization, then column after column, all rows of a tile at once. See `gptq.py` for why.

    factorize        the damped gram → L, columns arranged so that the last is the first to go
    corrected        the weight to approach, where the inputs have drifted
    solve            ranges, then codes; and what each row's error came to
    better_rows      of two solutions, the better one of each row
    sweep            one tile of rows: rounds column after column, prunes them, or both; what solve and SparseGPT do

The sweep knows its own error for nothing: with t_k what column k was rounded from, a row's error e·H·eᵀ is
Σ_k (t_k - v_k)²·L_kk². The same L_kk² are the right importance of a column when its group's range is chosen: what its
error will cost after the columns to come have made up for what they can.

A pruned column is one that is rounded to zero: with a `Pruner` the sweep decides which weights go when it reaches them,
from the weights as they are by then, and later columns make up for it as for any other error. With codes and a pruner
both happen in one pass; with `Kept` in place of codes what stays keeps its value (SparseGPT, `methods/prune`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fettle.errors import NonFiniteError
from fettle.methods.quantize.columns import ColumnRounding
from fettle.methods.quantize.sharing import choose_shared
from fettle.tensors.quantized import QuantizedTensor
from fettle.tensors.scales import Shared, stack
from fettle.tensors.scheme import Scheme

BLOCK = 128  # columns that wait for one product
ROW_TILE = 512  # rows in work, at least; fixed, so that no sum depends on the machine
TILE_WEIGHTS = 2**22  # weights in work, at least: a column's step of 2,048 rows costs little more than one of 512
DAMPING_TRIES = 4  # each ten times the one before

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Factor:
    """H + damping = L·Lᵀ with columns arranged by `order`.

    Attributes:
        matrix: float32 [in, in], L[j, k] / L[k, k]: unit lower triangular.
        pivots: float32 [in], L[k, k]².
        order: int64 [in], the column of the weight at each place; the last place is the first to be rounded.
        damping: what was added to the diagonal.
    """

    matrix: Tensor
    pivots: Tensor
    order: Tensor
    damping: float


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Codes, and the error tr(E·H·Eᵀ) of each row, float32 [out]."""

    quantized: QuantizedTensor
    errors: Tensor


def factorize(gram: Tensor, *, damping: float, activation_order: bool) -> Factor:
    """The factor of the gram plus `damping` times its mean diagonal.

    Where rounding leaves that indefinite the damping is made ten times as large, and the log says so.

    Raises:
        NonFiniteError: no damping helps: this is no gram.
    """
    diagonal = gram.diagonal().float()
    if activation_order:
        order = torch.argsort(diagonal, descending=True, stable=True).flip(0)
    else:
        order = torch.arange(len(diagonal) - 1, -1, -1)
    mean = float(diagonal.double().mean())
    for attempt in range(DAMPING_TRIES):
        added = damping * mean if mean > 0 else 1.0
        matrix = gram[order.unsqueeze(1), order].float()  # the one copy
        matrix.diagonal().add_(added)
        # Of a symmetric matrix the transposed view is the same matrix in LAPACK's column order: factored in place.
        lower, info = matrix.mT, torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            roots = lower.diagonal().clone()
            return Factor(matrix=lower.div_(roots), pivots=roots.square(), order=order, damping=added)
        del lower, matrix
        log.warning(
            "the gram is not positive definite with damping %g (try %d); ten times as much", damping, attempt + 1
        )
        damping = max(damping, 1e-4) * 10
    raise NonFiniteError(f"the gram is no matrix of products: not positive definite even with damping {damping / 10:g}")


def corrected(weight: Tensor, drift: Tensor, factor: Factor, strength: float) -> Tensor:
    """The weight whose outputs on the drifted inputs come nearest to the original ones: W + strength·W·D·H⁻¹."""
    target = weight.float().clone()
    unit, order = factor.matrix, factor.order
    for rows in row_slices(*weight.shape):
        pulled = (weight[rows].float() @ drift).T[order]  # [in, rows], arranged as the factor
        half = torch.linalg.solve_triangular(unit, pulled, upper=False, unitriangular=True)
        half.div_(factor.pivots.unsqueeze(1))
        solved = torch.linalg.solve_triangular(unit.mT, half, upper=True, unitriangular=True)
        target[rows, order] += strength * solved.T
    return target


def solve(weight: Tensor, factor: Factor, scheme: Scheme, *, clip: str, activation_order: bool) -> Solution:
    """Ranges by `clip` ("none", "search"), then codes, tile by tile of rows.

    In activation order (and with one scale for all) the ranges are those of the weight; else each group's are chosen
    when its first column is reached, from the weights as they are by then.
    """
    importance = torch.empty_like(factor.pivots)
    importance[factor.order] = factor.pivots
    shared = choose_shared(weight, scheme, clip=clip, importance=importance)
    renewing = not activation_order and scheme.granularity != "tensor"
    chooser = RangeChooser(scheme=scheme, clip=clip, importance=importance) if renewing else None
    tiles = []
    for rows in row_slices(*weight.shape):
        tile = weight[rows]
        columns = ColumnRounding(shared.rows(rows, scheme), scheme=scheme, rows=len(tile))
        swept = sweep(tile, factor, columns, width=scheme.group_width(weight.shape[1]), chooser=chooser)
        quantized = QuantizedTensor.of(swept.codes, columns.shared(), scheme)
        tiles.append(Solution(quantized=quantized, errors=swept.errors))
    if renewing:
        shared = stack([tile.quantized.shared for tile in tiles])
    codes = torch.cat([tile.quantized.codes for tile in tiles])
    return Solution(
        quantized=QuantizedTensor.of(codes, shared, scheme), errors=torch.cat([tile.errors for tile in tiles])
    )


def row_slices(out_features: int, in_features: int | None = None) -> list[slice]:
    """The rows that are worked on together: `ROW_TILE`, or for so many columns a multiple that holds `TILE_WEIGHTS`."""
    step = ROW_TILE if in_features is None else ROW_TILE * max(1, TILE_WEIGHTS // in_features // ROW_TILE)
    return [slice(start, min(start + step, out_features)) for start in range(0, out_features, step)]


def better_rows(one: Solution, other: Solution) -> QuantizedTensor:
    """Of each row the solution with the smaller error; rows that share one scale are taken together."""
    first, second = one.quantized, other.quantized
    if first.scheme.granularity == "tensor":
        return second if float(other.errors.double().sum()) < float(one.errors.double().sum()) else first
    better = (other.errors < one.errors).unsqueeze(1)
    codes = torch.where(better, second.codes, first.codes)
    return QuantizedTensor.of(codes, first.shared.where(second.shared, better), first.scheme)


@dataclass(frozen=True, kw_only=True)
class RangeChooser:
    """How a group's range is chosen from weights that earlier columns have changed."""

    scheme: Scheme
    clip: str
    importance: Tensor  # [in]

    @property
    def width(self) -> int:
        """Columns that share a range."""
        return self.scheme.group_width(len(self.importance))

    def choose(self, weights: Tensor, columns: slice) -> Shared:
        """What is shared, [rows, 1], of one group's weights [rows, width], which are these columns."""
        one_group = replace(self.scheme, granularity="channel", group_size=None)
        return choose_shared(weights, one_group, clip=self.clip, importance=self.importance[columns])


class Pruner(Protocol):
    """Decides for one tile of rows which weights go, `width` columns at a time, from left to right."""

    @property
    def width(self) -> int:
        """Columns that are decided together."""
        ...

    def choose(self, weights: Tensor, importance: Tensor, columns: slice) -> Tensor:
        """What stays of these columns, bool [rows, columns], from the weights as they are by now and what an error in
        each column costs, [columns].
        """
        ...

    def preview(self, weights: Tensor, importance: Tensor) -> Tensor:
        """What would stay of any columns, decided alone; it binds nobody."""
        ...


class Columns(Protocol):
    """What a column becomes: codes of a grid (`ColumnRounding`), or what it is (`Kept`)."""

    dtype: torch.dtype

    def nearest(self, target: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """What is noted down, and the value that it stands for, [rows] each."""
        ...

    def renew_(self, group: int, shared: Shared) -> None:
        """Puts another scale in one group's place."""
        ...


class Kept:
    """No grid: a column stays what it is."""

    dtype = torch.float32

    def nearest(self, target: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """The value, twice."""
        return target, target

    def renew_(self, group: int, shared: Shared) -> None:
        """There are no scales."""


@dataclass(frozen=True, kw_only=True)
class Swept:
    """One tile: codes (values with `Kept`) [rows, in], each row's error, and what stayed, bool [rows, in]."""

    codes: Tensor
    errors: Tensor
    kept: Tensor | None


def sweep(
    weight: Tensor,
    factor: Factor,
    columns: Columns,
    *,
    width: int | None = None,
    chooser: RangeChooser | None = None,
    pruner: Pruner | None = None,
) -> Swept:
    """Rounds, or prunes, every column of one tile of rows, [rows, in].

    With a chooser each group's range is chosen anew when its first column is reached, and with a pruner what stays of
    its next columns is decided then (both for columns from left to right only).
    """
    matrix, in_features = factor.matrix, weight.shape[1]
    arranged = weight.float().T[factor.order]  # [in, rows]: a column is a contiguous row of it
    errors = torch.zeros_like(arranged)
    codes = torch.empty(arranged.shape, dtype=columns.dtype)
    kept = None if pruner is None else torch.ones(arranged.shape, dtype=torch.bool)
    group_width = width or (in_features if chooser is None else chooser.width)
    places, pivots = factor.order.tolist(), factor.pivots.tolist()
    cost = torch.zeros(len(weight))
    for stop in range(in_features, 0, -BLOCK):
        start = max(0, stop - BLOCK)
        targets = arranged[start:stop] + matrix[stop:, start:stop].T @ errors[stop:]
        for place in range(stop - 1, start - 1, -1):
            column, target = places[place], targets[place - start]
            if pruner is not None and kept is not None and column % pruner.width == 0:
                span = slice(max(0, place - pruner.width + 1), place + 1)
                changed = _changed_weights(arranged, errors, matrix, span).flip(0).T
                chosen = pruner.choose(changed, factor.pivots[span].flip(0), _columns_of(span, in_features))
                kept[span] = chosen.T.flip(0)
            if chooser is not None and column % group_width == 0:
                span = slice(max(0, place - group_width + 1), place + 1)
                changed = _changed_weights(arranged, errors, matrix, span).flip(0).T
                if pruner is not None and kept is not None:
                    known = pruner.width % group_width == 0
                    stays = kept[span].flip(0).T if known else pruner.preview(changed, factor.pivots[span].flip(0))
                    changed = changed * stays  # a range holds zero anyway
                columns.renew_(column // group_width, chooser.choose(changed, _columns_of(span, in_features)))
            code, value = columns.nearest(target, column // group_width)
            if kept is not None:
                value = value * kept[place]
            codes[place] = code
            torch.sub(arranged[place], value, out=errors[place])
            missed = target - value
            cost.addcmul_(missed, missed, value=pivots[place])
            targets[: place - start].addr_(matrix[place, start:place], errors[place])
    return Swept(codes=_in_order(codes, factor), errors=cost, kept=None if kept is None else _in_order(kept, factor))


def _columns_of(span: slice, in_features: int) -> slice:
    """The columns at these places, where the last place is the leftmost column."""
    return slice(in_features - span.stop, in_features - span.start)


def _in_order(arranged: Tensor, factor: Factor) -> Tensor:
    """[in, rows] by place → [rows, in] by column."""
    found = torch.empty_like(arranged)
    found[factor.order] = arranged
    return found.T.contiguous()


def _changed_weights(arranged: Tensor, errors: Tensor, matrix: Tensor, places: slice) -> Tensor:
    """The weights at these places as everything done so far has changed them, while none of them is rounded yet.

    A place takes up the errors after it; one that is still free hands on its change as an error of its own. So the
    changes x of the free places solve x_k = Σ_{j > k, done} e_j·M[j, k] - Σ_{j > k, free} x_j·M[j, k], a triangular
    system.
    """
    pulled = matrix[places.stop :, places].T @ errors[places.stop :]
    free: Tensor = torch.linalg.solve_triangular(matrix[places, places].mT, pulled, upper=True, unitriangular=True)
    free += arranged[places]
    return free
