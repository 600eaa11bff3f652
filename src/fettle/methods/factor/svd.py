"""Truncated singular value decomposition: the product of two thin matrices that is nearest to the weight itself.

Eckart & Young 1936, https://doi.org/10.1007/BF02288367: of all products of rank r, A·B = U_r·Σ_r·V_rᵀ leaves the least
‖W - AB‖². It looks at no text, so it spends its rank on directions that inputs may never take; asvd and svd_llm weigh
them. How factors are stored and how thin they are: `factors.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fettle.methods.factor.factors import FactorFields, checked
from fettle.methods.quantize.low_rank import best_factors
from fettle.tensors.quantized import QuantizedTensor


@dataclass(frozen=True, kw_only=True)
class Svd(FactorFields):
    """The nearest product of two thin matrices."""

    name: ClassVar[str] = "svd"
    title: ClassVar[str] = "Truncated singular value decomposition"
    source: ClassVar[str] = "Eckart & Young 1936, https://doi.org/10.1007/BF02288367"
    statistics: ClassVar[tuple[str, ...]] = ()
    objective: ClassVar[str] = "weight_error"

    def needs(self) -> tuple[str, ...]:
        """Nothing but the weight."""
        return self.statistics

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> QuantizedTensor:
        """The factors of weight [out, in]."""
        wide = checked(weight)
        left, _ = best_factors(wide, min(self.rank or 1, *wide.shape))
        return self.factored(wide, left, {}, dtype)
