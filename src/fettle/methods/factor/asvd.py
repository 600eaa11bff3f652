"""Activation-aware singular value decomposition: columns count as much as their inputs are driven.

Yuan et al.: ASVD, 2023, https://arxiv.org/abs/2312.05821: the truncated decomposition of W·S with S = diag(E|x|^α) and
S⁻¹ behind the right factor. Cheaper to know than a gram, and blind to inputs that move together; svd_llm is not.
Differs from the paper in where ranks come from: one share, rank or energy for all linears, not a search by perplexity.
How factors are stored and how thin they are: `factors.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fettle.errors import NonFiniteError
from fettle.methods.factor.factors import FactorFields, checked
from fettle.methods.quantize.low_rank import best_factors
from fettle.tensors.quantized import QuantizedTensor


@dataclass(frozen=True, kw_only=True)
class Asvd(FactorFields):
    """The product of two thin matrices that is nearest where inputs are strong."""

    name: ClassVar[str] = "asvd"
    title: ClassVar[str] = "Activation-aware SVD"
    source: ClassVar[str] = "ASVD, Yuan et al. 2023, https://arxiv.org/abs/2312.05821"
    statistics: ClassVar[tuple[str, ...]] = ("absolute_mean",)
    objective: ClassVar[str] = "output_error"

    alpha: float = field(
        default=0.5, metadata={"help": "how much the inputs' strength counts", "minimum": 0.0, "maximum": 2.0}
    )

    def needs(self) -> tuple[str, ...]:
        """Mean |inputs| of each channel."""
        return self.statistics

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> QuantizedTensor:
        """The factors of weight [out, in]."""
        wide = checked(weight)
        strength = statistics["absolute_mean"].float()
        if not bool(torch.isfinite(strength).all()):
            raise NonFiniteError("the inputs of this linear hold NaN or infinity; check the block before it")
        weighed = wide * strength.clamp(min=1e-12).pow(self.alpha)
        left, _ = best_factors(weighed, min(self.rank or 1, *wide.shape))
        return self.factored(wide, left, {}, dtype)
