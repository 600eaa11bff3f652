"""How often inputs have which size: counts in equal bins on both sides of zero, and the ends that were seen.

    bins       2 · SIDE equal ones from -reach to reach; reach is a power of two
    growing    an input beyond reach doubles it, and neighbours share a bin from then on

Powers of two make the bin of a value exact and the merging loss-free: the counts are those of a histogram that had
known its reach from the start, whatever came first. Memory: 2 · SIDE counts, for any number of inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

SIDE = 4096  # bins on either side: from 16 to 32 for each code of 8 bits
AVERAGING = 0.01  # the share of a new window in the moving averages; Krishnamoorthi 2018 and torch use the same


@dataclass
class Histogram:
    """Inputs so far.

    Attributes:
        low: the least input, or 0.
        high: the largest input, or 0.
        average_low: moving average over windows of each window's least input.
        average_high: and of its largest.
        windows: how many were added.
        reach: of the bins; 0 before the first input that is not zero.
        counts: int64 [2 · SIDE].
    """

    low: float = 0.0
    high: float = 0.0
    average_low: float = 0.0
    average_high: float = 0.0
    windows: int = 0
    reach: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(2 * SIDE, dtype=torch.int64))

    def add_(self, inputs: Tensor) -> None:
        """Adds one window of inputs, float32 of any shape; NaN or infinity leave their mark in the ends."""
        least, largest = (float(end) for end in torch.aminmax(inputs))
        if not (math.isfinite(least) and math.isfinite(largest)):
            self.low, self.high = math.nan, math.nan
            return
        share = AVERAGING if self.windows else 1.0
        self.average_low += share * (min(least, 0.0) - self.average_low)
        self.average_high += share * (max(largest, 0.0) - self.average_high)
        self.low, self.high = min(self.low, least), max(self.high, largest)
        self.windows += 1
        size = max(-least, largest)
        if size > 0 and self.reach == 0:
            self.reach = 2.0 ** math.frexp(size)[1]  # frexp: size < reach ≤ 2 · size
        while size >= self.reach > 0:
            self._double_()
        places = (
            (inputs.double().flatten() * (SIDE / self.reach)).floor_().long() + SIDE
            if self.reach > 0
            else inputs.new_full((inputs.numel(),), SIDE, dtype=torch.int64)
        )
        self.counts += torch.bincount(places, minlength=2 * SIDE)

    def _double_(self) -> None:
        merged = self.counts.reshape(SIDE, 2).sum(1)
        self.counts = torch.zeros_like(self.counts)
        self.counts[SIDE // 2 : SIDE // 2 + SIDE] = merged
        self.reach *= 2

    @property
    def centres(self) -> Tensor:
        """The middle of each bin, float64 [2 · SIDE]."""
        return (torch.arange(2 * SIDE, dtype=torch.float64) + 0.5 - SIDE) * (self.reach / SIDE)

    def to_tensor(self) -> Tensor:
        """Everything as float64 [6 + 2 · SIDE]: exact for fewer than 2^53 inputs."""
        ends = [self.low, self.high, self.average_low, self.average_high, float(self.windows), self.reach]
        return torch.cat((torch.tensor(ends, dtype=torch.float64), self.counts.double()))

    @classmethod
    def from_tensor(cls, packed: Tensor) -> Histogram:
        """The inverse of `to_tensor`."""
        low, high, average_low, average_high, windows, reach = packed[:6].tolist()
        return cls(
            low=low, high=high, average_low=average_low, average_high=average_high, windows=int(windows), reach=reach,
            counts=packed[6:].long(),
        )  # fmt: skip
