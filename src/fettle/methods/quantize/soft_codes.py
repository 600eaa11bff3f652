"""Codes that a gradient can move: a latent position between the levels for every weight, and a scale for every group.

    value = level nearest to u · scale        u in units of the scale, one for each weight; scale = start · e^t

Rounding has no slope, so its gradient is passed straight through (Bengio et al. 2013): ∂value/∂u = scale inside the
range of the levels and 0 beyond; ∂value/∂t = value. Both move by Adam's step (Kingma & Ba 2014), which is about 1 for a
gradient that keeps its sign and small for one that does not; so a rate counts in levels, whatever the layer. SignRound
(Cheng et al. 2023) takes the bare sign, which moves the many weights whose gradient is noise as far as the others: on
stories260K at 3 bits that gave 0.243 of KL where Adam's step gave 0.227 (and GPTQ, the start, 0.294).
Learned levels have no scale: each level moves with the sum of the gradients of its weights instead.

Values are always those of the file: scales and levels are rounded to their stored type before they are used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fettle.errors import UsageError
from fettle.methods.quantize.ranges import stored_scale
from fettle.tensors.quantized import QuantizedTensor, dequantize_rows, expand_groups, quantize_rows
from fettle.tensors.scales import Shared

MARGIN = 0.49  # of the gap between levels: how far a weight's place may be kept from the level that it got
MOMENTS = (0.9, 0.95)
TINY = 1e-30


class Adam:
    """Running means of a gradient and of its square."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._first, self._second = torch.zeros(shape), torch.zeros(shape)
        self._steps = 0

    def direction_(self, gradient: Tensor) -> Tensor:
        """Adam's step for this gradient, of size about one, with the means corrected for their start at zero."""
        self._steps += 1
        self._first.lerp_(gradient, 1 - MOMENTS[0])
        self._second.lerp_(gradient.square(), 1 - MOMENTS[1])
        first = self._first / (1 - MOMENTS[0] ** self._steps)
        return first.div_((self._second / (1 - MOMENTS[1] ** self._steps)).sqrt_().add_(TINY))


