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
from fettle.tensors.quantized import (
    dequantize_rows,
    row_tiles,
    stored_input_scale,
    stored_shared,
    stored_zero_point,
)
from fettle.tensors.scales import Shared
from fettle.tensors.scheme import Scheme
from fettle.tensors.storages import code_tensor, unpack_codes

TILE_WEIGHTS = 1 << 22


def reference_linear(storage: str) -> Callable[[Tensor, Mapping[str, Tensor], Scheme, Tensor | None], Tensor]:
    """The function that multiplies with a state in `storage`; see `QuantizedTensor.to_state` for its tensors."""

    def run(inputs: Tensor, state: Mapping[str, Tensor], scheme: Scheme, bias: Tensor | None) -> Tensor:
        """Multiplies.

        Args:
            inputs: [..., in], any floating type.
            state: what `Scheme.state_spec` lists for this storage.
            scheme: what the state means.
            bias: [out] or None.

        Returns:
            [..., out] in the inputs' type.
        """
        stored, in_features = state[code_tensor(storage)], inputs.shape[-1]

        def rows_of(rows: slice) -> Tensor:
            return unpack_codes(stored[rows], scheme.grid, storage, in_features)

        return _tiled(inputs, rows_of, (stored.shape[0], in_features), state, scheme, bias)

    return run


def _tiled(
    inputs: Tensor,
    codes_of: Callable[[slice], Tensor],
    shape: tuple[int, int],
    state: Mapping[str, Tensor],
    scheme: Scheme,
    bias: Tensor | None,
) -> Tensor:
    found = stored_shared(state, scheme, scheme.scale_shape(shape))
    zero_point = stored_zero_point(state, scheme, shape[0])
    shared = Shared(scale=found.scale, zero_point=zero_point, levels=found.levels)
    shared = shared.over(state["weight_global_scale"] if scheme.has_tensor_scale else None)
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
        if remainder is not None and not isinstance(remainder, FactoredTensor):
            remainder.add_to_(weight, rows)
        outputs.append(linear(wide, weight, None if bias is None else bias[rows].float()))
    product = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    if isinstance(remainder, FactoredTensor):
        product += remainder.multiply(wide)
    return product.to(inputs.dtype)
