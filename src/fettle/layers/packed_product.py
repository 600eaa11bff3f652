"""The gradient of a product with codes: it passes to the inputs, and nothing dense is kept for it.

    outputs = inputs · Vᵀ + bias        ∂/∂inputs = ∂/∂outputs · V

V is what the codes stand for. Autograd would keep V in float32 for every layer until the backward pass, which is what
a packed base is there to avoid (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314); here the codes are
decoded once more, a tile of rows at a time. Any kernel may have computed the product, also one that knows no gradients.
Codes and scales learn nothing. Inputs that the scheme quantizes get their gradient straight through.

Cost: a second decoding in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fettle.tensors.quantized import QuantizedTensor, row_tiles


class PackedProduct(torch.autograd.Function):
    """A kernel's product with the gradient of its inputs and its bias."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        bias: Tensor | None,
        run: Callable[[Tensor], Tensor],
        decode: Callable[[], QuantizedTensor],
    ) -> Tensor:
        """`run` multiplies, bias included; `decode` gives the weight's codes again for the backward pass."""
        ctx.decode, ctx.width = decode, inputs.shape[-1]
        return run(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of the inputs, and of the bias where it learns."""
        gradient = gradients[0]
        wide = gradient.flatten(0, -2).float()
        pulled = None
        if ctx.needs_input_grad[0]:
            quantized = ctx.decode()
            total = torch.zeros(len(wide), ctx.width, device=wide.device)
            for rows in row_tiles(*quantized.shape):
                total.addmm_(wide[:, rows], quantized.dequantize_tile(rows).float())
            pulled = total.reshape(*gradient.shape[:-1], -1).to(gradient.dtype)
        return pulled, wide.sum(0) if ctx.needs_input_grad[1] else None, None, None
