"""The reference product with a pruned weight: a tile of rows becomes dense, zeros and all, and is multiplied.

    outputs [tokens, out] = inputs [tokens, in] · dense(state)ᵀ + bias

It saves memory, not work: a faster kernel skips what went. Where a row's values begin follows from the bits of the
masks before it. Memory beside inputs and outputs: one tile of at most 4 M weights, and a count a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

from fettle.tensors.bitmask import unpack_mask
from fettle.tensors.masked import MaskedScheme, mask_of
from fettle.tensors.packing import packed_width, unpack_bits
from fettle.tensors.quantized import dequantize_rows, row_tiles, stored_shared, stored_zero_point
from fettle.tensors.scales import Shared

TILE_WEIGHTS = 1 << 22
WORD = 32  # codes after which a stream of codes begins at a whole word again


def masked_linear(inputs: Tensor, state: Mapping[str, Tensor], scheme: MaskedScheme, bias: Tensor | None) -> Tensor:
    """Multiplies with the state of a `MaskedTensor`.

    Args:
        inputs: [..., in], any floating type.
        state: what `MaskedScheme.state_spec` lists.
        scheme: what the state means.
        bias: [out] or None.

    Returns:
        [..., out] in the inputs' type.
    """
    out_features, in_features = (int(side) for side in state["weight_shape"].tolist())
    pattern, wide = scheme.shape_of_mask, inputs.float()
    step = pattern.rows if pattern.kind == "block" else 1
    outputs, start = [], 0
    for rows in row_tiles(out_features // step, in_features * step, TILE_WEIGHTS):  # whole blocks
        tile = slice(rows.start * step, rows.stop * step)
        shape = (tile.stop - tile.start, in_features)
        kept = unpack_mask(mask_of(state)[rows], shape, pattern)
        count = int(kept.sum())
        weight = _dense(state, scheme, kept, tile, slice(start, start + count))
        outputs.append(linear(wide, weight, None if bias is None else bias[tile].float()))
        start += count
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)).to(inputs.dtype)


def _dense(state: Mapping[str, Tensor], scheme: MaskedScheme, kept: Tensor, rows: slice, entries: slice) -> Tensor:
    """float32 [rows, in] of one tile, whose values are these of all that stayed."""
    if scheme.values is None:
        weight = torch.zeros(kept.shape, device=kept.device)
        weight[kept] = state["weight_values"][entries].float()
        return weight
    bits = scheme.values.grid.bits
    first = entries.start // WORD * WORD
    words = state["weight_packed"][first * bits // 32 : packed_width(entries.stop, bits)]
    codes = torch.zeros(kept.shape, dtype=torch.uint8, device=kept.device)
    codes[kept] = unpack_bits(words.unsqueeze(0), bits, entries.stop - first)[0, entries.start - first :]
    out_features = int(state["weight_shape"][0])
    found = stored_shared(state, scheme.values, scheme.values.scale_shape((out_features, kept.shape[1])))
    zero_point = stored_zero_point(state, scheme.values, out_features)
    shared = Shared(scale=found.scale, zero_point=zero_point, levels=found.levels)
    shared = shared.over(state["weight_global_scale"] if scheme.values.has_tensor_scale else None)
    weight = dequantize_rows(codes, shared.rows(rows, scheme.values), scheme.values).float()
    return weight.masked_fill_(~kept, 0.0)
