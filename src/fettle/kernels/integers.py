"""The reference for integer hardware: int8 codes of inputs times int8 codes of weights, summed up in int32.

    y[t, o] = s_t · Σ_g s_og · Σ_i (a_ti - p_t) · (w_oi - z_og) + bias_o
    Σ_i (a - p)(w - z) = Σ a·w - p·Σ w - z·Σ a + n·p·z          over the n columns i of group g

What inputs have beyond the codes' ends, where that is kept apart, is sparse: its product with the weight's values is
added in floating numbers.

Only Σ a·w needs a product of matrices, of int8 codes with an int32 sum; it is exact up to 2^16 columns, and wider
groups are summed in pieces. All other sums are one for each row or token. What is computed equals
the reference, whose sums are of floating numbers, up to their rounding. No model runs through this yet: it
says what a fast kernel has to give.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fettle.errors import UsageError
from fettle.tensors.activations import InputQuantizer
from fettle.tensors.quantized import stored_input_scale
from fettle.tensors.scheme import Scheme

EXACT_COLUMNS = 1 << 16  # 2^7 · 2^7 · 2^16 = 2^30 fits into int32


def integer_linear(inputs: Tensor, state: Mapping[str, Tensor], scheme: Scheme, bias: Tensor | None) -> Tensor:
    """Multiplies an `int-quantized` state with quantized inputs, codes with codes.

    Args:
        inputs: [..., in], any floating type.
        state: weight int8, weight_scale and what else `Scheme.state_spec` lists.
        scheme: with activations.
        bias: [out] or None.

    Returns:
        [..., out] in the inputs' type.

    Raises:
        UsageError: the scheme leaves inputs as they are.
    """
    if scheme.activations is None or scheme.activations.grid != "uniform":
        raise UsageError("the inputs are no integers; integer_linear needs a scheme with activations in integers")
    quantizer = InputQuantizer(activations=scheme.activations, fixed=stored_input_scale(state, scheme))
    flat = inputs.reshape(-1, inputs.shape[-1])
    found, scale, point = quantizer.codes(flat)  # [tokens, in], and [tokens, 1] or [1]
    codes, points = found.to(torch.int8), point.long()
    weight = state["weight"]
    shape = scheme.scale_shape((weight.shape[0], weight.shape[1]))
    scales = state["weight_scale"].float().reshape(shape)
    zeros = (
        state["weight_zero_point"].long().reshape(shape)
        if scheme.zero_point
        else torch.zeros_like(scales, dtype=torch.int64)
    )
    width = scheme.group_width(weight.shape[1])
    outputs = torch.zeros(len(flat), weight.shape[0], device=flat.device)
    for group in range(shape[1]):
        columns = slice(group * width, (group + 1) * width)
        sums = _centred(codes[:, columns], points, weight[:, columns], zeros[:, group])
        outputs += sums.float() * scales[:, group]
    outputs *= scale
    apart = quantizer.beyond(flat)
    if apart is not None:
        columns_of = torch.arange(weight.shape[1]) // width
        outputs += apart @ ((weight.float() - zeros[:, columns_of].float()) * scales[:, columns_of]).T
    if bias is not None:
        outputs += bias.float()
    return outputs.reshape(*inputs.shape[:-1], -1).to(inputs.dtype)


def _centred(codes: Tensor, points: Tensor, weight: Tensor, zeros: Tensor) -> Tensor:
    """Σ (a - p)(w - z), int64 [tokens, out], for int8 codes [tokens, n] and [out, n], p [tokens, 1] or [1], z [out]."""
    total = torch.zeros(len(codes), len(weight), dtype=torch.int64, device=codes.device)
    for start in range(0, codes.shape[1], EXACT_COLUMNS):
        piece = slice(start, start + EXACT_COLUMNS)
        total += codes[:, piece].int() @ weight[:, piece].int().T  # int32, exact
    rows, tokens = weight.long().sum(1), codes.long().sum(1, keepdim=True)
    return total - points * rows - zeros * tokens + codes.shape[1] * points * zeros
