"""How much a compressed weight differs, relative to the weight: the objectives that methods declare.

    weight_error   ‖W - V‖² / ‖W‖²
    output_error   tr(ΔGΔᵀ) / tr(WGWᵀ), Δ = W - V: the squared error of the linear's outputs on the inputs that made the
                   gram, relative to the outputs

Sums of tiles are added in float64. Cost of the second: two products [rows, in]·[in, in] a tile of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fettle.tensors.quantized import row_tiles
from fettle.tensors.weights import CompressedWeight


def weight_error(weight: Tensor, quantized: CompressedWeight | Tensor) -> float:
    """Squared error relative to the weight [out, in]; 0 for a zero weight kept zero.

    `quantized` may also be the dense values [out, in].
    """
    error = energy = 0.0
    for rows in row_tiles(*_shape(weight)):
        tile = weight[rows].float()
        error += float((tile - _values(quantized, rows)).square_().sum(dtype=torch.float64))
        energy += float(tile.square().sum(dtype=torch.float64))
    return _ratio(error, energy)


def output_error(weight: Tensor, quantized: CompressedWeight | Tensor, gram: Tensor) -> float:
    """Squared error of the outputs relative to them, for a weight [out, in] and a gram [in, in]."""
    error = energy = 0.0
    for rows in row_tiles(*_shape(weight)):
        tile = weight[rows].float()
        error += quadratic_form(tile - _values(quantized, rows), gram)
        energy += quadratic_form(tile, gram)
    return _ratio(error, energy)


def robust_error(weight: Tensor, quantized: CompressedWeight | Tensor, norm: float = 0.7) -> float:
    """Σ|error|^norm relative to the weight's own; what HQQ minimises."""
    error = energy = 0.0
    for rows in row_tiles(*_shape(weight)):
        tile = weight[rows].float()
        error += float((tile - _values(quantized, rows)).abs().pow(norm).sum(dtype=torch.float64))
        energy += float(tile.abs().pow(norm).sum(dtype=torch.float64))
    return _ratio(error, energy)


def quadratic_form(difference: Tensor, gram: Tensor) -> float:
    """tr(ΔGΔᵀ) for a tile Δ [rows, in]."""
    return float((difference @ gram).mul_(difference).sum(dtype=torch.float64))


def _values(quantized: CompressedWeight | Tensor, rows: slice) -> Tensor:
    if isinstance(quantized, Tensor):
        return quantized[rows].float()
    return quantized.dequantize_tile(rows).float()


def _shape(weight: Tensor) -> tuple[int, int]:
    return (weight.shape[0], weight.shape[1])


def _ratio(error: float, energy: float) -> float:
    return max(error, 0.0) / energy if energy > 0 else 0.0 if error <= 0 else float("inf")
