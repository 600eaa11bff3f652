"""Magnitude: the smallest weights go. No data, one pass; the baseline that every other score must beat.

    score = w²

Han, Pool, Tran, Dally 2015, https://arxiv.org/abs/1506.02626 (who train in between: `rounds` with `heal` do the like
without training). It minimises ‖W - V‖² over all V with the pattern: the plain weight error.

Cost: out · in.
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
class Magnitude(PruneFields):
    """Prunes the smallest weights."""

    name: ClassVar[str] = "magnitude"
    title: ClassVar[str] = "Magnitude pruning"
    source: ClassVar[str] = "Han et al. 2015, https://arxiv.org/abs/1506.02626"
    statistics: ClassVar[tuple[str, ...]] = ("gram",)
    objective: ClassVar[str] = "weight_error"

    def needs(self) -> tuple[str, ...]:
        """The gram where it heals."""
        return self.needs_gram()

    def scores(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """w², float32 [out, in]."""
        return weight.float().square()

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> MaskedTensor:
        """Prunes weight [out, in]."""
        return prune_by(weight, lambda w: self.scores(w, statistics), self, statistics, dtype=dtype)
