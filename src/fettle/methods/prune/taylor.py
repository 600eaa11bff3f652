"""First-order Taylor: the weights go whose loss, to first order, the model would notice least.

Molchanov, Tyree, Karras, Aila, Kautz 2017, https://arxiv.org/abs/1611.06440, equation 8, for single weights:

    score = |w_ij · g_ij|,    g_ij = mean over pieces of text of |∂loss / ∂w_ij|

The gradient is the one thing here that looks beyond the linear: forward and backward through the whole original, on
labels that the model draws itself (so that at a trained model's optimum, where gradients for the text's own labels
average out, what is left is how sharply the predictions depend on a weight). The mean is of absolute values, since the
pieces' signs would cancel. Movement scores, which follow weights while they train, are training's.

Cost: one forward and one backward pass of the original on at most 4,096 tokens of calibration text; out · in.
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
class Taylor(PruneFields):
    """Prunes the weights with the smallest product of weight and gradient."""

    name: ClassVar[str] = "taylor"
    title: ClassVar[str] = "First-order Taylor"
    source: ClassVar[str] = "Molchanov et al. 2017, https://arxiv.org/abs/1611.06440"
    statistics: ClassVar[tuple[str, ...]] = ("gradient", "gram")
    objective: ClassVar[str] = "first_order"

    def needs(self) -> tuple[str, ...]:
        """The gradient of the loss; the gram where it heals."""
        return ("gradient", *self.needs_gram())

    def scores(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """|w · g|, float32 [out, in]."""
        return (weight.float() * statistics["gradient"]).abs()

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> MaskedTensor:
        """Prunes weight [out, in]."""
        return prune_by(weight, lambda w: self.scores(w, statistics), self, statistics, dtype=dtype)
