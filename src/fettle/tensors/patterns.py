"""Which weights of a matrix may be pruned together: the shape of a mask, and how many weights it prunes, exactly.

    layer   the weights of a whole linear are compared, and a share of them goes
    row     those of each row are, and the same share of every row goes
    N:M     of every M neighbouring inputs of a row N stay (2:4, 4:8, 1:4): hardware skips the others
    RxC     blocks of R rows and C columns stay or go whole (4x4, 1x16): one bit a block is stored

How many go follows from the share before any weight is seen, so a file's bytes are known before any work: the nearest
whole number to share · weights (of the linear, of each row, of its blocks), and at least one always stays.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from fettle.errors import RecipeError

LARGEST_SIDE = 1024  # of a block, or of M
_FORM = re.compile(r"(\d{1,5})([:x])(\d{1,5})")


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """The shape of a mask.

    Attributes:
        kind: what is compared with what.
        rows: of a block; 1 without blocks.
        columns: of a block, or M; 1 otherwise.
        keep: N; 0 otherwise.
    """

    kind: Literal["layer", "row", "n:m", "block"]
    rows: int = 1
    columns: int = 1
    keep: int = 0

    @property
    def fixed_sparsity(self) -> float | None:
        """The share that N:M prunes, whatever is asked; None where it is free."""
        return 1 - self.keep / self.columns if self.kind == "n:m" else None

    @property
    def is_two_of_four(self) -> bool:
        """Whether two of every four inputs stay: stored as their indices, two bits each, as hardware reads them."""
        return self.kind == "n:m" and (self.keep, self.columns) == (2, 4)

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Checks that the pattern divides a weight [out, in].

        Raises:
            RecipeError: it does not.
        """
        for side, count, unit in (("rows", shape[0], self.rows), ("inputs", shape[1], self.columns)):
            if count % unit:
                raise RecipeError(
                    f"the pattern {self.spelled()} needs {side} in multiples of {unit}, and a weight of {shape[0]} x "
                    f"{shape[1]} has {count}; use pattern: row or layer, or leave the linear out with where:"
                )

    def pruned_count(self, shape: tuple[int, int], sparsity: float) -> int:
        """How many weights of [out, in] go, exactly."""
        self.check_shape(shape)
        out_features, in_features = shape
        if self.kind == "n:m":
            return out_features * (in_features // self.columns) * (self.columns - self.keep)
        if self.kind == "row":
            return out_features * share_of(in_features, sparsity)
        unit = self.rows * self.columns
        return unit * share_of(out_features * in_features // unit, sparsity)

    def spelled(self) -> str:
        """As recipes and flags spell it."""
        if self.kind == "n:m":
            return f"{self.keep}:{self.columns}"
        return f"{self.rows}x{self.columns}" if self.kind == "block" else self.kind


def share_of(count: int, sparsity: float) -> int:
    """How many of `count` go: the nearest whole number, and never all."""
    return min(round(sparsity * count), count - 1)


def parse_pattern(text: str) -> Pattern:
    """The pattern that a recipe's word means.

    Raises:
        RecipeError: none; says the allowed forms.

    >>> parse_pattern("2:4").fixed_sparsity
    0.5
    """
    if text in ("layer", "row"):
        return Pattern(kind="layer" if text == "layer" else "row")
    match = _FORM.fullmatch(str(text))
    if match is not None:
        first, last = int(match[1]), int(match[3])
        if match[2] == ":" and 1 <= first < last <= LARGEST_SIDE:
            return Pattern(kind="n:m", keep=first, columns=last)
        if match[2] == "x" and 1 <= first <= LARGEST_SIDE and 1 <= last <= LARGEST_SIDE and first * last > 1:
            return Pattern(kind="block", rows=first, columns=last)
    raise RecipeError(
        f"pattern={text!r} cannot be; allowed: layer, row, N:M with N below M (2:4 keeps two of every four inputs), "
        f"and blocks of rows x columns such as 4x4, each number at most {LARGEST_SIDE}"
    )
