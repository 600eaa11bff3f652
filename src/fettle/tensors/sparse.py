"""A few weights kept apart, with their places: the sparse remainder.

    weight_sparse_values   16 bits   [count]     what is added to the code's value there
    weight_sparse_columns  integer   [count]     row by row, ascending in each row
    weight_sparse_offsets  integer   [out + 1]   row r owns the entries offsets[r] … offsets[r + 1] - 1

count = ⌊share · out · in⌋ for the whole weight, so the file's length is known before any weight is seen. Integers have
the narrowest of uint8, int16, int32 that their largest value fits in: places cost 8 bits each up to 256 columns and 16
up to 32768. A weight with count 0 stores none of the three.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fettle.errors import CheckpointError, RecipeError
from fettle.tensors.remainder import TensorSpec, sixteen_bits

LARGEST_SHARE = 0.05  # more are stored better as wider codes


@dataclass(frozen=True, kw_only=True)
class SparseScheme:
    """How many weights are kept apart.

    Attributes:
        share: of the weights of a linear, above 0 and at most 0.05.
    """

    kind: ClassVar[str] = "sparse"
    share: float

    def validate(self) -> None:
        """Checks the share.

        Raises:
            RecipeError: it cannot be.
        """
        share = self.share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= LARGEST_SHARE:
            raise RecipeError(
                f"a share of {share!r} of the weights cannot be kept apart; allowed: above 0, at most "
                f"{LARGEST_SHARE}. Try 0.005"
            )

    def count(self, shape: tuple[int, int]) -> int:
        """How many weights of [out, in] are kept."""
        return math.floor(self.share * shape[0] * shape[1])

    def state_spec(self, shape: tuple[int, int], scale_dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Name, type and shape of the three tensors; nothing where no weight is kept."""
        count = self.count(shape)
        if not count:
            return {}
        return {
            "weight_sparse_values": (sixteen_bits(scale_dtype), (count,)),
            "weight_sparse_columns": (index_dtype(shape[1] - 1), (count,)),
            "weight_sparse_offsets": (index_dtype(count), (shape[0] + 1,)),
        }

    def from_state(self, state: Mapping[str, Tensor], shape: tuple[int, int]) -> SparseTensor | None:
        """The remainder of a weight [out, in], unchecked; None where nothing is kept."""
        if not self.count(shape):
            return None
        return SparseTensor(
            values=state["weight_sparse_values"],
            columns=state["weight_sparse_columns"],
            offsets=state["weight_sparse_offsets"],
            shape=shape,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"kind": self.kind, "share": self.share}

    def describe(self) -> str:
        """For people: "0.5% outliers"."""
        return f"{100 * self.share:g}% outliers"


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseTensor:
    """A few entries of a matrix [out, in], row by row.

    Attributes:
        values: float16 or bfloat16 [count].
        columns: integers [count], ascending in each row.
        offsets: integers [out + 1], where each row begins and the last one ends.
        shape: (out, in).
    """

    values: Tensor
    columns: Tensor
    offsets: Tensor
    shape: tuple[int, int]

    @classmethod
    def at(cls, places: Tensor, values: Tensor, shape: tuple[int, int]) -> SparseTensor:
        """Values (in their stored type) at `places`, int64 [count]: row · in + column, ascending."""
        rows = torch.div(places, shape[1], rounding_mode="floor")
        offsets = torch.zeros(shape[0] + 1, dtype=torch.int64)
        offsets[1:] = torch.bincount(rows, minlength=shape[0]).cumsum(0)
        return cls(
            values=values,
            columns=(places - rows * shape[1]).to(index_dtype(shape[1] - 1)),
            offsets=offsets.to(index_dtype(len(places))),
            shape=shape,
        )

    def places(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Rows, counted from the slice's first, and columns of the entries in some rows: int64 [entries] each."""
        first, last, _ = rows.indices(self.shape[0])
        offsets = self.offsets[first : last + 1].long()
        own = torch.arange(last - first, device=offsets.device).repeat_interleave(offsets.diff())
        return own, self.columns[int(offsets[0]) : int(offsets[-1])].long()

    def add_to_(self, tile: Tensor, rows: slice) -> Tensor:
        """Adds the entries of some rows to a float32 tile [rows, in], in place."""
        first, last, _ = rows.indices(self.shape[0])
        span = slice(int(self.offsets[first]), int(self.offsets[last]))
        return tile.index_put_(self.places(rows), self.values[span].float(), accumulate=True)

    def to_state(self) -> dict[str, Tensor]:
        """The stored tensors by their local names."""
        return {
            "weight_sparse_values": self.values,
            "weight_sparse_columns": self.columns,
            "weight_sparse_offsets": self.offsets,
        }

    def check(self) -> None:
        """Checks that the places are places of this matrix, each once, in order.

        Raises:
            CheckpointError: they are not.
        """
        offsets, columns, count = self.offsets.long(), self.columns.long(), len(self.values)
        if int(offsets[0]) != 0 or int(offsets[-1]) != count or bool((offsets.diff() < 0).any()):
            raise CheckpointError(
                f"weight_sparse_offsets must ascend from 0 to the {count} values that are kept apart; they begin "
                f"{offsets[:4].tolist()} and end with {int(offsets[-1])}. The file is damaged"
            )
        if int(columns.min()) < 0 or int(columns.max()) >= self.shape[1]:
            wrong = int(columns.min()) if int(columns.min()) < 0 else int(columns.max())
            raise CheckpointError(
                f"weight_sparse_columns names column {wrong} of {self.shape[1]}, counted from 0; the file is damaged"
            )
        rows, _ = self.places()
        if bool(((rows * self.shape[1] + columns).diff() <= 0).any()):
            raise CheckpointError("weight_sparse_columns does not ascend in every row; the file is damaged")


def index_dtype(largest: int) -> torch.dtype:
    """The narrowest type for whole numbers from 0 to `largest`."""
    return next(dtype for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64) if largest <= _top(dtype))


def _top(dtype: torch.dtype) -> int:
    return torch.iinfo(dtype).max
