"""A product of two thin matrices beside the codes: the factored remainder.

    weight_factor_left   [out, rank]   in the scale's type; bfloat16 beside scales of eight bits
    weight_factor_right  [rank, in]    likewise

The rank of a stored weight is never more than its shorter side. Outputs take two thin products,
(inputs · rightᵀ) · leftᵀ; the product of the factors is formed only where a dense weight is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from fettle.errors import RecipeError
from fettle.tensors.remainder import TensorSpec


@dataclass(frozen=True, kw_only=True)
class FactoredScheme:
    """How thin the factors are.

    Attributes:
        rank: from 1; a matrix with a shorter side has factors of that width.
    """

    kind: ClassVar[str] = "factored"
    rank: int

    def validate(self) -> None:
        """Checks the rank.

        Raises:
            RecipeError: it cannot be.
        """
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise RecipeError(f"factors of rank {self.rank!r} cannot be; allowed: integers from 1. Try 8")

    def rank_of(self, shape: tuple[int, int]) -> int:
        """The rank for a weight [out, in]."""
        return min(self.rank, *shape)

    def dtype(self, scale_dtype: torch.dtype) -> torch.dtype:
        """The factors' type beside scales of this type."""
        return scale_dtype if scale_dtype.itemsize > 1 else torch.bfloat16

    def state_spec(self, shape: tuple[int, int], scale_dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Name, type and shape of both factors."""
        rank, dtype = self.rank_of(shape), self.dtype(scale_dtype)
        return {"weight_factor_left": (dtype, (shape[0], rank)), "weight_factor_right": (dtype, (rank, shape[1]))}

    def from_state(self, state: Mapping[str, Tensor], shape: tuple[int, int]) -> FactoredTensor:
        """The remainder of a weight."""
        return FactoredTensor(left=state["weight_factor_left"], right=state["weight_factor_right"])

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"kind": self.kind, "rank": self.rank}

    def describe(self) -> str:
        """For people: "rank 8"."""
        return f"rank {self.rank}"


@dataclass(frozen=True, kw_only=True, eq=False)
class FactoredTensor:
    """left [out, rank] · right [rank, in]."""

    left: Tensor
    right: Tensor

    def multiply(self, inputs: Tensor) -> Tensor:
        """float32 [..., in] → [..., out], by two thin products."""
        return linear(linear(inputs, self.right.float()), self.left.float())

    def add_to_(self, tile: Tensor, rows: slice) -> Tensor:
        """Adds the product of some rows to a float32 tile [rows, in], in place."""
        return tile.addmm_(self.left[rows].float(), self.right.float())

    def to_state(self) -> dict[str, Tensor]:
        """The stored tensors by their local names."""
        return {"weight_factor_left": self.left, "weight_factor_right": self.right}

    def check(self) -> None:
        """Nothing: types and shapes say everything."""
