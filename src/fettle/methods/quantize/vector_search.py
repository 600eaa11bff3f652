"""The entry with the least error, where errors of neighbouring columns count together.

    minimise over codes c    ‖(t - entry(c)) · M‖²       t [8] in units of the scale, M [8, 8] the metric

With all entries turned once, entry(c)·M, it is the nearest of 32,768 points and their negatives: one product with
every target and the largest of |t·M·(entry·M)ᵀ| - ½‖entry·M‖², exact and without a tree. The largest is looked for in
two steps, by pieces and then in the best piece, since a maximum without its place runs on vector units.

Two stages: each takes the best entry for what the other leaves, in turn; a step never raises the error.

Cost: 32,768 · 8 multiply-adds for eight weights and stage of 16 bits: about 0.05 ms on one core.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fettle.tensors.codebook import Codebook
from fettle.tensors.vectors import VectorScheme

SCORES = 2**20  # at once: they stay in the caches
PIECE = 128  # scores of which the largest is taken without its place
ROUNDS = 2  # of both stages, where there are two


class EntrySearch:
    """The tables of a scheme, turned by one metric."""

    def __init__(self, metric: Tensor, scheme: VectorScheme) -> None:
        """`metric`: float32 [8, 8], errors count as ‖error · metric‖²."""
        self._metric = metric
        self._stages = [
            (book, ratio, _Turned(ratio * book.half @ metric))
            for book, ratio in zip(scheme.stages, scheme.ratios, strict=True)
        ]

    def nearest(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int32 [n, stages] and their entries' sums float32 [n, 8], for targets [n, 8] in units of the scale."""
        codes = torch.zeros(len(targets), len(self._stages), dtype=torch.int32)
        entries = targets.new_zeros(len(self._stages), *targets.shape)
        rounds = ROUNDS if len(self._stages) > 1 else 1
        for _ in range(rounds):
            for stage, (book, ratio, turned) in enumerate(self._stages):
                left = targets - (entries.sum(0) - entries[stage])
                codes[:, stage] = turned.nearest(left @ self._metric)
                entries[stage] = ratio * book.entries(codes[:, stage])
        return codes, entries.sum(0)

    def cost(self, errors: Tensor) -> Tensor:
        """‖error · metric‖², [n], of errors [n, 8]."""
        return (errors @ self._metric).square_().sum(-1)


def nearest_of_all(targets: Tensor, book: Codebook) -> Tensor:
    """Codes int32 [n] of the entries nearest to targets [n, 8] in the plain sense."""
    return _Turned(book.half).nearest(targets)


class _Turned:
    """Entries in the metric, with half their squared lengths."""

    def __init__(self, half: Tensor) -> None:
        self._across = half.T.contiguous()  # [8, entries]
        self._lengths = half.square().sum(1).div_(2)

    def nearest(self, targets: Tensor) -> Tensor:
        """Codes int32 [n] of the nearest entries, for turned targets [n, 8]."""
        count = len(self._lengths)
        piece = min(PIECE, count)
        codes = torch.empty(len(targets), dtype=torch.int32)
        tile = SCORES // count
        scores = torch.empty(tile, count)
        for start in range(0, len(targets), tile):
            some = targets[start : start + tile]
            found = torch.mm(some, self._across, out=scores[: len(some)])
            found.abs_().sub_(self._lengths)
            pieces = found.view(len(some), -1, piece)
            best = pieces.amax(2).argmax(1)
            rows = torch.arange(len(some))
            place = best * piece + pieces[rows, best].argmax(1)
            negative = (some * self._across.T[place]).sum(1) < 0
            codes[start : start + tile] = (place + count * negative).int()
        return codes
