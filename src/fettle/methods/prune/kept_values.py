"""What stayed of a whole block, moved by the gradient of what the block gives out; the masks are held.

    minimise  ‖block(X; V) - block°(X°)‖²  over the values V that stayed

Healing under the gram (`healing.py`) makes each linear's outputs right alone, on the inputs that it has; the block's
outputs are what counts, and a linear can make up for what another lost. So this is learned rounding's loop
(`quantize/learned_rounding.py`) with values in the place of codes: Adam's steps, X what the pruned blocks before give,
a part of the windows held back, and the start kept where nothing beats it there. Codes move as they do there, where
there are any. Guo et al.: EBFT, 2024, https://arxiv.org/abs/2402.12419, tune pruned blocks so, with plain gradients.

Cost: steps · windows a step forward and backward passes through the block; memory the kept weights four times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fettle.methods.protocols import BlockView
from fettle.methods.quantize.learned_rounding import Movable, RoundingTuner, learned
from fettle.methods.quantize.soft_codes import Adam, SoftCodes
from fettle.tensors.masked import MaskedTensor
from fettle.tensors.quantized import QuantizedTensor


class SoftValues:
    """One linear's kept values in motion; a rate counts in their root mean square."""

    def __init__(self, start: MaskedTensor) -> None:
        self._kept, self._scheme = start.kept, start.scheme
        self._value = start.dequantize(torch.float32)
        self._size = float(self._value[self._kept].square().mean().sqrt()) if bool(self._kept.any()) else 0.0
        self._adam = Adam(self._value.shape)

    def values(self) -> Tensor:
        """The weight as a file would hold it, float32 [out, in]."""
        return self._value.to(self._scheme.torch_value_dtype).float()  # what went is zero, and no step moves it

    def quantized(self) -> MaskedTensor:
        """The values as they are now, in their stored type."""
        return MaskedTensor.of(self._value, self._kept, self._scheme)

    def step_(self, gradient: Tensor, *, latent_rate: float, scale_rate: float) -> None:
        """One step down the gradient [out, in], of what stayed."""
        self._value -= latent_rate * self._size * self._adam.direction_(gradient * self._kept)


class SoftMaskedCodes:
    """One linear's codes of what stayed, in motion."""

    def __init__(self, start: MaskedTensor, weight: Tensor) -> None:
        assert isinstance(start.values, QuantizedTensor)
        self._kept, self._scheme = start.kept, start.scheme
        self._soft = SoftCodes(start.values, weight * start.kept)

    def values(self) -> Tensor:
        """The weight that mask and codes stand for now, float32 [out, in]."""
        return self._soft.values() * self._kept

    def quantized(self) -> MaskedTensor:
        """Mask and codes as they are now."""
        return MaskedTensor.of_codes(self._soft.quantized(), self._kept, self._scheme)

    def step_(self, gradient: Tensor, *, latent_rate: float, scale_rate: float) -> None:
        """One step down the gradient [out, in], of what stayed."""
        self._soft.step_(gradient * self._kept, latent_rate=latent_rate, scale_rate=scale_rate)


@dataclass(frozen=True, kw_only=True)
class KeptValuesTuner:
    """See the module's text.

    Attributes:
        steps: gradient steps a block.
        batch_windows: windows a step.
        rate: how far a value can travel in all, in the root mean square of its matrix; a code, in levels.
        most_weights: a block with more weights to tune is left as it is; None: none is.
    """

    steps: int
    batch_windows: int
    rate: float
    most_weights: int | None = None

    def tune(
        self, start: Mapping[str, MaskedTensor], weights: Mapping[str, Tensor], block: BlockView
    ) -> dict[str, MaskedTensor]:
        """Values with no larger error than the start's on the windows held back; pure."""
        options = RoundingTuner(steps=self.steps, batch_windows=self.batch_windows, rounding_rate=self.rate)
        soft: dict[str, Movable[MaskedTensor]] = {
            name: SoftValues(found) if isinstance(found.values, Tensor) else SoftMaskedCodes(found, weights[name])
            for name, found in start.items()
        }
        return learned(start, soft, block, options)
