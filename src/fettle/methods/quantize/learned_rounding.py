"""Learned rounding: all linears of a block together, by the gradient of what the block gives out.

Rounding each weight to the nearest level minimises an error that nobody feels. AdaRound (Nagel et al. 2020,
https://arxiv.org/abs/2004.10568) learns for each weight whether to round up or down; SignRound, which AutoRound
implements (Cheng et al. 2023, https://arxiv.org/abs/2309.05516), does so for a whole transformer block, by the sign of
the gradient, in a few hundred steps, and learns the clipping range along:

    minimise  ‖block(X; V) - block°(X°)‖²  over codes and scales of V

X is what the compressed blocks before give, X° and block° the original's. Ours differs in three things:

- It starts from GPTQ's codes (`start`), which are near the bottom of a quadratic model of the same error, and not from
  the nearest ones: the gradient is spent on what GPTQ cannot see, nonlinearities and linears that make up for another.
- Codes and scales move apart, by Adam's step in place of the bare sign (`soft_codes.py`), and every step looks at
  values as they will be read from the file.
- A part of the windows is held back: the state with the least error there is kept, the start included, and when it has
  not fallen for a while the search ends. So the result is not worse than the start on text that no step saw.

Cost: steps · batch forward and backward passes through the block; memory its weights seven times in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from fettle.methods.protocols import BlockView, Codes, Tuner
from fettle.methods.quantize.fields import GridFields
from fettle.methods.quantize.gptq import Gptq
from fettle.methods.quantize.round_to_nearest import RoundToNearest
from fettle.methods.quantize.soft_codes import SoftCodes
from fettle.tensors.quantized import QuantizedTensor

LOOKS = 10  # how often the windows held back are looked at
PATIENCE = 3  # looks without a gain
HELD_BACK = 8  # every how manieth window

Made_co = TypeVar("Made_co", covariant=True)


@dataclass(frozen=True, kw_only=True)
class LearnedRounding(GridFields):
    """Codes and scales of a whole block, learned from what the block gives out."""

    name: ClassVar[str] = "learned_rounding"
    title: ClassVar[str] = "Learned rounding"
    source: ClassVar[str] = "after SignRound (AutoRound), Cheng et al. 2023, https://arxiv.org/abs/2309.05516"
    statistics: ClassVar[tuple[str, ...]] = ("gram", "drift")
    objective: ClassVar[str] = "output_error"

    start: Literal["gptq", "round_to_nearest"] = field(
        default="gptq", metadata={"help": "where the codes start: GPTQ's or the nearest ones"}
    )
    steps: int = field(default=200, metadata={"help": "gradient steps a block", "minimum": 1, "maximum": 100_000})
    batch_windows: int = field(default=8, metadata={"help": "windows a step", "minimum": 1})
    rounding_rate: float = field(
        default=0.25, metadata={"help": "how many levels a code can travel in all", "minimum": 0.0, "maximum": 16.0}
    )
    scale_rate: float = field(
        default=0.001, metadata={"help": "relative change of a scale in the first step", "minimum": 0.0, "maximum": 0.1}
    )

    def needs(self) -> tuple[str, ...]:
        """What the start needs."""
        return self._start().needs()

    def _start(self) -> Gptq | RoundToNearest:
        shared = {name: getattr(self, name) for name in GridFields.__dataclass_fields__}
        return Gptq(**shared) if self.start == "gptq" else RoundToNearest(**shared, clip="search")

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> QuantizedTensor:
        """The start's codes for weight [out, in]: what `tune` then improves."""
        return self._start().compress(weight, statistics, dtype=dtype)

    def tuner(self) -> Tuner[QuantizedTensor]:
        """The learning, with this instance's options."""
        return RoundingTuner(
            steps=self.steps,
            batch_windows=self.batch_windows,
            rounding_rate=self.rounding_rate,
            scale_rate=self.scale_rate,
        )


@dataclass(frozen=True, kw_only=True)
class RoundingTuner:
    """See the module's text; fields as in `LearnedRounding`."""

    most_weights: ClassVar[None] = None  # whoever names the method asks for the time

    steps: int = 200
    batch_windows: int = 8
    rounding_rate: float = 0.25
    scale_rate: float = 0.001
    seed: int = 0

    def tune(
        self, start: Mapping[str, QuantizedTensor], weights: Mapping[str, Tensor], block: BlockView
    ) -> dict[str, QuantizedTensor]:
        """Codes and scales with no larger error than the start's on the windows held back; pure."""
        soft = {name: SoftCodes(start[name], weights[name]) for name in start}
        return learned(start, soft, block, self)


class Movable(Protocol[Made_co]):
    """One linear's codes in motion."""

    def values(self) -> Tensor:
        """The weight that the codes stand for now, float32 [out, in]."""
        ...

    def quantized(self) -> Made_co:
        """The codes as they are now."""
        ...

    def step_(self, gradient: Tensor, *, latent_rate: float, scale_rate: float) -> None:
        """One step down the gradient [out, in]; rates in levels for codes, relative for scales."""
        ...


def learned(
    start: Mapping[str, Codes], soft: Mapping[str, Movable[Codes]], block: BlockView, options: RoundingTuner
) -> dict[str, Codes]:
    """What has the least error on the windows held back, of the start and of where its codes in motion come by."""
    seen, kept = split_windows(block.windows)
    best = dict(start)
    least = block.error({name: found.dequantize() for name, found in start.items()}, kept)
    generator = torch.Generator().manual_seed(options.seed)
    every, misses = max(1, options.steps // LOOKS), 0
    for step in range(options.steps):
        batch = _draw(seen, options.batch_windows, generator)
        _, gradients = block.gradient({name: codes.values() for name, codes in soft.items()}, batch)
        left = 1 - step / options.steps  # rates fall linearly; their sum is half of the first times the steps
        for name, codes in soft.items():
            codes.step_(
                gradients[name],
                latent_rate=2 * options.rounding_rate / options.steps * left,
                scale_rate=options.scale_rate * left,
            )
        if (step + 1) % every and step + 1 < options.steps:
            continue
        error = block.error({name: codes.values() for name, codes in soft.items()}, kept)
        misses = 0 if error < least else misses + 1
        if error < least:
            least, best = error, {name: codes.quantized() for name, codes in soft.items()}
        if misses >= PATIENCE:
            break
    return best


def split_windows(count: int) -> tuple[list[int], list[int]]:
    """Windows to learn from, and those held back; a single one is both."""
    kept = list(range(HELD_BACK - 1, count, HELD_BACK)) or [count - 1]
    seen = [index for index in range(count) if index not in set(kept)] or kept
    return seen, kept


def _draw(windows: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    order = torch.randperm(len(windows), generator=generator)[:count].sort().values
    return [windows[index] for index in order.tolist()]
