"""Wanda: the weights go whose products with their inputs are smallest, row by row.

Sun, Liu, Bair, Kolter 2023, https://arxiv.org/abs/2306.11695, equation 1, squared:

    score = w_ij² · Σ_t x_tj²

It is what losing one weight alone costs the row's output. The paper compares within a row (`pattern: row`), which is
better on some models and worse than plain magnitude on others; compared over the whole layer, the default here, it
beats magnitude on both models that were measured (docs/results.md, "Masks"). What it leaves out is that the weights
that stay could make up for it: SparseGPT.

Cost: out · in, and one pass for the inputs' squares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fettle.methods.prune.fields import PruneFields
from fettle.methods.prune.pruning import prune_by
from fettle.tensors.masked import MaskedTensor


@dataclass(frozen=True, kw_only=True)
class Wanda(PruneFields):
    """Prunes the weights whose products with their inputs are smallest."""

    name: ClassVar[str] = "wanda"
    title: ClassVar[str] = "Wanda"
    source: ClassVar[str] = "Sun et al. 2023, https://arxiv.org/abs/2306.11695"
    statistics: ClassVar[tuple[str, ...]] = ("squared_norm", "gram")
    objective: ClassVar[str] = "output_error"

    def needs(self) -> tuple[str, ...]:
        """The inputs' squares; the gram where it heals."""
        return ("squared_norm", *self.needs_gram())

    def scores(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """What losing each weight alone costs, float32 [out, in]."""
        return weight.float().square() * statistics["squared_norm"]

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> MaskedTensor:
        """Prunes weight [out, in]."""
        return prune_by(weight, lambda w: self.scores(w, statistics), self, statistics, dtype=dtype)
