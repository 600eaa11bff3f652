"""Observers: the range that a stored input scale spans, from what the calibration text showed.

Each is a function of a histogram of the inputs and of the codes to come; low ≤ 0 ≤ high. A narrower range than the
inputs' cuts outliers off and makes the steps for all others finer.

    minmax           [min x, max x]                                         nothing is cut off
    moving_average   m ← m + (window's end - m) / 100, for both ends        Krishnamoorthi 2018, arXiv 1806.08342; Jacob
                                                                            et al. 2017, arXiv 1712.05877
    percentile       as much in either direction as keeps 99.99 %           Wu et al. 2020, arXiv 2004.09602
    mse              argmin Σ n_i · (x_i - Q(x_i))²                         Sung et al. 2015, arXiv 1511.06488
    entropy          argmin KL(P ‖ Q)                                       Migacz 2017, "8-bit inference with TensorRT"

Where a share of the inputs is kept apart (`Activations.outliers`), the range leaves that share outside, as percentile
leaves one in ten thousand, and no observer is asked.

Where the stored number is only the unit of scales that are found on the spot (NV floats), it is min-max's.

mse and entropy look through parts of the whole range, 1/100 to 1, with one factor for both ends. x_i is the middle of
bin i and n_i its count; Q rounds to the codes. For entropy, P is the histogram with what lies outside moved into its
last bins, and Q the histogram inside, where each code's counts are spread evenly over its bins that are not empty.

Cost: a hundred looks at 8192 bins for each linear, whatever the text's length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fettle.methods.quantize.histogram import Histogram
from fettle.tensors.activations import Activations, InputScale

Observer = Literal["minmax", "moving_average", "percentile", "mse", "entropy"]
Range = tuple[float, float]
KEPT = 0.9999  # of the inputs, by percentile
PARTS = 100  # of the range that the searches look through
NEVER = 1e-12  # the probability of what the codes cannot say, where the text says it


def minmax(seen: Histogram, activations: Activations) -> Range:
    """All that was seen."""
    return seen.low, seen.high


def moving_average(seen: Histogram, activations: Activations) -> Range:
    """The ends of a typical window."""
    return seen.average_low, seen.average_high


def percentile(seen: Histogram, activations: Activations) -> Range:
    """The ends within which all but one in ten thousand lie; half of that is cut off on either side."""
    return leaving(seen, 1 - KEPT)


def leaving(seen: Histogram, share: float) -> Range:
    """The ends within which all but this share of the inputs lie; half of it is outside on either side."""
    below = seen.counts.double().cumsum(0)
    cut, total = share / 2, float(below[-1])
    edges = torch.cat((seen.centres - seen.reach / len(below), seen.centres[-1:] + seen.reach / len(below)))
    first = int((below <= cut * total).sum())  # bins that may go as a whole
    last = int((below < (1 - cut) * total).sum())
    return max(seen.low, min(0.0, float(edges[first]))), min(seen.high, max(0.0, float(edges[last + 1])))


def mse(seen: Histogram, activations: Activations) -> Range:
    """The part of the range with the least squared error."""

    def error(low: float, high: float) -> float:
        values, _ = _rounded(seen.centres, low, high, activations)
        return float((seen.counts * (values - seen.centres).square()).sum())

    return _best_part(seen, error)


def entropy(seen: Histogram, activations: Activations) -> Range:
    """The part of the range whose codes tell most about the inputs."""
    counts, centres = seen.counts.double(), seen.centres

    def divergence(low: float, high: float) -> float:
        low, high = (low, high) if activations.zero_point else (-max(-low, high), max(-low, high))
        inside = (centres >= low) & (centres <= high)
        if not bool(inside.any()):
            return float("inf")
        kept, codes = counts[inside], _rounded(centres[inside], low, high, activations)[1]
        truth = kept.clone()
        first, last = (int(place) for place in inside.nonzero()[[0, -1], 0])
        truth[0] += counts[:first].sum()
        truth[-1] += counts[last + 1 :].sum()
        return _divergence(truth, _spread(kept, codes))

    return _best_part(seen, divergence)


OBSERVERS: dict[str, Callable[[Histogram, Activations], Range]] = {
    "minmax": minmax,
    "moving_average": moving_average,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}


def observe(seen: Tensor, name: str, activations: Activations, dtype: torch.dtype) -> InputScale:
    """The scale for inputs with this histogram (`Histogram.to_tensor`), stored as `dtype`."""
    histogram = Histogram.from_tensor(seen)
    if histogram.reach == 0:
        ends = (0.0, 0.0)
    elif activations.granularity == "tensor_group":  # groups' scales are relative to it: nothing gets finer by cutting
        ends = minmax(histogram, activations)
    elif activations.outliers:
        ends = leaving(histogram, activations.outliers)
    else:
        ends = OBSERVERS[name](histogram, activations)
    return InputScale.spanning(*ends, activations, dtype)


def _best_part(seen: Histogram, cost: Callable[[float, float], float]) -> Range:
    """The part of the whole range that costs least; of equals the widest."""
    parts = [part / PARTS for part in range(PARTS, 0, -1)]
    best = min(parts, key=lambda part: cost(part * seen.low, part * seen.high))
    return best * seen.low, best * seen.high


def _rounded(values: Tensor, low: float, high: float, activations: Activations) -> tuple[Tensor, Tensor]:
    """The nearest values that codes for this range stand for, and the codes, float64."""
    found = InputScale.spanning(low, high, activations, torch.float64)
    point = 0.0 if found.zero_point is None else float(found.zero_point)
    codes = activations.round_(values / found.scale + point)
    return (codes - point) * found.scale, codes


def _spread(counts: Tensor, codes: Tensor) -> Tensor:
    """Each code's counts, spread evenly over its bins that are not empty."""
    said, places = torch.unique(codes, return_inverse=True)
    filled = (counts > 0).double()
    zeros = counts.new_zeros(len(said))
    totals, bins = zeros.index_add(0, places, counts), zeros.index_add(0, places, filled)
    return (totals / bins.clamp(min=1))[places] * filled


def _divergence(truth: Tensor, model: Tensor) -> float:
    """KL(P ‖ Q) of two histograms."""
    p, q = truth / truth.sum(), (model / model.sum().clamp(min=1)).clamp(min=NEVER)
    return float(torch.where(p > 0, p * (p / q).log(), torch.zeros_like(p)).sum())
