"""Inputs in codes whose stored scale learns: LSQ for activations.

    forward    y = (code - z) · s,  code = clamp(round(x / s + z))    the file's own arithmetic (tensors/activations.py)
    backward   ∂/∂x = ∂/∂y                 inside the range of the codes, 0 beyond
               ∂/∂t = Σ ∂/∂y · (y - x)     inside, y beyond;  s = start · e^t

Esser et al. 2020, https://arxiv.org/abs/1902.08153, equation 3, as for weights in `fake_quantization.py`: t learns in
the place of s, Adam's step stands for LSQ's factor, and the zero point stays as it started (LSQ+ moves it as well).
Where outliers are kept apart (`Activations.outliers`), what lies beyond the range is not lost: its gradient passes
whole, and it says nothing about the scale.

The first scale is the one that the codes came with. A dense model's is what the observer finds in the inputs of
WINDOWS windows of the training text, the same one as in `fettle compress`.

Cost: the inputs' rounding twice a step, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fettle.data.windows import calibration_windows
from fettle.methods.quantize.histogram import Histogram
from fettle.methods.train.options import LoopFields
from fettle.methods.train.sentence_text import sentences
from fettle.methods.train.text_mix import learning_part, require_tokenizer
from fettle.models.loading import LoadedModel
from fettle.models.parts import Linear
from fettle.models.storage import module_name
from fettle.tensors.activations import Activations, InputQuantizer, InputScale

WINDOWS = 32


class LearnedInputs(nn.Module):
    """Inputs → the values of their codes; `log_scale` learns.

    Attributes:
        log_scale: float32 [1], the logarithm of what the first scale is multiplied by.
    """

    def __init__(self, activations: Activations, start: InputScale) -> None:
        super().__init__()
        self.activations = activations
        self._dtype = start.scale.dtype
        self.register_buffer("_base", start.scale.detach().float().clone(), persistent=False)
        self.register_buffer("_zero_point", start.zero_point, persistent=False)
        self._base: Tensor
        self._zero_point: Tensor | None
        self.log_scale = nn.Parameter(torch.zeros_like(self._base))

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] → the same shape and type."""
        if not inputs.numel():
            return inputs
        quantizer = InputQuantizer(activations=self.activations, fixed=self.stored())
        found: Tensor = _Learned.apply(inputs, self.log_scale, quantizer)  # type: ignore[no-untyped-call]
        return found

    def stored(self) -> InputScale:
        """The scale as it is stored now, positive in its type."""
        limits = torch.finfo(self._dtype)
        scale = (self._base * self.log_scale.detach().exp()).clamp(limits.smallest_normal, limits.max)
        return InputScale(scale=scale.to(self._dtype), zero_point=self._zero_point)


class _Learned(torch.autograd.Function):
    """Inputs and scale → the values of the codes; gradients as the module says."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, log_scale: Tensor, quantizer: InputQuantizer) -> Tensor:
        ctx.quantizer = quantizer
        ctx.save_for_backward(inputs)
        return quantizer.values(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (inputs,), quantizer = ctx.saved_tensors, ctx.quantizer
        gradient, wide = gradients[0].float(), inputs.float()
        codes, scale, point = quantizer.codes(wide)
        values = (codes - point) * scale
        low, high = quantizer.activations.levels
        half = 0.5 if quantizer.activations.grid == "uniform" else 0.0  # beyond it, the nearest code is an end cut off
        units = wide / scale + point
        inside = (units >= low - half) & (units <= high + half)
        apart = quantizer.activations.outliers > 0
        pull = torch.where(inside, values - wide, torch.zeros_like(wide) if apart else values)
        passed = gradient if apart else gradient * inside
        return passed.to(inputs.dtype), (gradient * pull).sum().reshape(1), None


def observed_inputs(loaded: LoadedModel, linears: Sequence[Linear], fields: LoopFields) -> dict[str, Tensor]:
    """Linear's name → the statistic "input_range" of its inputs, on some windows of the training text.

    The model is run as it is, one window at a time; padding counts for nothing.

    Raises:
        UsageError: the model has no tokenizer.
    """
    seen: dict[str, Histogram] = {}
    kept: dict[str, Tensor] = {}  # which places of the window at hand are no padding
    handles = []
    for linear in linears:
        state = seen[linear.name] = Histogram()

        def gather(module: nn.Module, inputs: tuple[Tensor, ...], state: Histogram = state) -> None:
            state.add_(inputs[0][kept["mask"]].float().cpu())

        module = loaded.model.get_submodule(module_name(linear))
        handles.append(module.register_forward_pre_hook(gather))
    tree: Any = loaded.model
    try:
        with torch.no_grad():
            for ids, mask in _windows(loaded, fields):
                kept["mask"] = mask.bool()
                tree(input_ids=ids, attention_mask=mask)
    finally:
        for handle in handles:
            handle.remove()
    return {name: state.to_tensor() for name, state in seen.items()}


def _windows(loaded: LoadedModel, fields: LoopFields) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and what of them is no padding, both int64 [1, tokens]."""
    require_tokenizer(loaded.tokenizer, loaded.folder)
    device = next(loaded.model.parameters()).device
    if loaded.anatomy.causal:
        drawn = calibration_windows(
            loaded.tokenizer, learning_part(fields), windows=WINDOWS, length=fields.length, seed=fields.seed
        )
        for ids in drawn.ids:
            found = ids.unsqueeze(0).to(device)
            yield found, torch.ones_like(found)
        return
    text = sentences(loaded.tokenizer, fields)
    for ids in text.ids[: min(WINDOWS, text.learned)]:
        found = ids.unsqueeze(0).to(device)
        yield found, (found != loaded.tokenizer.pad_token_id).long()
