"""Rounding one column of all rows at a time: what GPTQ's sweep and the refinement share.

Everything is held the other way round, [columns or groups, rows], so that a column is contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fettle.tensors.scales import Shared
from fettle.tensors.scheme import Scheme


class ColumnRounding:
    """Scales and zero points, or levels, of one tile of rows, ready for rounding column by column.

    Attributes:
        scale: float32 [groups, rows], exactly the stored values.
        levels: float32 [groups, rows, 2**bits] with the learned grid; None with any other.
        dtype: of the codes once they are noted down.
    """

    dtype = torch.uint8

    def __init__(self, shared: Shared, *, scheme: Scheme, rows: int) -> None:
        self._scheme = scheme
        self._dtype = scheme.value_dtype
        self._rows = rows
        self._whole = scheme.granularity == "tensor"
        grid = scheme.grid
        self._table = None if grid.is_uniform or grid.is_learned else grid.table()
        self._midpoints = None if self._table is None else grid.midpoints()
        self._steps = 2**grid.bits - 1
        self.scale = self._by_group(shared.scale)
        self.levels: Tensor | None = None
        if shared.levels is not None:
            self.levels = shared.levels.float().expand(rows, -1, -1).transpose(0, 1).contiguous()
        zero_point = shared.zero_point
        zero = torch.full_like(self.scale, 2 ** (grid.bits - 1)) if zero_point is None else self._by_group(zero_point)
        self._lowest, self._highest = -zero, self._steps - zero  # in units of the scale, uniform grids only

    def _by_group(self, values: Tensor) -> Tensor:
        return values.float().expand(self._rows, -1).T.contiguous()

    def nearest(self, target: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Codes (as float32, or indices) and the stored values nearest to one column, [rows] each."""
        if self.levels is not None:
            table = self.levels[group]
            code = torch.searchsorted((table[:, 1:] + table[:, :-1]) / 2, target.unsqueeze(1))
            return code[:, 0], table.gather(1, code)[:, 0]
        scale = self.scale[group]
        units = target / scale
        if self._midpoints is not None and self._table is not None:
            code = torch.bucketize(units, self._midpoints)
            return code, self.stored(self._table[code], group)
        lowest = self._lowest[group]
        units.round_().clamp_(lowest, self._highest[group])
        return units - lowest, self.stored(units, group)

    def units(self, codes: Tensor, group: int) -> Tensor:
        """Levels less zero of codes [columns, rows] of one group: what the scale is multiplied with."""
        if self.levels is not None:
            return self.levels[group].gather(1, codes.T.long()).T.contiguous()
        if self._table is not None:
            return self._table[codes.int()]
        return codes.float().add_(self._lowest[group])

    def stored(self, units: Tensor, group: int) -> Tensor:
        """Units times scale as a file's reader computes it: rounded to the scale's type. units [..., rows]."""
        values = units * self.scale[group]
        return values if self._dtype == torch.float32 else values.to(self._dtype).float()

    def renew_(self, group: int, shared: Shared) -> None:
        """Puts another scale and zero point, or levels, [rows, 1] each, in one group's place."""
        self.scale[group] = shared.scale[:, 0].float()
        if self.levels is not None and shared.levels is not None:
            self.levels[group] = shared.levels[:, 0].float()
        if shared.zero_point is not None:
            self._lowest[group] = -shared.zero_point[:, 0].float()
            self._highest[group] = self._steps + self._lowest[group]

    def shared(self) -> Shared:
        """Scale, zero point and levels as they are stored, [rows or 1, groups]."""
        keep = slice(0, 1) if self._whole else slice(None)
        zero_point = (-self._lowest.T[keep]).to(torch.uint8).contiguous() if self._scheme.zero_point else None
        return Shared(
            scale=self.scale.T[keep].to(self._dtype).contiguous(),
            zero_point=zero_point,
            levels=None if self.levels is None else self.levels.transpose(0, 1)[keep].to(self._dtype).contiguous(),
        )
