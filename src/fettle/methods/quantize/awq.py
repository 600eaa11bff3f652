"""AWQ: give the columns that are driven hard more of the grid, by moving a factor from their inputs into them.

Lin, Tang, Tang, Yang, Chen, Wang, Dang, Gan, Han: AWQ, 2023, https://arxiv.org/abs/2306.00978. Dividing an input
channel by s (in the norm, or in the rows, that give it out) and multiplying its column by s changes nothing; but
rounding then errs on the column by a part 1/s of what it did. The paper takes

    s_c = mean|x_c|^alpha, divided by √(max s · min s),   alpha the best of a grid from 0 to 1

by the error of the outputs when all linears that read these inputs are rounded to nearest. Ours is that, with

- the error exact, Σ tr(ΔGΔᵀ) over those linears with the gram G of the inputs, Δ = W - round(W·s)/s; alpha 0 is
  s = 1 and among the choices, so the factors are never worse than none in that error;
- query heads that share a key-value head sharing factors, where the paper leaves such values alone;
- a solver behind it: the nearest codes with a clipping search (the paper), or GPTQ, which sees the rescaled block.

Without a block (a diagnosis, a search for a budget) there is nothing to move factors from: the solver works alone.

`clip` of the solver round_to_nearest: `search` takes each group's range by the squared error of its weights, a column
counting as much as it is driven, G_kk; `best` compares with the full range by the exact error, row by row.

Cost: steps + 1 times rounding the group's linears and out · in² multiply-adds each; memory two copies of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fettle.errors import NonFiniteError
from fettle.methods.protocols import Rescaler
from fettle.methods.quantize.errors import quadratic_form
from fettle.methods.quantize.fields import GridFields
from fettle.methods.quantize.gptq import Gptq
from fettle.methods.quantize.ranges import FUSED_MAXIMUM, in_tensor_units
from fettle.methods.quantize.round_to_nearest import round_to_nearest
from fettle.methods.quantize.sharing import choose_shared
from fettle.methods.quantize.sweep import Solution, better_rows
from fettle.tensors.quantized import QuantizedTensor, quantize, row_tiles
from fettle.tensors.scheme import Scheme

LARGEST = 1e4  # a factor's bound, both ways: a norm must stay a number that its type can hold


@dataclass(frozen=True, kw_only=True)
class Awq(GridFields):
    """AWQ: factors moved into the columns that are driven hard, then the nearest codes or GPTQ."""

    name: ClassVar[str] = "awq"
    title: ClassVar[str] = "AWQ"
    source: ClassVar[str] = "Lin et al. 2023, https://arxiv.org/abs/2306.00978"
    statistics: ClassVar[tuple[str, ...]] = ("gram", "drift")
    objective: ClassVar[str] = "output_error"

    solver: Literal["round_to_nearest", "gptq"] = field(
        default="round_to_nearest", metadata={"help": "what chooses the codes of the rescaled weights"}
    )
    clip: Literal["none", "search", "best"] = field(
        default="best",
        metadata={
            "help": "the full range of each group, a searched one, or the better of both for each row, in the solver"
        },
    )
    alphas: int = field(
        default=20,
        metadata={
            "help": "how many exponents above 0 are tried; 0 rescales nothing", "minimum": 0, "maximum": 1000,
        },
    )  # fmt: skip

    def needs(self) -> tuple[str, ...]:
        """What the solver looks at."""
        if self.solver == "gptq":
            return self._gptq().needs()
        return () if self.clip == "none" else ("gram",)

    def _gptq(self) -> Gptq:
        return Gptq(**{name: getattr(self, name) for name in GridFields.__dataclass_fields__}, clip=self.clip)

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> QuantizedTensor:
        """The solver's codes for weight [out, in]; the walk rescaled it where it can be."""
        if self.solver == "gptq":
            return self._gptq().compress(weight, statistics, dtype=dtype)
        scheme = self.scheme(dtype)
        largest = statistics.get(FUSED_MAXIMUM)
        if self.clip == "none":
            return round_to_nearest(weight, scheme, largest=largest)
        gram = statistics["gram"]
        return in_tensor_units(
            weight, scheme, lambda units: nearest_by_gram(units, gram, scheme, clip=self.clip), largest
        )

    def rescaler(self) -> Rescaler:
        """The search for factors, in this instance's scheme."""
        grid = GridFields(**{name: getattr(self, name) for name in GridFields.__dataclass_fields__})
        return AwqRescaler(grid=grid, alphas=self.alphas)


