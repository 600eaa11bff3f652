"""SmoothQuant: move what makes activations hard to round into the weights, half way.

Xiao, Lin, Seznec, Wu, Demouth, Han: SmoothQuant, 2022, https://arxiv.org/abs/2211.10438. A few input channels of a
transformer are a hundred times as large as the others, and a scale for a whole token follows them. Dividing channel c
by

    s_c = max|x_c|^alpha / max|w_c|^(1 - alpha)

and multiplying the column by it changes nothing and leaves both with like ranges (alpha 1/2); the maxima are those of
the calibration text and of all linears that read the channel.

The paper rounds weights and activations to 8 bits. Here the weights are rescaled and then rounded to nearest or by
GPTQ (`solver`); `activations` says what becomes of the inputs. It is made for those, not for weights alone. Give it
`bits: 8`, `group_size: none` for what the paper does with the weights.

With alpha 1 each channel is divided by its own maximum: that is a static scale for each input channel, folded into what
feeds it. A product of integers cannot have one in any other place. Weights then bear all the differences between
channels, which costs them more the fewer bits they have; GPTQ takes some of that back.

Unlike the paper this also divides the values before the output projection and the up rows before the down projection,
where nothing but a product stands between.

Cost: a pass over the calibration text and one over the weights, then the solver's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fettle.errors import NonFiniteError
from fettle.methods.protocols import Rescaler
from fettle.methods.quantize.fields import GridFields
from fettle.methods.quantize.gptq import Gptq
from fettle.methods.quantize.ranges import FUSED_MAXIMUM, NOT_FINITE
from fettle.methods.quantize.round_to_nearest import round_to_nearest
from fettle.tensors.quantized import QuantizedTensor

LARGEST = 1e4  # a factor's bound, both ways


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(GridFields):
    """SmoothQuant's factors, which leave inputs easier to round, then round to nearest or GPTQ."""

    name: ClassVar[str] = "smoothquant"
    title: ClassVar[str] = "SmoothQuant"
    source: ClassVar[str] = "Xiao et al. 2022, https://arxiv.org/abs/2211.10438"
    statistics: ClassVar[tuple[str, ...]] = ("gram", "drift")
    objective: ClassVar[str] = "weight_error"

    alpha: float = field(
        default=0.5,
        metadata={"help": "how much of the inputs' range goes to the weights", "minimum": 0.0, "maximum": 1.0},
    )
    solver: Literal["round_to_nearest", "gptq"] = field(
        default="round_to_nearest", metadata={"help": "what chooses the codes of the rescaled weights"}
    )
    clip: Literal["none", "search"] = field(
        default="none", metadata={"help": "the full range of each group, or the one with the least squared error"}
    )

    def needs(self) -> tuple[str, ...]:
        """What the solver looks at."""
        return self._gptq().needs() if self.solver == "gptq" else ()

    def _gptq(self) -> Gptq:
        return Gptq(**{name: getattr(self, name) for name in GridFields.__dataclass_fields__}, clip=self.clip)

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> QuantizedTensor:
        """The solver's codes of weight [out, in]; the walk rescaled it where it can be."""
        if self.solver == "gptq":
            return self._gptq().compress(weight, statistics, dtype=dtype)
        return round_to_nearest(weight, self.scheme(dtype), clip=self.clip, largest=statistics.get(FUSED_MAXIMUM))

    def rescaler(self) -> Rescaler:
        """The factors, with this instance's alpha."""
        return SmoothQuantRescaler(alpha=self.alpha)


@dataclass(frozen=True, kw_only=True)
class SmoothQuantRescaler:
    """See the module's text."""

    statistics: ClassVar[tuple[str, ...]] = ("absolute_maximum",)

    alpha: float = 0.5

    def factors(
        self, weights: Sequence[Tensor], statistics: Mapping[str, Tensor], channels: Tensor, *, dtype: str
    ) -> Tensor:
        """max|x|^alpha / max|w|^(1 - alpha), float32 [channels]; 1 where either is zero."""
        inputs = _channel_maximum(statistics["absolute_maximum"], channels)
        columns = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
        if not bool(torch.isfinite(columns).all()):
            raise NonFiniteError(NOT_FINITE)
        largest = _channel_maximum(columns, channels)
        wanted = inputs.double().pow(self.alpha) / largest.double().pow(1 - self.alpha)
        usable = (inputs > 0) & (largest > 0)
        return torch.where(usable, wanted.clamp(1 / LARGEST, LARGEST), 1.0).float()


def _channel_maximum(figures: Tensor, channels: Tensor) -> Tensor:
    """Of figures ≥ 0 of the columns [in], the maximum over the columns that read each channel."""
    found = torch.zeros(int(channels.max()) + 1)
    return found.scatter_reduce_(0, channels, figures.float(), "amax")
