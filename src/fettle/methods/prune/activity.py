"""Activation sparsity: the weights go that read inputs which are seldom active.

Hu, Peng, Tai, Tang 2016 (APoZ, the average percentage of zeros), https://arxiv.org/abs/1607.03250:

    score = w_ij² · a_j²,    a_j = share of tokens on which |x_tj| is above the mean of that token's |x_t|

The paper counts the zeros of ReLU networks and prunes whole neurons; gates such as SiLU give no zeros, so an input is
called active here where it is above its token's mean, which for ReLU orders alike; and weights are pruned, not neurons
(that changes shapes). Unlike Wanda's norm the share is deaf to a few huge inputs.

Cost: out · in, and one pass for the shares.
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
class ActivationSparsity(PruneFields):
    """Prunes the weights that read seldom-active inputs."""

    name: ClassVar[str] = "activation_sparsity"
    title: ClassVar[str] = "Activation sparsity"
    source: ClassVar[str] = "after Hu et al. 2016, https://arxiv.org/abs/1607.03250"
    statistics: ClassVar[tuple[str, ...]] = ("active_share", "gram")
    objective: ClassVar[str] = "output_error"

    def needs(self) -> tuple[str, ...]:
        """How often each input is active; the gram where it heals."""
        return ("active_share", *self.needs_gram())

    def scores(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """w² · a², float32 [out, in]."""
        return weight.float().square() * statistics["active_share"].square()

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> MaskedTensor:
        """Prunes weight [out, in]."""
        return prune_by(weight, lambda w: self.scores(w, statistics), self, statistics, dtype=dtype)