@dataclass(frozen=True, kw_only=True)
class AwqRescaler:
    """See the module's text."""

    statistics: ClassVar[tuple[str, ...]] = ("gram", "absolute_mean")

    grid: GridFields
    alphas: int = 20

    def factors(
        self, weights: Sequence[Tensor], statistics: Mapping[str, Tensor], channels: Tensor, *, dtype: str
    ) -> Tensor:
        """The best of the grid, ones included, float32 [channels]."""
        gram, scheme = statistics["gram"], self.grid.scheme(dtype)
        driven = channel_mean(statistics["absolute_mean"], channels)
        best = torch.ones_like(driven)
        least = rounding_error(weights, gram, best[channels], scheme)
        for step in range(1, self.alphas + 1):
            tried = powers(driven, step / self.alphas)
            error = rounding_error(weights, gram, tried[channels], scheme)
            if error < least:
                best, least = tried, error
        return best


def channel_mean(figures: Tensor, channels: Tensor) -> Tensor:
    """Of figures of the columns [in], the mean over the columns that read each channel, float32 [channels]."""
    count = int(channels.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, channels, figures.double())
    return (sums / torch.bincount(channels, minlength=count)).float()


def powers(driven: Tensor, alpha: float) -> Tensor:
    """driven^alpha around 1; 1 for channels that nothing drives."""
    alive = (driven > 0) & torch.isfinite(driven)
    if not bool(alive.any()):
        return torch.ones_like(driven)
    logs = driven.double().clamp(min=torch.finfo(torch.float32).tiny).log() * alpha
    middle = (logs[alive].max() + logs[alive].min()) / 2
    return torch.where(alive, (logs - middle).exp().clamp(1 / LARGEST, LARGEST), 1.0).float()


def rounding_error(weights: Sequence[Tensor], gram: Tensor, columns: Tensor, scheme: Scheme) -> float:
    """Σ tr(ΔGΔᵀ) of weights [out, in] that are rounded to nearest while their columns are multiplied by these."""
    total = 0.0
    for weight in weights:
        found = round_to_nearest(weight * columns, scheme)
        for rows in row_tiles(weight.shape[0], weight.shape[1]):
            total += quadratic_form(weight[rows] - found.dequantize_tile(rows).float() / columns, gram)
    return total


def nearest_by_gram(weight: Tensor, gram: Tensor, scheme: Scheme, *, clip: str) -> QuantizedTensor:
    """The nearest codes of weight [out, in], in ranges that are searched by how strongly each column is driven; pure.

    Args:
        weight: [out, in].
        gram: float32 [in, in].
        scheme: any.
        clip: "search", or "best" for the full range in rows where it has the smaller error tr(ΔGΔᵀ).
    """
    importance = gram.diagonal().clamp(min=0).contiguous()
    if not bool(torch.isfinite(importance).all()):
        raise NonFiniteError("the gram of this linear's inputs holds NaN or infinity; check the block before it")
    if not bool(importance.any()):
        importance = torch.ones_like(importance)

    def solved(chosen: str) -> Solution:
        shared = choose_shared(weight, scheme, clip=chosen, importance=importance)
        found = quantize(weight, shared.scale, shared.zero_point, scheme, levels=shared.levels)
        errors = [_row_errors(weight[rows], found, rows, gram) for rows in row_tiles(weight.shape[0], weight.shape[1])]
        return Solution(quantized=found, errors=torch.cat(errors))

    return solved("search").quantized if clip == "search" else better_rows(solved("none"), solved("search"))


def _row_errors(tile: Tensor, found: QuantizedTensor, rows: slice, gram: Tensor) -> Tensor:
    difference = tile.float() - found.dequantize_tile(rows).float()
    return (difference @ gram).mul_(difference).sum(1)
