"""GPTQ: round one column after another, and let the columns still to come make up for the error so far.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, 2022, https://arxiv.org/abs/2210.17323. For a weight W and the gram H of its
inputs it lowers the error of the outputs, tr((W - V)·H·(W - V)ᵀ), over values V that codes can stand for.

The paper removes one column at a time from H⁻¹, through the Cholesky factor of the inverse. Ours is the same recursion
without an inverse. With H = L·Lᵀ, L lower triangular, columns are taken from the last to the first:

    v_k = nearest(w_k + Σ_{j > k} (w_j - v_j)·L[j, k] / L[k, k])

gives the same codes (the equivalence is theorem 6 of QuIP, Chee et al. 2023, https://arxiv.org/abs/2307.13304; a test
compares with the naive update by an explicit inverse, column by column). It takes one factorization in place of two and
an inversion, loses less to rounding, and holds one matrix [in, in] beside the gram.

    weights   to come: w  w  w │ block: w  w │ done: v  v      a block first takes up all errors after it, in one
    errors             0  0  0 │        0  0 │       e  e      product, then goes column by column, all rows at once

The columns are arranged so that the last one is the first to go: the strongest input in activation order (while there
is most freedom to make up for it), else the leftmost. Four choices are ours:

- Scales. In activation order they come from the original weight's groups (static groups), so that nothing of the order
  has to be stored. Without it, a group's scale comes from the weights as earlier columns have changed them (the paper).
- `clip: search` takes the range with the least error weighted by the gram's diagonal, not the full range.
- `refine_passes` afterwards refit scales and move codes while the error falls (`refine.py`).
- `correction`: blocks before this one are compressed already, so its inputs X drifted from the original X°. Where the
  walk collects the statistic "drift", D = (X° - X)ᵀX, the weight to be approached is W + c·W·D·H⁻¹, which with c = 1
  gives the original outputs back in the least-squares sense (GPTAQ, Li et al. 2025, https://arxiv.org/abs/2504.02692).
  c = 1/2 measured as good as 1 at 4 bits and better below: the drift is partly noise of the calibration text.

Plain paper: clip none, refine_passes 0, correction 0. Measured on stories260K (asymmetric, group 32, KL over that of
round to nearest, 4 / 3 / 2 bits): plain 0.64 / 0.61 / 0.72; with clip and refinement 0.54 / 0.48 / 0.40; and with the
correction as well 0.43 / 0.35 / 0.28.

Dead columns (never driven) have no part in H but the damping: they are rounded to nearest and disturb nobody.
Cost: in³/3 for the factor, out·in²/2 multiply-adds for the sweep, out·in² for each refining pass. Memory: one float32
[in, in], the codes, and tiles of 512 rows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fettle.errors import NonFiniteError
from fettle.methods.quantize.columns import ColumnRounding, rows_of
from fettle.methods.quantize.fields import UniformFields
from fettle.methods.quantize.refine import refine
from fettle.methods.quantize.round_to_nearest import choose_ranges
from fettle.tensors.quantized import QuantizedTensor
from fettle.tensors.scheme import Scheme

BLOCK = 128  # columns that wait for one product
ROW_TILE = 512  # rows in work; fixed, so that no sum depends on the machine
DAMPING_TRIES = 4  # each ten times the one before

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Gptq(UniformFields):
    """GPTQ: rounds column after column, and later columns make up for the error of earlier ones."""

    name: ClassVar[str] = "gptq"
    title: ClassVar[str] = "GPTQ"
    source: ClassVar[str] = "Frantar et al. 2022, https://arxiv.org/abs/2210.17323"
    statistics: ClassVar[tuple[str, ...]] = ("gram", "drift")
    objective: ClassVar[str] = "output_error"

    damping: float = field(
        default=0.01,
        metadata={"help": "added to the gram's diagonal, as a part of its mean", "minimum": 0.0, "maximum": 1.0},
    )
    activation_order: bool = field(
        default=True, metadata={"help": "strongest inputs first, with scales fixed beforehand"}
    )
    clip: Literal["none", "search"] = field(
        default="search",
        metadata={
            "help": "the full range of each group (the paper), or the one with the least error weighted by the gram"
        },
    )
    refine_passes: int = field(
        default=2,
        metadata={
            "help": "passes that refit scales and move codes while the error falls; 0 is the paper",
            "minimum": 0,
            "maximum": 100,
        },
    )

    correction: float = field(
        default=0.5,
        metadata={
            "help": "how much of earlier blocks' drift to make up for, where the walk measures it; 0 is the paper",
            "minimum": 0.0,
            "maximum": 1.0,
        },
    )

    def needs(self) -> tuple[str, ...]:
        """The gram; the drift where it is corrected."""
        return ("gram", "drift") if self.correction > 0 else ("gram",)

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> QuantizedTensor:
        """Chooses codes for weight [out, in] with the gram [in, in] of its inputs."""
        options = GptqOptions(
            damping=self.damping,
            activation_order=self.activation_order,
            clip=self.clip,
            refine_passes=self.refine_passes,
            correction=self.correction,
        )
        return gptq(weight, statistics["gram"], self.scheme(dtype), options, drift=statistics.get("drift"))


@dataclass(frozen=True, kw_only=True)
class GptqOptions:
    """What `gptq` may do; the defaults are the plain paper with activation order."""

    damping: float = 0.01
    activation_order: bool = True
    clip: str = "none"
    refine_passes: int = 0
    correction: float = 0.0


def gptq(
    weight: Tensor, gram: Tensor, scheme: Scheme, options: GptqOptions | None = None, drift: Tensor | None = None
) -> QuantizedTensor:
    """Codes of weight [out, in] that keep its outputs on inputs with this gram [in, in]; pure.

    Args:
        weight: [out, in], any floating type.
        gram: float32 [in, in], symmetric.
        scheme: any grid and granularity.
        options: see `GptqOptions`.
        drift: float32 [in, in], (original inputs - inputs)ᵀ·inputs, for options.correction; None for no drift.

    Raises:
        NonFiniteError: NaN or infinity in the weight or the gram, or a scale beyond its type.
    """
    options = options or GptqOptions()
    diagonal = gram.diagonal().float()
    if not bool(torch.isfinite(diagonal).all()):
        raise NonFiniteError("the gram of this linear's inputs holds NaN or infinity; check the block before it")
    order = processing_order(diagonal, activation_order=options.activation_order)
    factor, damping = damped_factor(gram, order, options.damping)
    if drift is not None and options.correction > 0:
        weight = corrected(weight, drift, factor, order, options.correction)
    factor.div_(factor.diagonal().clone())
    importance = diagonal + damping
    scale, zero_point = choose_ranges(weight, scheme, clip=options.clip, importance=importance)
    renew = None
    if not options.activation_order and scheme.granularity != "tensor":
        renew = RangeChooser(scheme=scheme, clip=options.clip, importance=importance)
    solved = []
    for start in range(0, weight.shape[0], ROW_TILE):
        rows = slice(start, start + ROW_TILE)
        solved.append(sweep(weight[rows], rows_of(scale, zero_point, rows, scheme), factor, order, scheme, renew))
    del factor
    if renew is not None:
        scale = torch.cat([tile.scale for tile in solved])
        zero_point = (
            torch.cat([tile.zero_point for tile in solved if tile.zero_point is not None])
            if scheme.zero_point
            else None
        )
    codes = torch.cat([tile.codes for tile in solved])
    del solved
    quantized = QuantizedTensor(codes=codes, scale=scale, zero_point=zero_point, scheme=scheme)
    return refine(quantized, weight, gram, damping=damping, passes=options.refine_passes)


def processing_order(diagonal: Tensor, *, activation_order: bool) -> Tensor:
    """Columns arranged so that the last is the first to be rounded: int64 [in]."""
    if activation_order:
        return torch.argsort(diagonal, descending=True, stable=True).flip(0)
    return torch.arange(len(diagonal) - 1, -1, -1)


def damped_factor(gram: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float]:
    """The Cholesky factor of the arranged, damped gram; and the damping used.

    The damping is a part of the mean diagonal. Where rounding leaves the matrix indefinite it is made ten times as
    large, and the log says so.

    Returns:
        float32 [in, in] lower triangular, and what was added to the diagonal.

    Raises:
        NonFiniteError: no damping helps: this is no gram.
    """
    mean = float(gram.diagonal().double().mean())
    for attempt in range(DAMPING_TRIES):
        added = damping * mean if mean > 0 else 1.0
        matrix = gram[order.unsqueeze(1), order].float()  # the one copy
        matrix.diagonal().add_(added)
        # Of a symmetric matrix the transposed view is the same matrix in LAPACK's column order: factored in place.
        factor, info = matrix.mT, torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(factor, out=(factor, info))
        if int(info) == 0 and bool(torch.isfinite(factor.diagonal()).all()):
            return factor, added
        del factor, matrix
        log.warning(
            "the gram is not positive definite with damping %g (try %d); ten times as much", damping, attempt + 1
        )
        damping = max(damping, 1e-4) * 10
    raise NonFiniteError(f"the gram is no matrix of products: not positive definite even with damping {damping / 10:g}")


def corrected(weight: Tensor, drift: Tensor, factor: Tensor, order: Tensor, strength: float) -> Tensor:
    """The weight whose outputs on the drifted inputs come nearest to the original ones: W + strength·W·D·H⁻¹."""
    target = weight.float().clone()
    for start in range(0, weight.shape[0], ROW_TILE):
        rows = slice(start, start + ROW_TILE)
        pulled = (weight[rows].float() @ drift).T[order]  # [in, rows], arranged as the factor
        target[rows, order] += strength * torch.cholesky_solve(pulled, factor).T
    return target


@dataclass(frozen=True, kw_only=True)
class RangeChooser:
    """How a group's range is chosen from weights that earlier columns have changed."""

    scheme: Scheme
    clip: str
    importance: Tensor  # [in]

    def choose(self, weights: Tensor, columns: slice) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point [rows, 1] of one group's weights [rows, width], which are these columns."""
        one_group = replace(self.scheme, granularity="channel", group_size=None)
        return choose_ranges(weights, one_group, clip=self.clip, importance=self.importance[columns])


