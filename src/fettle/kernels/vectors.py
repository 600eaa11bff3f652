"""The reference for vector codes: look up a tile of rows, scale, multiply, go on.

    outputs [tokens, out] = inputs [tokens, in] · dequantize(state)ᵀ + bias

As in `reference.py`: float32 whatever the inputs' type, at most one tile dense at a time. The tables are the same for
all linears and are built once: 1 MB for a stage of 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

from fettle.kernels.reference import TILE_WEIGHTS
from fettle.tensors.quantized import row_tiles
from fettle.tensors.vectors import VectorScheme, VectorTensor, unpacked


def vector_linear(inputs: Tensor, state: Mapping[str, Tensor], scheme: VectorScheme, bias: Tensor | None) -> Tensor:
    """Multiplies with vector codes; see `VectorScheme.state_spec` for the state.

    Args:
        inputs: [..., in], any floating type.
        state: weight_packed, weight_shape, weight_scale, weight_tensor_scale.
        scheme: what the state means.
        bias: [out] or None.

    Returns:
        [..., out] in the inputs' type.
    """
    stored = state["weight_packed"]
    shape = (len(stored), inputs.shape[-1])
    scale = state["weight_scale"].float().reshape(scheme.scale_shape(shape))
    wide, outputs = inputs.float(), []
    for rows in row_tiles(*shape, TILE_WEIGHTS):
        tile = VectorTensor(
            codes=unpacked(stored[rows], scheme),
            scale=scale[rows],
            shape=(len(stored[rows]), shape[1]),
            scheme=scheme,
            tensor_scale=state.get("weight_tensor_scale"),
        )
        outputs.append(linear(wide, tile.dequantize(), None if bias is None else bias[rows].float()))
    product = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return product.to(inputs.dtype)
