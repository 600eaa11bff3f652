"""Makes codes and scales that a method has chosen better, one exact step at a time.

With E = W - V and H the (damped) gram, the error of the outputs is J = tr(E·H·Eᵀ), row by row. Two steps lower it:

    a code     of column k alone: J is least at v_k + (E·H)_k / H_kk; take the nearest level (coordinate descent)
    a scale    of a group with codes q: J is quadratic in it, least at s + qᵀ(H·E)_g / qᵀH_gg q; take it as it will be
               stored, and only where J really falls

Coordinate descent on the codes is QuantEase (Behdin et al. 2023, https://arxiv.org/abs/2309.01885); the scale step is
least squares. A pass goes once over all groups and columns. No step raises J, so neither does any number of passes.

Cost: out·in² multiply-adds a pass, twice that where a group is wider than a block. Memory: a tile of rows
(`sweep.py`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fettle.methods.quantize.columns import ColumnRounding
from fettle.methods.quantize.ranges import stored_scale
from fettle.methods.quantize.sweep import row_slices
from fettle.tensors.quantized import QuantizedTensor, row_tiles
from fettle.tensors.remainder import Remainder
from fettle.tensors.scales import Shared, stack
from fettle.tensors.scheme import Scheme

BLOCK = 128  # columns that wait for one product


def refine(quantized: QuantizedTensor, weight: Tensor, gram: Tensor, *, damping: float, passes: int) -> QuantizedTensor:
    """Codes and scales with no larger error on inputs with this gram; pure.

    Args:
        quantized: where to start; a remainder and a tensor scale stay as they are.
        weight: [out, in], what the values should be, the remainder included.
        gram: [in, in].
        damping: added to the gram's diagonal; what the sweep before used.
        passes: at most; a tile of rows stops when nothing changes.
    """
    if passes < 1:
        return quantized
    if quantized.remainder is not None or quantized.tensor_scale is not None:
        return _around_the_rest(quantized, weight, gram, damping, passes)
    codes = torch.empty_like(quantized.codes)
    tiles: list[Shared] = []
    for rows in row_slices(*weight.shape):
        tile = _Tile(quantized, weight, gram, damping, rows)
        for _ in range(passes):
            if not tile.improve_():
                break
        codes[rows] = tile.codes.T
        tiles.append(tile.rounding.shared())
    shared = quantized.shared if quantized.scheme.granularity == "tensor" else stack(tiles)
    return QuantizedTensor.of(codes, shared, quantized.scheme)


def _around_the_rest(
    quantized: QuantizedTensor, weight: Tensor, gram: Tensor, damping: float, passes: int
) -> QuantizedTensor:
    """`refine` for the codes alone: what they should be is the weight less the remainder, in units of its scale."""
    target = weight if quantized.remainder is None else less_remainder(weight, quantized.remainder)
    if quantized.tensor_scale is not None:
        target = target.float() * quantized.tensor_scale
    bare = QuantizedTensor.of(quantized.codes, quantized.shared, quantized.scheme.codes_alone)
    better = refine(bare, target, gram, damping=damping, passes=passes)
    return replace(
        quantized, codes=better.codes, scale=better.scale, zero_point=better.zero_point, levels=better.levels
    )


def less_remainder(weight: Tensor, remainder: Remainder) -> Tensor:
    """What is left for the codes, float32 [out, in]."""
    left = torch.empty(weight.shape, dtype=torch.float32)
    for rows in row_tiles(weight.shape[0], weight.shape[1]):
        tile = weight[rows].float()
        left[rows] = tile - remainder.add_to_(torch.zeros_like(tile), rows)
    return left


class _Tile:
    """Some rows in work, the other way round: codes and errors [in, rows]."""

    def __init__(self, quantized: QuantizedTensor, weight: Tensor, gram: Tensor, damping: float, rows: slice) -> None:
        self.scheme: Scheme = quantized.scheme
        self.gram, self.damping = gram, damping
        self.weight = weight[rows].float().T.contiguous()
        self.codes = quantized.codes[rows].T.contiguous()
        shared = quantized.shared.rows(rows, self.scheme)
        self.rounding = ColumnRounding(shared, scheme=self.scheme, rows=self.weight.shape[1])
        self.in_features = len(self.weight)
        self.width = self.scheme.group_width(self.in_features)
        self.errors = torch.empty_like(self.weight)
        for group in range(self.scheme.group_count(self.in_features)):
            columns = self._columns(group)
            units = self.rounding.units(self.codes[columns], group)
            self.errors[columns] = self.weight[columns] - self.rounding.stored(units, group)

    def improve_(self) -> bool:
        """One pass over all groups and columns; whether anything changed."""
        changed = False
        groups = self.scheme.group_count(self.in_features)
        together = max(1, BLOCK // self.width)
        for first in range(0, groups, together):
            some = range(first, min(first + together, groups))
            columns = slice(self._columns(some[0]).start, self._columns(some[-1]).stop)
            gradient = self._gradient(columns)
            if self.scheme.granularity != "tensor" and not self.scheme.grid.is_learned:
                for group in some:
                    changed |= self._refit_scale_(group, columns, gradient)
            if columns.stop - columns.start <= BLOCK:
                changed |= self._move_codes_(columns, gradient)
                continue
            del gradient
            for start in range(columns.start, columns.stop, BLOCK):
                block = slice(start, min(start + BLOCK, columns.stop))
                changed |= self._move_codes_(block, self._gradient(block))
        return changed

    def _columns(self, group: int) -> slice:
        return slice(group * self.width, min((group + 1) * self.width, self.in_features))

    def _gradient(self, columns: slice) -> Tensor:
        """(H·E) of some columns, [columns, rows]: half the slope of J."""
        return torch.addmm(self.errors[columns], self.gram[columns], self.errors, beta=self.damping)

    def _product(self, rows: slice, columns: slice, change: Tensor) -> Tensor:
        """H[rows, columns]·change, the damping included; `columns` lies within `rows`."""
        product = self.gram[rows, columns] @ change
        product[columns.start - rows.start : columns.stop - rows.start].add_(change, alpha=self.damping)
        return product

    def _refit_scale_(self, group: int, block: slice, gradient: Tensor) -> bool:
        columns = self._columns(group)
        inside = slice(columns.start - block.start, columns.stop - block.start)
        rounding = self.rounding
        old = rounding.scale[group].clone()
        units = rounding.units(self.codes[columns], group)
        bend = (units * self._product(columns, columns, units)).sum(0)
        step = (units * gradient[inside]).sum(0) / bend
        wanted = torch.where((bend > 0) & (old + step > 0), old + step, old)
        rounding.scale[group] = stored_scale(wanted, self.scheme).float()
        change = self.weight[columns] - rounding.stored(units, group) - self.errors[columns]
        gain = (change * (2 * gradient[inside] + self._product(columns, columns, change))).sum(0)
        worse = ~(gain < 0)
        rounding.scale[group] = torch.where(worse, old, rounding.scale[group])
        change.masked_fill_(worse, 0)
        self.errors[columns] += change
        gradient += self._product(block, columns, change)
        return not bool(worse.all())

    def _move_codes_(self, block: slice, gradient: Tensor) -> bool:
        start = block.start
        before = self.codes[block].clone()
        diagonal = (self.gram.diagonal()[block] + self.damping).tolist()
        for column in range(start, block.stop):
            bend = diagonal[column - start]
            if bend <= 0:
                continue
            group = column // self.width
            error = self.errors[column]
            target = self.weight[column] - error + gradient[column - start] / bend
            code, value = self.rounding.nearest(target, group)
            change = self.weight[column] - value - error
            self.codes[column] = code
            error += change
            gradient.addr_(self.gram[block, column], change)
            gradient[column - start].add_(change, alpha=self.damping)
        return not torch.equal(before, self.codes[block])