class SoftCodes:
    """One linear's codes in motion.

    Attributes:
        latent: float32 [out, in], in units of the scale (of learned levels: the value itself).
        log_scale: float32 [rows, groups], t; zero at the start.
    """

    def __init__(self, start: QuantizedTensor, weight: Tensor) -> None:
        if start.remainder is not None:
            raise UsageError(
                f"codes with a remainder ({start.scheme.describe()}) cannot be learned: their gradient would move what "
                "the remainder was fitted to. Use learned_rounding without outliers and factors"
            )
        self.scheme = start.scheme
        self._unit = None if start.tensor_scale is None else start.tensor_scale
        self._start = start
        self._base = start.scale.float()
        self._zero_point, self._levels = start.zero_point, start.levels
        self.log_scale = torch.zeros_like(self._base)
        self._shared_adam = Adam(self._movable().shape)
        self._latent_adam = Adam(start.shape)
        self._width = self.scheme.group_width(weight.shape[1])
        self._gap = self._level_gap()
        target = weight.float() if self._unit is None else weight.float() * self._unit
        chosen = dequantize_rows(start.codes, start.shared, self.scheme).float() / self._expanded(self._base)
        offset = target / self._expanded(self._base) - chosen
        # The level that the start chose stays the nearest; the weight's own place says to which side it leans.
        reach = MARGIN * self._gap
        self.latent = chosen + torch.minimum(torch.maximum(offset, -reach), reach)

    def _movable(self) -> Tensor:
        return self._base if self._levels is None else self._levels.float()

    def _level_gap(self) -> Tensor:
        """How far neighbouring levels are apart, in units of the latent; the mean gap of uneven grids."""
        grid = self.scheme.grid
        if self._levels is not None:
            levels = self._levels.float()
            gap = (levels[..., -1] - levels[..., 0]) / (levels.shape[-1] - 1)
            return self._expanded(gap)
        return torch.tensor((grid.levels[-1] - grid.levels[0]) / (grid.level_count - 1))

    def _expanded(self, values: Tensor) -> Tensor:
        return expand_groups(values, self._start.shape[1], self._width)

    @property
    def shared(self) -> Shared:
        """Scales and levels as they are stored now."""
        if self._levels is not None:
            return Shared(scale=self._start.scale, levels=self._levels)
        if not bool(self.log_scale.any()):
            return self._start.shared
        scale = stored_scale(self._base * self.log_scale.exp(), self.scheme)
        return Shared(scale=scale, zero_point=self._zero_point)

    def values(self) -> Tensor:
        """The weight that these codes stand for, float32 [out, in], exactly as a file's reader computes it."""
        shared = self.shared
        return dequantize_rows(self._codes(shared), shared.over(self._unit), self.scheme).float()

    def _codes(self, shared: Shared) -> Tensor:
        # The latent is in units of the scale, so that a moving scale alone changes no code.
        ones = Shared(scale=torch.ones_like(shared.scale), zero_point=shared.zero_point, levels=shared.levels)
        return quantize_rows(self.latent, ones, self.scheme)

    def quantized(self) -> QuantizedTensor:
        """The codes as they are now."""
        shared = self.shared
        found = QuantizedTensor.of(self._codes(shared), shared, self.scheme)
        if self._unit is None:
            return found
        return QuantizedTensor(
            codes=found.codes, scale=found.scale, zero_point=None, scheme=self.scheme, tensor_scale=self._unit
        )

    def step_(self, gradient: Tensor, *, latent_rate: float, scale_rate: float) -> None:
        """One step down; rates in levels for latents, relative for scales. gradient: ∂error/∂value, [out, in]."""
        shared = self.shared
        codes = self._codes(shared)
        slope = gradient if self._unit is None else gradient / self._unit
        values = dequantize_rows(codes, shared, self.scheme).float()
        if scale_rate > 0:
            self._move_shared_(slope, values, codes, scale_rate)
        if latent_rate > 0:
            self.latent -= latent_rate * self._gap * self._latent_adam.direction_(slope * self._inside(shared))

    def _inside(self, shared: Shared) -> Tensor:
        """1 where a latent is within the range of the levels, by half a gap; 0 beyond."""
        grid = self.scheme.grid
        if shared.levels is not None:
            low, high = self._expanded(shared.levels[..., 0].float()), self._expanded(shared.levels[..., -1].float())
        elif shared.zero_point is not None:
            low = -self._expanded(shared.zero_point.float())
            high = low + 2**grid.bits - 1
        else:
            low, high = torch.tensor(grid.levels[0]), torch.tensor(grid.levels[-1])
        half = self._gap / 2
        return ((self.latent >= low - half) & (self.latent <= high + half)).float()

    def _move_shared_(self, slope: Tensor, values: Tensor, codes: Tensor, rate: float) -> None:
        if self._levels is not None:
            pull = self._level_pull(slope, codes)
            size = self._levels.float().abs().amax(-1, keepdim=True)
            moved = self._levels.float() - rate * size * self._shared_adam.direction_(pull)
            self._levels = moved.to(self.scheme.value_dtype).float().sort(-1).values.to(self.scheme.value_dtype)
            return
        pull = self._group_sums(slope * values)
        self.log_scale -= rate * self._shared_adam.direction_(pull)

    def _group_sums(self, values: Tensor) -> Tensor:
        """Sums over the weights that share a scale: [out, in] → [rows, groups]."""
        rows, groups = self._base.shape
        if self.scheme.granularity == "tensor":
            return values.sum().reshape(1, 1)
        short = groups * self._width - values.shape[1]
        return torch.nn.functional.pad(values, (0, short)).reshape(rows, groups, self._width).sum(-1)

    def _level_pull(self, slope: Tensor, codes: Tensor) -> Tensor:
        """Sums of the gradients of the weights at each level: [rows, groups, levels]."""
        assert self._levels is not None
        pull = torch.zeros(self._levels.shape)
        index = codes.long()
        if self.scheme.granularity == "tensor":
            return pull.view(-1).scatter_add_(0, index.reshape(-1), slope.reshape(-1)).reshape(pull.shape)
        for group in range(pull.shape[1]):
            columns = slice(group * self._width, (group + 1) * self._width)
            pull[:, group].scatter_add_(1, index[:, columns], slope[:, columns])
        return pull
