"""What a method can ask the walk to collect on the inputs of its linear.

    gram    inputsᵀ·inputs [in, in]: how strongly each input, and each pair of inputs, is driven. With it the error that
            a changed weight makes in the outputs is exact: ‖(W - V)·inputsᵀ‖² = tr(Δ·gram·Δᵀ).
    input_range   the ends of the inputs, and a histogram of them: what a stored input scale is found from.
    drift   (original inputs - inputs)ᵀ·inputs [in, in]: how far compressed blocks before this one moved its inputs.
    absolute_mean, absolute_maximum
            mean and maximum of |inputs| [in]: how strongly each channel is driven, and its outliers.
    squared_norm    sum of inputs² [in]: the gram's diagonal without the rest.
    active_share    share of tokens on which |input| is above the token's own mean [in].
    gradient        mean |∂loss/∂weight| [out, in]: the one that is the weight's and not its inputs'; what runs the
                    original backwards collects it (`pipeline/loss_gradients.py`).

The gram is summed in float32, one window after the other, by tiles of 512 x 512 of its lower triangle; the tiles are
independent and run side by side, so 1 and 2 threads give the same bits. The upper triangle is copied at the end.
Why not float64: a sum over W windows of positive terms rounds by about √W · 6e-8 relative, 1e-6 for 256 windows, and
GPTQ adds a hundredth of the mean diagonal before it inverts; float64 would double the largest tensor of the whole run.

Cost: tokens · in² multiply-adds (half of them saved); memory in² · 4 bytes and one copy of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fettle.methods.quantize.histogram import SIDE, Histogram
from fettle.workers import Workers

TILE = 512  # columns; fixed, so that the order of every sum is
FEWEST_TOKENS = 0.25  # of a linear's inputs: a statistic over fewer would look like knowledge and be noise


class Statistic(Protocol):
    """Something to collect on inputs [tokens, in]; the state is its own business."""

    name: ClassVar[str]
    paired: ClassVar[bool]  # whether it is fed (original inputs, inputs) pairs [2, tokens, in]
    needs_many: ClassVar[bool]  # whether fewer than a quarter as many tokens as inputs say nothing

    def start(self, in_features: int) -> Any:
        """An empty state."""
        ...

    def add_(self, state: Any, inputs: Sequence[Tensor], workers: Workers) -> None:
        """Adds windows of inputs, each [tokens, in], in their order; how they are batched changes no bit."""
        ...

    def finish(self, state: Any) -> Tensor:
        """The statistic; the state is used up."""
        ...

    def neutral(self, in_features: int) -> Tensor:
        """What stands for knowing nothing: every input counts the same."""
        ...

    def memory_bytes(self, in_features: int) -> int:
        """Bytes of the state and of the finished statistic (they share them)."""
        ...


@dataclass
class GramState:
    """A gram on its way: the lower triangle, by tiles.

    Attributes:
        total: float32 [in, in]; above the diagonal tiles it is undefined until `finish`.
        tokens: how many inputs were added.
    """

    total: Tensor
    tokens: int = 0


class Gram:
    """inputsᵀ·inputs, float32 [in, in]."""

    name: ClassVar[str] = "gram"
    paired: ClassVar[bool] = False
    needs_many: ClassVar[bool] = True

    def start(self, in_features: int) -> GramState:
        """No inputs yet: zero."""
        return GramState(total=torch.zeros(in_features, in_features))

    def add_(self, state: GramState, inputs: Sequence[Tensor], workers: Workers) -> None:
        """Adds windows of inputs [tokens, in], in their order."""
        total, in_features = state.total, len(state.total)
        windows = [window.detach().float().contiguous() for window in inputs if len(window)]

        def tile(corner: tuple[int, int]) -> None:
            row, column = corner
            target = total[row : row + TILE, column : column + TILE]
            for window in windows:
                target.addmm_(window[:, row : row + TILE].T, window[:, column : column + TILE])

        starts = range(0, in_features, TILE)
        with torch.no_grad():
            workers.map(tile, [(row, column) for row in starts for column in starts if column <= row])
        state.tokens += sum(len(window) for window in windows)

    def finish(self, state: GramState) -> Tensor:
        """The symmetric gram: the upper triangle is the lower one's mirror image, exactly."""
        total = state.total
        for row in range(0, len(total), TILE):
            for column in range(0, row, TILE):
                total[column : column + TILE, row : row + TILE] = total[row : row + TILE, column : column + TILE].T
            corner = total[row : row + TILE, row : row + TILE]
            corner.copy_(corner.tril() + corner.tril(-1).T)
        return total

    def neutral(self, in_features: int) -> Tensor:
        """The identity: every input as strong as every other, none related."""
        return torch.eye(in_features)

    def memory_bytes(self, in_features: int) -> int:
        """One float32 matrix [in, in]."""
        return 4 * in_features * in_features


