"""What the codes of a tensor, a row or a group share: scale, zero point, or a table of learned levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fettle.tensors.scheme import Scheme


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """Scales and their companions of some rows.

    Attributes:
        scale: `scheme.value_dtype` [rows, groups]; channel [rows, 1]; tensor [1, 1]; ones with learned levels.
        zero_point: uint8 as `scale`, the code that stands for zero; None without.
        levels: `scheme.value_dtype` [rows, groups, 2**bits], ascending, with the learned grid only.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    levels: Tensor | None = None

    def rows(self, rows: slice, scheme: Scheme) -> Shared:
        """Those of some rows: all of them where one is for the whole tensor."""
        if scheme.granularity == "tensor":
            return self
        return Shared(
            scale=self.scale[rows],
            zero_point=None if self.zero_point is None else self.zero_point[rows],
            levels=None if self.levels is None else self.levels[rows],
        )

    def over(self, tensor_scale: Tensor | None) -> Shared:
        """The same with its scales divided by the tensor scale, float32; itself where there is none."""
        if tensor_scale is None:
            return self
        return Shared(scale=self.scale.float() / tensor_scale, zero_point=self.zero_point, levels=self.levels)

    def where(self, other: Shared, take_other: Tensor) -> Shared:
        """Of each row this one's, or the other's where `take_other` [rows, 1] says so."""
        zero_point, levels = self.zero_point, self.levels
        if zero_point is not None and other.zero_point is not None:
            zero_point = torch.where(take_other, other.zero_point, zero_point)
        if levels is not None and other.levels is not None:
            levels = torch.where(take_other.unsqueeze(-1), other.levels, levels)
        return Shared(scale=torch.where(take_other, other.scale, self.scale), zero_point=zero_point, levels=levels)


def stack(tiles: list[Shared]) -> Shared:
    """Those of consecutive rows as one."""
    if len(tiles) == 1:
        return tiles[0]
    zero_points = [tile.zero_point for tile in tiles if tile.zero_point is not None]
    levels = [tile.levels for tile in tiles if tile.levels is not None]
    return Shared(
        scale=torch.cat([tile.scale for tile in tiles]),
        zero_point=torch.cat(zero_points) if zero_points else None,
        levels=torch.cat(levels) if levels else None,
    )
