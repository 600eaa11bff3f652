"""SVD with whitened inputs: the product of two thin matrices that leaves the least error in the linear's outputs.

Wang et al.: SVD-LLM, 2024, https://arxiv.org/abs/2403.07378: with G the gram of the inputs and G = L·Lᵀ (Cholesky), the
truncated decomposition of W·L with L⁻¹ behind the right factor leaves the least tr((W - AB)·G·(W - AB)ᵀ), which is the
squared error of the outputs, and each singular value left out costs its square.

Ours finds the left vectors from W·G·Wᵀ and projects (`factors.py`), so no Cholesky factor and no inverse is formed, and
a gram that is singular costs nothing. The inputs are those that passed the compressed blocks before, as the paper's
second step has it. `damping`, relative to the gram's mean diagonal, keeps some rank for what the text did not show.
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
class SvdLlm(FactorFields):
    """The product of two thin matrices with the least error in the outputs."""

    name: ClassVar[str] = "svd_llm"
    title: ClassVar[str] = "SVD with whitened inputs"
    source: ClassVar[str] = "SVD-LLM, Wang et al. 2024, https://arxiv.org/abs/2403.07378"
    statistics: ClassVar[tuple[str, ...]] = ("gram",)
    objective: ClassVar[str] = "output_error"

    damping: float = field(
        default=0.01, metadata={"help": "added to the gram's diagonal, of its mean", "minimum": 0.0, "maximum": 1.0}
    )

    def needs(self) -> tuple[str, ...]:
        """The gram."""
        return self.statistics

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> QuantizedTensor:
        """The factors of weight [out, in]."""
        wide, gram = checked(weight), statistics["gram"]
        if not bool(torch.isfinite(gram.diagonal()).all()):
            raise NonFiniteError("the gram of this linear's inputs holds NaN or infinity; check the block before it")
        mean = float(gram.diagonal().double().mean())
        unit = gram / mean if mean > 0 else torch.eye(len(gram))
        left, _ = best_factors(wide, min(self.rank or 1, *wide.shape), unit, damping=self.damping)
        return self.factored(wide, left, statistics, dtype)