class Drift:
    """(original inputs - inputs)ᵀ·inputs, float32 [in, in]: how far compressed blocks before this one moved its inputs.

    Each window is a pair, (original inputs, inputs), as one tensor [2, tokens, in].
    """

    name: ClassVar[str] = "drift"
    paired: ClassVar[bool] = True
    needs_many: ClassVar[bool] = True

    def start(self, in_features: int) -> GramState:
        """No inputs yet: zero."""
        return GramState(total=torch.zeros(in_features, in_features))

    def add_(self, state: GramState, inputs: Sequence[Tensor], workers: Workers) -> None:
        """Adds pairs of windows [2, tokens, in], in their order."""
        total, in_features = state.total, len(state.total)
        windows = [(pair[0].float() - pair[1].float(), pair[1].float().contiguous()) for pair in inputs if pair.numel()]

        def tile(corner: tuple[int, int]) -> None:
            row, column = corner
            target = total[row : row + TILE, column : column + TILE]
            for moved, window in windows:
                target.addmm_(moved[:, row : row + TILE].T, window[:, column : column + TILE])

        starts = range(0, in_features, TILE)
        with torch.no_grad():
            workers.map(tile, [(row, column) for row in starts for column in starts])
        state.tokens += sum(len(window) for _, window in windows)

    def finish(self, state: GramState) -> Tensor:
        """The sum."""
        return state.total

    def neutral(self, in_features: int) -> Tensor:
        """Zero: nothing moved."""
        return torch.zeros(in_features, in_features)

    def memory_bytes(self, in_features: int) -> int:
        """One float32 matrix [in, in]."""
        return 4 * in_features * in_features


@dataclass
class ChannelState:
    """A figure for each input channel on its way.

    Attributes:
        total: float64 [in], a sum or a maximum.
        tokens: how many inputs were added.
    """

    total: Tensor
    tokens: int = 0


class AbsoluteMean:
    """Mean of |inputs|, float32 [in]."""

    name: ClassVar[str] = "absolute_mean"
    paired: ClassVar[bool] = False
    needs_many: ClassVar[bool] = True

    def start(self, in_features: int) -> ChannelState:
        """No inputs yet: zero."""
        return ChannelState(total=torch.zeros(in_features, dtype=torch.float64))

    def add_(self, state: ChannelState, inputs: Sequence[Tensor], workers: Workers) -> None:
        """Adds windows of inputs [tokens, in], in their order."""
        for window in inputs:
            state.total += window.detach().abs().sum(0, dtype=torch.float64)
            state.tokens += len(window)

    def finish(self, state: ChannelState) -> Tensor:
        """The sum by the number of tokens."""
        return (state.total / max(1, state.tokens)).float()

    def neutral(self, in_features: int) -> Tensor:
        """Ones: every input as strong as every other."""
        return torch.ones(in_features)

    def memory_bytes(self, in_features: int) -> int:
        """One float64 vector [in]."""
        return 8 * in_features


class AbsoluteMaximum(AbsoluteMean):
    """Maximum of |inputs|, float32 [in]."""

    name: ClassVar[str] = "absolute_maximum"

    def add_(self, state: ChannelState, inputs: Sequence[Tensor], workers: Workers) -> None:
        """Looks at windows of inputs [tokens, in]."""
        for window in inputs:
            if len(window):
                torch.maximum(state.total, window.detach().abs().amax(0).double(), out=state.total)
            state.tokens += len(window)

    def finish(self, state: ChannelState) -> Tensor:
        """The largest."""
        return state.total.float()


class SquaredNorm(AbsoluteMean):
    """Sum of inputs², float32 [in]."""

    name: ClassVar[str] = "squared_norm"

    def add_(self, state: ChannelState, inputs: Sequence[Tensor], workers: Workers) -> None:
        """Adds windows of inputs [tokens, in], in their order."""
        for window in inputs:
            state.total += window.detach().float().square().sum(0, dtype=torch.float64)
            state.tokens += len(window)

    def finish(self, state: ChannelState) -> Tensor:
        """The sum."""
        return state.total.float()


class ActiveShare(AbsoluteMean):
    """Share of tokens on which |input| is above the mean of that token's |inputs|, float32 [in]."""

    name: ClassVar[str] = "active_share"

    def add_(self, state: ChannelState, inputs: Sequence[Tensor], workers: Workers) -> None:
        """Counts in windows of inputs [tokens, in]."""
        for window in inputs:
            size = window.detach().float().abs()
            state.total += (size > size.mean(1, keepdim=True)).sum(0)
            state.tokens += len(window)


class InputRange:
    """A histogram of the inputs with their ends, as `Histogram.to_tensor` packs it; a few thousand numbers."""

    name: ClassVar[str] = "input_range"
    paired: ClassVar[bool] = False
    needs_many: ClassVar[bool] = False

    def start(self, in_features: int) -> Histogram:
        """No inputs yet."""
        return Histogram()

    def add_(self, state: Histogram, inputs: Sequence[Tensor], workers: Workers) -> None:
        """Adds windows of inputs [tokens, in], in their order, one by one: a moving average depends on it."""
        for window in inputs:
            if len(window):
                state.add_(window.detach().float())

    def finish(self, state: Histogram) -> Tensor:
        """The packed histogram."""
        return state.to_tensor()

    def neutral(self, in_features: int) -> Tensor:
        """Nothing seen."""
        return Histogram().to_tensor()

    def memory_bytes(self, in_features: int) -> int:
        """The counts, twice."""
        return 2 * 8 * 2 * SIDE


STATISTICS: dict[str, Statistic] = {
    kind.name: kind
    for kind in (Gram(), Drift(), AbsoluteMean(), AbsoluteMaximum(), SquaredNorm(), ActiveShare(), InputRange())
}
OF_THE_WEIGHT = frozenset({"gradient"})  # declared like the others, and not collected from inputs
