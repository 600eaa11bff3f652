"""Healing without training: what stayed of each row, moved so that the outputs change least.

    minimise (v - w)·H·(v - w)ᵀ over v with v_j = 0 where the mask says so,   H = gram + damping

The optimum solves H_SS·v_S = (H·w)_S, with S what stayed of the row: another system for every row. Ours takes them all
at once by conjugate gradients, preconditioned with the diagonal; what goes is projected out, so one product with H
serves all rows. Every iterate lowers the error, so the number of steps is a matter of patience and not of correctness.

Cost: out·in² multiply-adds a step; memory: tiles of 512 rows. For the literature see the exact small systems of
SparseGPT's appendix, and conjugate gradients on masks in ALPS, Meng et al. 2024, https://arxiv.org/abs/2406.07831.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fettle.methods.quantize.sweep import row_slices

STEPS = 30
TOLERANCE = 1e-12  # of a row's squared residual against its first: exact to rounding


class Healer(Protocol):
    """Makes a pruned weight better with the same mask."""

    def __call__(self, weight: Tensor, kept: Tensor) -> Tensor:
        """float32 [out, in], zero where `kept`, bool [out, in], says so, from such a weight."""
        ...


def least_squares(
    target: Tensor, weight: Tensor, kept: Tensor, gram: Tensor, *, damping: float, steps: int = STEPS
) -> Tensor:
    """float32 [out, in]: `weight` moved towards the best values where `kept`; pure.

    Args:
        target: [out, in], what the outputs should be made with.
        weight: [out, in], where to start; zero where not kept.
        kept: bool [out, in].
        gram: float32 [in, in].
        damping: added to its diagonal.
        steps: of conjugate gradients.
    """
    diagonal = gram.diagonal() + damping
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    healed = torch.empty(weight.shape, dtype=torch.float32)
    for rows in row_slices(weight.shape[0]):
        mask = kept[rows].float()
        healed[rows] = _conjugate(
            target[rows].float(), weight[rows].float() * mask, mask, gram, damping, inverse, steps
        )
    return healed


def _conjugate(
    target: Tensor, start: Tensor, mask: Tensor, gram: Tensor, damping: float, inverse: Tensor, steps: int
) -> Tensor:
    """One tile of rows; each row has its own step lengths, and rests once its residual is gone."""

    def product(vectors: Tensor) -> Tensor:
        return torch.addmm(vectors, vectors, gram, beta=damping) * mask

    values = start.clone()
    residual = torch.addmm(target - values, target - values, gram, beta=damping) * mask
    scaled = residual * inverse
    direction = scaled.clone()
    slope = (residual * scaled).sum(1, keepdim=True)
    enough = slope * TOLERANCE
    for _ in range(steps):
        moved = product(direction)
        bend = (direction * moved).sum(1, keepdim=True)
        length = torch.where((slope > enough) & (bend > 0), slope / bend, 0.0)
        values += length * direction
        residual -= length * moved
        scaled = residual * inverse
        new = (residual * scaled).sum(1, keepdim=True)
        direction = scaled + torch.where(slope > 0, new / slope, 0.0) * direction
        slope = new
    return values * mask
