"""The levels that a code can stand for.

A compressed weight is `levels[code] · scale`. Uniform integers, normal floats, powers of two, ternary and learned
codebooks differ only in the table of levels, so a new grid is data and no new code path.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fettle.errors import RecipeError

MIN_BITS = 2
MAX_BITS = 8


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The sorted levels that a code can stand for.

    Attributes:
        name: "uniform", or what the levels are called.
        bits: width of a code; there are 2**bits levels.
        levels: ascending; of the uniform grid -2**(bits-1) … 2**(bits-1)-1.
    """

    name: str
    bits: int
    levels: tuple[float, ...]

    @property
    def is_uniform(self) -> bool:
        """Whether the levels are the signed integers of `bits` bits."""
        return self.name == "uniform"

    def table(self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensor:
        """The levels as a tensor [2**bits]."""
        return torch.tensor(self.levels, dtype=dtype, device=device)

    def midpoints(self, device: str | torch.device = "cpu") -> Tensor:
        """Halfway between neighbouring levels, float32 [2**bits - 1]: where the nearest level changes."""
        return torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(self.levels)], device=device)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads back; the uniform grid's levels follow from its bits and are left out."""
        plain: dict[str, Any] = {"name": self.name, "bits": self.bits}
        return plain if self.is_uniform else {**plain, "levels": list(self.levels)}

    @classmethod
    def from_dict(cls, mapping: dict[str, Any]) -> Grid:
        """The inverse of `to_dict`.

        Raises:
            RecipeError: impossible bits, or levels that are not 2**bits finite ascending numbers.
        """
        if mapping.get("name") == "uniform":
            return uniform(mapping.get("bits", -1))
        return from_levels(str(mapping.get("name")), mapping.get("levels", ()))


def uniform(bits: int) -> Grid:
    """The signed integers of `bits` bits.

    Raises:
        RecipeError: bits outside 2 to 8.

    >>> uniform(2).levels
    (-2.0, -1.0, 0.0, 1.0)
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise RecipeError(f"bits={bits!r} cannot be; allowed: integers {MIN_BITS} to {MAX_BITS}. Try bits: 4")
    half = 2 ** (bits - 1)
    return Grid(name="uniform", bits=bits, levels=tuple(float(level) for level in range(-half, half)))


def from_levels(name: str, levels: tuple[float, ...] | list[float]) -> Grid:
    """A grid of any 4 to 256 ascending finite levels, a power of two of them.

    Raises:
        RecipeError: levels that cannot be a grid.
    """
    values = tuple(float(level) for level in levels)
    bits = len(values).bit_length() - 1
    ascending = all(a < b for a, b in itertools.pairwise(values))
    if (
        len(values) != 2**bits
        or not MIN_BITS <= bits <= MAX_BITS
        or not ascending
        or not all(map(math.isfinite, values))
    ):
        raise RecipeError(
            f"grid {name!r} has {len(values)} levels {values[:4]}…; a grid is 4, 8, … 256 finite numbers in ascending "
            "order, one for each code"
        )
    if name == "uniform":
        raise RecipeError("the name 'uniform' belongs to the integers; give another name to a grid with its own levels")
    return Grid(name=name, bits=bits, levels=values)