def sweep(
    weight: Tensor,
    shared: tuple[Tensor, Tensor | None],
    factor: Tensor,
    order: Tensor,
    scheme: Scheme,
    renew: RangeChooser | None,
) -> QuantizedTensor:
    """Rounds every column of one tile of rows, [rows, in]; `shared` is its scale and zero point, [rows or 1, groups].

    `factor` has a unit diagonal: L[j, k] / L[k, k].

    With `renew`, each group's range is chosen anew when its first column is reached (columns from left to right only).
    """
    in_features = weight.shape[1]
    columns = ColumnRounding(*shared, scheme=scheme, rows=len(weight))
    arranged = weight.float().T[order]  # [in, rows]: a column is a contiguous row of it
    errors = torch.zeros_like(arranged)
    codes = torch.empty(arranged.shape, dtype=torch.uint8)
    width = scheme.group_width(in_features)
    places = order.tolist()  # the column of the weight that stands at each place
    for stop in range(in_features, 0, -BLOCK):
        start = max(0, stop - BLOCK)
        targets = arranged[start:stop] + factor[stop:, start:stop].T @ errors[stop:]
        for place in range(stop - 1, start - 1, -1):
            column = places[place]
            if renew is not None and column % width == 0:
                changed = _changed_weights(arranged, errors, factor, slice(max(0, place - width + 1), place + 1))
                columns.renew_(column // width, renew.choose(changed.flip(0).T, slice(column, column + width)))
            code, value = columns.nearest(targets[place - start], column // width)
            codes[place] = code
            torch.sub(arranged[place], value, out=errors[place])
            targets[: place - start].addr_(factor[place, start:place], errors[place])
    found = torch.empty_like(codes)
    found[order] = codes
    scale, zero_point = columns.shared()
    return QuantizedTensor(codes=found.T.contiguous(), scale=scale, zero_point=zero_point, scheme=scheme)


def _changed_weights(arranged: Tensor, errors: Tensor, factor: Tensor, places: slice) -> Tensor:
    """The weights at these places as everything done so far has changed them, while none of them is rounded yet.

    A place takes up the errors after it; one that is still free hands on its change as an error of its own. So the errors x of
    the free places solve x_k = -Σ_{j > k} e_j·L[j, k]/L[k, k], a triangular system.
    """
    pulled = factor[places.stop :, places].T @ errors[places.stop :]
    free = torch.linalg.solve_triangular(factor[places, places].mT, pulled, upper=True, unitriangular=True)
    return arranged[places] + free
