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

MIN_BITS = 2  # of the uniform grid; one bit has no zero and no sign to spare, see `levels.binary`
MAX_BITS = 8


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The sorted levels that a code can stand for.

    Attributes:
        name: "uniform", "learned", or what the levels are called.
        bits: width of a code; there are at most 2**bits levels.
        levels: ascending; of the uniform grid -2**(bits-1) … 2**(bits-1)-1; empty for "learned", where each weight
            brings its own, 2**bits of them.
    """

    name: str
    bits: int
    levels: tuple[float, ...]

    @property
    def is_uniform(self) -> bool:
        """Whether the levels are the signed integers of `bits` bits."""
        return self.name == "uniform"

    @property
    def is_learned(self) -> bool:
        """Whether every weight stores its own levels."""
        return self.name == "learned"

    @property
    def is_nothing(self) -> bool:
        """Whether zero is the only level: codes of no bits, beside a remainder that is the whole weight."""
        return self.bits == 0

    @property
    def has_zero(self) -> bool:
        """Whether a code can stand for zero whatever the scale; learned levels can have one."""
        return self.is_learned or 0.0 in self.levels

    @property
    def level_count(self) -> int:
        """How many different codes there are."""
        return 2**self.bits if self.is_learned else len(self.levels)

    def table(self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensor:
        """The levels as a tensor [2**bits]; codes that stand for nothing read as the highest level."""
        spare = 2**self.bits - len(self.levels)
        return torch.tensor(self.levels + self.levels[-1:] * spare, dtype=dtype, device=device)

    def midpoints(self, device: str | torch.device = "cpu") -> Tensor:
        """Halfway between neighbouring levels, float32 [levels - 1]: where the nearest level changes."""
        return torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(self.levels)], device=device)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads back; the uniform grid's levels follow from its bits and are left out."""
        plain: dict[str, Any] = {"name": self.name, "bits": self.bits}
        return plain if self.is_uniform or self.is_learned else {**plain, "levels": list(self.levels)}

    @classmethod
    def from_dict(cls, mapping: dict[str, Any]) -> Grid:
        """The inverse of `to_dict`.

        Raises:
            RecipeError: impossible bits, or levels that are not finite ascending numbers, at most 2**bits.
        """
        if mapping.get("name") == "uniform":
            return uniform(mapping.get("bits", -1))
        if mapping.get("name") == "learned":
            return learned(mapping.get("bits", -1))
        if mapping.get("name") == "nothing":
            return nothing()
        return from_levels(str(mapping.get("name")), mapping.get("levels", ()), bits=mapping.get("bits"))


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


def learned(bits: int) -> Grid:
    """2**bits levels that each tensor, row or group finds for itself.

    Raises:
        RecipeError: bits outside 1 to 8.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise RecipeError(f"bits={bits!r} cannot be; allowed with learned levels: integers 1 to {MAX_BITS}")
    return Grid(name="learned", bits=bits, levels=())


def nothing() -> Grid:
    """Zero alone, in codes of no bits: a weight that is its remainder."""
    return Grid(name="nothing", bits=0, levels=(0.0,))


def from_levels(name: str, levels: tuple[float, ...] | list[float], *, bits: int | None = None) -> Grid:
    """A grid of any 2 to 256 ascending finite levels.

    Args:
        name: what it is called.
        levels: in ascending order.
        bits: width of a code; None: the least that tells the levels apart.

    Raises:
        RecipeError: levels that cannot be a grid.
    """
    try:
        values = tuple(float(level) for level in levels)
    except (TypeError, ValueError):
        values = ()
    needed = max(len(values) - 1, 0).bit_length()
    chosen = needed if bits is None else bits
    fits = isinstance(chosen, int) and not isinstance(chosen, bool) and 1 <= needed <= chosen <= MAX_BITS
    ascending = all(a < b for a, b in itertools.pairwise(values))
    if not fits or not ascending or not all(map(math.isfinite, values)):
        raise RecipeError(
            f"grid {name!r} has {len(values)} levels {values[:4]}… in {chosen} bits; a grid is 2 to 256 finite numbers "
            "in ascending order, at most one for each code"
        )
    if name in ("uniform", "learned", "nothing"):
        raise RecipeError(f"the name {name!r} is taken; give another name to a grid with its own levels")
    return Grid(name=name, bits=chosen, levels=values)
