"""What chooses the codes under a remainder: GPTQ or rounding, as functions with one face.

A method with a remainder solves for codes more than once, for the weight less what the remainder holds by then. All of
it is judged by one error, tr(ΔGΔᵀ) with the gram G (‖Δ‖² without one), against one target: the weight, with GPTQ's
correction for drifted inputs where the walk measures the drift.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fettle.errors import NonFiniteError
from fettle.methods.quantize.errors import output_error, weight_error
from fettle.methods.quantize.gptq import GptqOptions, gptq
from fettle.methods.quantize.ranges import FUSED_MAXIMUM, NOT_FINITE, in_tensor_units
from fettle.methods.quantize.refine import less_remainder, refine
from fettle.methods.quantize.round_to_nearest import round_to_nearest
from fettle.methods.quantize.sweep import Factor, corrected, factorize
from fettle.tensors.quantized import QuantizedTensor
from fettle.tensors.scheme import Scheme

SolverName = Literal["gptq", "round_to_nearest"]
DAMPING, CORRECTION, REFINE_PASSES = 0.01, 0.5, 2  # GPTQ's defaults


class Solver:
    """Codes for one linear, whatever its weight less a remainder is by now.

    Attributes:
        target: float32 [out, in], what values and remainder together should be.
        gram: float32 [in, in], or None where no data is looked at.
        damping: what GPTQ adds to the gram's diagonal; 0 without a gram.
        inverse_diagonal: float32 [in], of the inverse of the damped gram; ones without a gram.
    """

    def __init__(self, name: SolverName, weight: Tensor, statistics: Mapping[str, Tensor], scheme: Scheme) -> None:
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(NOT_FINITE)
        self._name, self._scheme = name, scheme.codes_alone
        self.target = weight.float()
        self.gram = statistics.get("gram")
        self._largest = statistics.get(FUSED_MAXIMUM)
        self.damping = 0.0
        self.inverse_diagonal = torch.ones(weight.shape[1])
        if self.gram is None:
            return
        if not bool(torch.isfinite(self.gram.diagonal()).all()):
            raise NonFiniteError("the gram of this linear's inputs holds NaN or infinity; check the block before it")
        factor = factorize(self.gram, damping=DAMPING, activation_order=False)
        self.damping = factor.damping
        self.inverse_diagonal = inverse_diagonal(factor)
        drift = statistics.get("drift")
        if name == "gptq" and drift is not None:
            self.target = corrected(weight, drift, factor, CORRECTION)

    def codes(self, weight: Tensor) -> QuantizedTensor:
        """Codes of weight [out, in], without a remainder."""
        if self._name == "round_to_nearest" or self.gram is None:
            return round_to_nearest(weight, self._scheme, clip="search", largest=self._largest)
        gram, scheme = self.gram, self._scheme
        options = GptqOptions(damping=DAMPING, clip="best", refine_passes=REFINE_PASSES)
        return in_tensor_units(weight, scheme, lambda units: gptq(units, gram, scheme, options), self._largest)

    def again(self, quantized: QuantizedTensor) -> QuantizedTensor:
        """Codes and scales for what the remainder leaves: GPTQ's move from where they are, rounded ones start anew."""
        if self._name == "gptq" and self.gram is not None:
            return refine(quantized, self.target, self.gram, damping=self.damping, passes=REFINE_PASSES)
        rest = self.target if quantized.remainder is None else less_remainder(self.target, quantized.remainder)
        return replace(self.codes(rest), scheme=quantized.scheme, remainder=quantized.remainder)

    def error(self, quantized: QuantizedTensor) -> float:
        """How far values and remainder are from the target, relative to it."""
        if self.gram is None:
            return weight_error(self.target, quantized)
        return output_error(self.target, quantized, self.gram)

    def better(self, one: QuantizedTensor, other: QuantizedTensor) -> QuantizedTensor:
        """The one with the smaller error; of equals the first."""
        return other if self.error(other) < self.error(one) else one


def inverse_diagonal(factor: Factor) -> Tensor:
    """The diagonal of (H + damping)⁻¹, float32 [in], from the factor of that sum; in³/3."""
    size = len(factor.order)
    inverse = torch.linalg.solve_triangular(factor.matrix, torch.eye(size), upper=False, unitriangular=True)
    diagonal = torch.empty(size)
    diagonal[factor.order] = inverse.square_().div_(factor.pivots.unsqueeze(1)).sum(0)
    return diagonal
