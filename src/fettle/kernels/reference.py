"""The reference: dequantize a tile of rows, multiply, go on. Every faster kernel is compared with this.

    outputs [tokens, out] = inputs [tokens, in] · dequantize(state)ᵀ + bias

Inputs that the scheme quantizes take the values that their codes stand for first; `integers.py` multiplies the codes.

Arithmetic is float32 whatever the inputs' type (on CPUs without bf16 units a bf16 product is forty times slower), and
the result is cast back. Memory beside inputs and outputs: one tile of at most 4 M weights, so a layer is never dense
as a whole unless it is small; a small one takes a single product, bit for bit that of a dense linear.

A sparse remainder is added to each tile; a factored one is multiplied with by itself, in two thin products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

from fettle.tensors.activations import InputQuantizer
from fettle.tensors.factored import FactoredTensor
from fettle.tensors.packing import unpack_bits
from fettle.tensors.quantized import dequantize_rows, row_tiles, stored_input_scale, stored_shared
from fettle.tensors.scales import Shared
from fettle.tensors.scheme import Scheme

TILE_WEIGHTS = 1 << 22


def packed_linear(inputs: Tensor, state: Mapping[str, Tensor], scheme: Scheme, bias: Tensor | None) -> Tensor:
    """Multiplies with a `pack-quantized` state; see `QuantizedTensor.to_state` for its tensors.

    Args:
        inputs: [..., in], any floating type.
        state: weight_packed, weight_shape, weight_scale, and what else `Scheme.state_spec` lists.
        scheme: what the state means.
        bias: [out] or None.

    Returns:
        [..., out] in the inputs' type.
    """
    packed, in_features = state["weight_packed"], inputs.shape[-1]
    shape = (packed.shape[0], in_features)

    def rows_of(rows: slice) -> Tensor:
        return unpack_bits(packed[rows], scheme.grid.bits, in_features)

    return _tiled(inputs, rows_of, shape, state, scheme, bias)


def int_linear(inputs: Tensor, state: Mapping[str, Tensor], scheme: Scheme, bias: Tensor | None) -> Tensor:
    """Multiplies with an `int-quantized` state: weight int8 [out, in]; otherwise as `packed_linear`."""
    weight = state["weight"]

    def rows_of(rows: slice) -> Tensor:
        return (weight[rows].to(torch.int16) + 128).to(torch.uint8)

    return _tiled(inputs, rows_of, (weight.shape[0], weight.shape[1]), state, scheme, bias)


def _tiled(
    inputs: Tensor,
    codes_of: Callable[[slice], Tensor],
    shape: tuple[int, int],
    state: Mapping[str, Tensor],
    scheme: Scheme,
    bias: Tensor | None,
) -> Tensor:
    found = stored_shared(state, scheme, scheme.scale_shape(shape))
    shared = Shared(scale=found.scale, zero_point=_zero_point(state, scheme, shape[0]), levels=found.levels)
    remainder = None if scheme.remainder is None else scheme.remainder.from_state(state, shape)
    wide = inputs.float()
    if scheme.activations is not None:
        quantizer = InputQuantizer(activations=scheme.activations, fixed=stored_input_scale(state, scheme))
        wide = quantizer(wide)
    if scheme.grid.is_nothing and isinstance(remainder, FactoredTensor):  # two thin products are all there is
        product = remainder.multiply(wide)
        return (product if bias is None else product + bias.float()).to(inputs.dtype)
    outputs = []
    for rows in row_tiles(*shape, TILE_WEIGHTS):
        weight = dequantize_rows(codes_of(rows), shared.rows(rows, scheme), scheme).float()
        if scheme.has_tensor_scale:
            weight *= state["weight_tensor_scale"]
        if remainder is not None and not isinstance(remainder, FactoredTensor):
            remainder.add_to_(weight, rows)
        outputs.append(linear(wide, weight, None if bias is None else bias[rows].float()))
    product = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    if isinstance(remainder, FactoredTensor):
        product += remainder.multiply(wide)
    return product.to(inputs.dtype)


def _zero_point(state: Mapping[str, Tensor], scheme: Scheme, out_features: int) -> Tensor | None:
    """Zero points as uint8 codes [out, groups] (or [1, 1]); they are few, so all rows at once."""
    if not scheme.zero_point:
        return None
    stored = state["weight_zero_point"]
    if stored.dtype == torch.int32:
        return unpack_bits(stored, scheme.grid.bits, out_features, axis=0)
    codes = stored.to(torch.int16).add_(2 ** (scheme.grid.bits - 1)).to(torch.uint8)
    return codes.reshape(1, 1) if scheme.granularity == "tensor" else codes
