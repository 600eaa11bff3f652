"""Which channels, weights and activations a linear lives on: pure functions on tensors.

    input channel i     ‖W[:, i]‖ · rms(x_i)             how much of the outputs comes through it (weight · activation)
    output channel o    √(Σ_i W[o, i]² · rms(x_i)²)      how strong it is, were the inputs unrelated
    weight (o, i)       ½ · W[o, i]² · mean_t(g_to² x_ti²)   the KL, in nats a token, of losing it: the saliency of
                        optimal brain damage (LeCun et al. 1989) with the Fisher matrix's diagonal
    activation          max |x_i| over the median channel's: an outlier stretches whatever range it shares

Cost: one product [out, tokens]·[tokens, in] for the saliencies; one pass over weight and inputs for the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fettle.diagnose.estimates import Activations

CHANNELS_TOLD = 5
WEIGHTS_TOLD = 5
OUTLIER_RATIO = 8.0  # of the median channel's largest activation: from here on a channel is called an outlier


def channel_facts(weight: Tensor, seen: Activations) -> dict[str, Any]:
    """Sensitivity by channel, weight and activation of one linear, as plain data."""
    strength = _mean(seen.inputs.square(), len(seen.inputs))  # [in], mean square
    energy = weight.square() * strength  # [out, in]
    saliency = weight_saliency(weight, seen)
    return {
        "input_channels": _told(energy.sum(dim=0).sqrt()),
        "output_channels": _told(energy.sum(dim=1).sqrt()),
        "weights": _largest_weights(weight, saliency),
        "top_weights_share": _top_share(saliency),
        **activation_facts(seen.inputs),
    }


def weight_saliency(weight: Tensor, seen: Activations) -> Tensor:
    """float32 [out, in]: the KL estimate, nats a token, of setting each weight alone to zero."""
    squared = seen.inputs.square()
    curvature = torch.zeros_like(weight)
    for gradients in seen.gradients:
        curvature.addmm_(gradients.square().T, squared)
    return weight.square() * curvature.div_(2 * seen.tokens * max(1, len(seen.gradients)))


def activation_facts(inputs: Tensor) -> dict[str, Any]:
    """The strongest input channels against the median one, and how many are outliers."""
    if not len(inputs):
        return {"activations": [], "outlier_channels": 0}
    largest = inputs.abs().amax(dim=0)
    median = float(largest.median())
    ratios = largest / median if median > 0 else torch.zeros_like(largest)
    top = torch.topk(ratios, min(CHANNELS_TOLD, len(ratios)))
    return {
        "activations": [
            {"channel": int(i), "ratio": float(r), "absolute_max": float(largest[i])}
            for r, i in zip(top.values, top.indices, strict=True)
        ],
        "outlier_channels": int((ratios >= OUTLIER_RATIO).sum()),
    }


def _mean(values: Tensor, count: int) -> Tensor:
    return values.sum(dim=0) / max(1, count)


def _told(scores: Tensor) -> list[dict[str, float]]:
    """The strongest channels: index, score, and its ratio to the median channel's."""
    median = float(scores.median())
    top = torch.topk(scores, min(CHANNELS_TOLD, len(scores)))
    return [
        {"channel": int(i), "score": float(s), "ratio": float(s) / median if median > 0 else 0.0}
        for s, i in zip(top.values, top.indices, strict=True)
    ]


def _largest_weights(weight: Tensor, saliency: Tensor) -> list[dict[str, float]]:
    top = torch.topk(saliency.flatten(), min(WEIGHTS_TOLD, saliency.numel()))
    width = weight.shape[1]
    return [
        {"row": int(i) // width, "column": int(i) % width, "weight": float(weight.flatten()[i]), "saliency": float(s)}
        for s, i in zip(top.values, top.indices, strict=True)
    ]


def _top_share(saliency: Tensor) -> float:
    """The share of all saliency that the most salient thousandth of the weights holds."""
    total = float(saliency.sum(dtype=torch.float64))
    top = torch.topk(saliency.flatten(), max(1, saliency.numel() // 1000)).values
    return float(top.sum(dtype=torch.float64)) / total if total > 0 else 0.0
