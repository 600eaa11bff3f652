"""What a changed weight does, from what one pass told: pure functions on tensors.

With Δ = V - W [out, in], inputs x_t and g_t = ∂loss/∂y_t of a linear's outputs, the labels drawn from the model's own
distribution:

    KL estimate      ½ Σ_t (g_tᵀ Δ x_t)²       second order: such labels make E[g gᵀ] the Fisher matrix of the
                                               predictions, which is the KL's curvature (Gauss-Newton); terms between
                                               the changes of two tokens are left out
    gram estimate    Σ_t ‖Δ x_t‖² = tr(ΔGΔᵀ)   the cheapest: how much the outputs change, whoever reads them

both over tokens. Signal-to-noise of a signal s and its error e, in decibels: 10 · log10(Σ s² / Σ e²).

The rank correlation is Spearman's: Pearson's of the ranks, equal values sharing the mean of their ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What a linear read and what the loss asked of its outputs, on the sample.

    Attributes:
        inputs: float32 [tokens, in].
        gradients: float32 [draws, tokens, out], of the summed loss; one draw of labels each.
        tokens: how many predicted tokens the sums are over; an expert's own rows may be fewer.
    """

    inputs: Tensor
    gradients: Tensor
    tokens: int


def second_order(difference: Tensor, seen: Activations) -> tuple[float, float]:
    """KL estimate (nats a token) and gram estimate (a token) of changing a weight by `difference` [out, in]."""
    change = seen.inputs @ difference.T  # [tokens, out]
    gram = float(change.square().sum(dtype=torch.float64))
    products = (seen.gradients * change).sum(dim=-1, dtype=torch.float64)  # [draws, tokens]
    kl = 0.5 * float(products.square().sum()) / max(1, len(seen.gradients))
    return kl / seen.tokens, gram / seen.tokens


def signal_to_noise_db(signal: Tensor, error: Tensor) -> float:
    """10 · log10(Σ signal² / Σ error²); infinite without an error, and -infinite for an error without a signal."""
    energy = float(signal.square().sum(dtype=torch.float64))
    noise = float(error.square().sum(dtype=torch.float64))
    if noise == 0:
        return math.inf
    return 10 * math.log10(energy / noise) if energy > 0 else -math.inf


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The rank correlation of two series, from -1 to 1; None for fewer than three pairs or a constant series."""
    if len(first) != len(second):
        raise ValueError("the two series have other lengths")
    if len(first) < 3:
        return None
    a, b = _ranks(first), _ranks(second)
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.square().sum().sqrt() * b.square().sum().sqrt())
    return max(-1.0, min(1.0, float((a * b).sum()) / scale)) if scale > 0 else None


def _ranks(values: Sequence[float]) -> Tensor:
    """float64 ranks from 0; equal values get the mean of theirs."""
    table = torch.tensor(list(values), dtype=torch.float64)
    _, places, counts = torch.unique(table, return_inverse=True, return_counts=True)  # sorted
    ends = counts.cumsum(0).double()
    middles = ends - (counts.double() + 1) / 2
    ranks: Tensor = middles[places]
    return ranks
