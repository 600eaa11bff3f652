"""What a weight may keep beside its codes: the words that sparse and factored remainders share.

    weight = values of the codes + remainder

`sparse.py` holds single weights, `factored.py` a product of two thin matrices. A remainder's scheme says what is stored
for a weight of any shape before there is one, so bytes stay exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

TensorSpec = tuple[torch.dtype, tuple[int, ...]]


class Remainder(Protocol):
    """What is added to the values of the codes of a weight [out, in]."""

    def add_to_(self, tile: Tensor, rows: slice) -> Tensor:
        """Adds the values of some rows to a float32 tile [rows, in], in place; returns the tile."""
        ...

    def to_state(self) -> dict[str, Tensor]:
        """The stored tensors by their local names."""
        ...

    def check(self) -> None:
        """Checks what types and shapes cannot say.

        Raises:
            CheckpointError: the tensors contradict each other.
        """
        ...


class RemainderScheme(Protocol):
    """How a remainder is stored. Implementations are frozen dataclasses, as `Scheme` is a key of tables."""

    kind: ClassVar[str]

    def validate(self) -> None:
        """Checks the fields; RecipeError where they cannot be."""
        ...

    def state_spec(self, shape: tuple[int, int], scale_dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Name, type and shape of what is stored for a weight [out, in]; nothing where it is too small for any."""
        ...

    def from_state(self, state: Mapping[str, Tensor], shape: tuple[int, int]) -> Remainder | None:
        """The remainder of a weight [out, in], unchecked; None where nothing is stored."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the key "kind" says which remainder it is."""
        ...

    def describe(self) -> str:
        """For people."""
        ...


def sixteen_bits(scale_dtype: torch.dtype) -> torch.dtype:
    """The scale's type where it has 16 bits, else bfloat16, whose range holds any weight."""
    return scale_dtype if scale_dtype == torch.float16 else torch.bfloat16
