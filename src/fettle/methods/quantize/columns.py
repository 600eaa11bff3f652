"""Rounding one column of all rows at a time: what GPTQ's sweep and the refinement share.

Everything is held the other way round, [columns or groups, rows], so that a column is contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fettle.tensors.scheme import Scheme


class ColumnRounding:
    """Scales and zero points of one tile of rows, ready for rounding column by column.

    Attributes:
        scale: float32 [groups, rows], exactly the stored values.
    """

    def __init__(self, scale: Tensor, zero_point: Tensor | None, *, scheme: Scheme, rows: int) -> None:
        self._scheme = scheme
        self._dtype = scheme.torch_scale_dtype
        self._rows = rows
        self._whole = scheme.granularity == "tensor"
        grid = scheme.grid
        self._table = grid.table()
        self._midpoints = None if grid.is_uniform else grid.midpoints()
        self._steps = 2**grid.bits - 1
        self.scale = self._by_group(scale)
        zero = torch.full_like(self.scale, 2 ** (grid.bits - 1)) if zero_point is None else self._by_group(zero_point)
        self._lowest, self._highest = -zero, self._steps - zero  # in units of the scale, uniform grids only

    def _by_group(self, values: Tensor) -> Tensor:
        return values.float().expand(self._rows, -1).T.contiguous()

    def nearest(self, target: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Codes (as float32, or indices) and the stored values nearest to one column, [rows] each."""
        scale = self.scale[group]
        units = target / scale
        if self._midpoints is not None:
            code = torch.bucketize(units, self._midpoints)
            return code, self.stored(self._table[code], group)
        lowest = self._lowest[group]
        units.round_().clamp_(lowest, self._highest[group])
        return units - lowest, self.stored(units, group)

    def units(self, codes: Tensor, group: int) -> Tensor:
        """Levels less zero of codes [columns, rows] of one group: what the scale is multiplied with."""
        if self._midpoints is not None:
            return self._table[codes.int()]
        return codes.float().add_(self._lowest[group])

    def stored(self, units: Tensor, group: int) -> Tensor:
        """Units times scale as a file's reader computes it: rounded to the scale's type. units [..., rows]."""
        values = units * self.scale[group]
        return values if self._dtype == torch.float32 else values.to(self._dtype).float()

    def renew_(self, group: int, shared: tuple[Tensor, Tensor | None]) -> None:
        """Puts another scale and zero point, [rows, 1] each, in one group's place."""
        scale, zero_point = shared
        self.scale[group] = scale[:, 0].float()
        if zero_point is not None:
            self._lowest[group] = -zero_point[:, 0].float()
            self._highest[group] = self._steps + self._lowest[group]

    def shared(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point as they are stored, [rows or 1, groups]."""
        keep = slice(0, 1) if self._whole else slice(None)
        scale = self.scale.T[keep].to(self._dtype).contiguous()
        return scale, (-self._lowest.T[keep]).to(torch.uint8).contiguous() if self._scheme.zero_point else None


def rows_of(scale: Tensor, zero_point: Tensor | None, rows: slice, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """The scales and zero points of some rows: all of them where one is for the whole tensor."""
    if scheme.granularity == "tensor":
        return scale, zero_point
    return scale[rows], None if zero_point is None else zero_point[rows]
