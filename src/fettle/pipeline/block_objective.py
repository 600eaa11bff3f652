"""A loaded block as a tuner sees it: a function of its weights that says how far its outputs are from the base's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fettle.models.anatomy import Linear
from fettle.models.gradients import require_gradients_, weight_gradients
from fettle.models.skeleton import Skeleton
from fettle.workers import Workers


class BlockObjective:
    """Implements `methods.protocols.BlockView` for one block of a skeleton.

    Windows run side by side, and their errors and gradients are added in their order, so the number of threads changes
    no bit. Every call leaves its weights in the block.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        block: int,
        linears: Mapping[str, Linear],
        windows: Sequence[tuple[Tensor, Tensor]],
        workers: Workers,
    ) -> None:
        """`windows`: what enters the block, and what should come out of it, [1, tokens, hidden] each."""
        self._skeleton, self._block, self._linears = skeleton, block, linears
        self._windows, self._workers = windows, workers
        energy = sum(float(target.square().sum(dtype=torch.float64)) for _, target in windows)
        tokens = sum(target.shape[1] for _, target in windows)
        self._energy = energy / tokens or 1.0  # of a token: errors are relative to it

    @property
    def windows(self) -> int:
        """How many there are."""
        return len(self._windows)

    def error(self, weights: Mapping[str, Tensor], windows: Sequence[int]) -> float:
        """Relative squared error of the outputs, the mean of these windows."""
        self._place(weights)

        def one(window: int) -> float:
            hidden, target = self._windows[window]
            return float(self._distance(self._skeleton.run_block(self._block, hidden), target))

        return sum(self._workers.map(one, windows)) / len(windows)

    def gradient(self, weights: Mapping[str, Tensor], windows: Sequence[int]) -> tuple[float, dict[str, Tensor]]:
        """That error, and its gradient for each weight [out, in]."""
        self._place(weights)
        names = list(weights)
        linears = [self._linears[name] for name in names]
        require_gradients_(self._skeleton, linears, True)

        def one(window: int) -> tuple[float, list[Tensor]]:
            hidden, target = self._windows[window]
            return weight_gradients(
                self._skeleton, self._block, hidden, lambda output: self._distance(output, target), linears
            )

        try:
            found = self._workers.map(one, windows)
        finally:
            require_gradients_(self._skeleton, linears, False)
        total = {name: found[0][1][place].clone() for place, name in enumerate(names)}
        for _, gradients in found[1:]:
            for name, gradient in zip(names, gradients, strict=True):
                total[name] += gradient
        count = len(windows)
        return sum(error for error, _ in found) / count, {name: sums.div_(count).cpu() for name, sums in total.items()}

    def _place(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self._skeleton.set_weight_(self._linears[name], weight)

    def _distance(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum() / (output.shape[1] * self._energy)
