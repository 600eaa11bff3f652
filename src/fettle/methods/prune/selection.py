"""From scores to a mask: the least go, exactly as many as the pattern says; of equal scores the first ones go.

A score is what losing a weight costs, in squared units, so that the scores of a block add up. Cost: one selection over
what is compared with what; no sort of a whole layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fettle.tensors.patterns import Pattern, share_of


def kept_by_score(scores: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """What stays, bool [out, in], for scores [out, in], finite and not negative.

    Raises:
        RecipeError: the pattern does not divide the shape.
    """
    out_features, in_features = scores.shape
    pattern.check_shape((out_features, in_features))
    if pattern.kind == "n:m":
        return keep_n_of_m(scores, pattern)
    if pattern.kind == "row":
        return ~_least(scores, share_of(in_features, sparsity))
    if pattern.kind == "layer":
        return ~_least(scores.reshape(1, -1), share_of(scores.numel(), sparsity)).view(scores.shape)
    sums = block_sums(scores, pattern)
    gone = _least(sums.reshape(1, -1), share_of(sums.numel(), sparsity)).view(sums.shape)
    return ~spread(gone, pattern)


def on_the_way(pattern: Pattern, sparsity: float) -> Pattern:
    """The pattern of a round that prunes less than the last: of N:M more stay (2:4 comes after 3:4)."""
    if pattern.kind != "n:m":
        return pattern
    return replace(pattern, keep=max(pattern.keep, pattern.columns - round(pattern.columns * sparsity)))


def keep_n_of_m(scores: Tensor, pattern: Pattern) -> Tensor:
    """Of every M columns the N with the largest scores."""
    groups = scores.reshape(-1, pattern.columns)
    return ~_least(groups, pattern.columns - pattern.keep).view(scores.shape)


def block_sums(scores: Tensor, pattern: Pattern) -> Tensor:
    """What losing each block costs, [out / rows, in / columns]."""
    shape = (scores.shape[0] // pattern.rows, pattern.rows, scores.shape[1] // pattern.columns, pattern.columns)
    return scores.reshape(shape).sum((1, 3))


def spread(blocks: Tensor, pattern: Pattern) -> Tensor:
    """Each block's answer for each of its weights."""
    return blocks.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.columns, 1)


def _least(scores: Tensor, count: int) -> Tensor:
    """The `count` smallest of each row, bool [rows, columns]; of equal ones the first."""
    if count < 1:
        return torch.zeros(scores.shape, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    below = scores < threshold
    equal = scores == threshold
    missing = count - below.sum(1, keepdim=True)
    return below | (equal & (equal.cumsum(1) <= missing))


@dataclass(frozen=True, kw_only=True)
class KnownMask:
    """A mask that stands already, for the sweep that only rounds: `sweep.Pruner`.

    Attributes:
        kept: bool [rows, in] of the tile.
        width: columns that are told together.
    """

    kept: Tensor
    width: int

    def choose(self, weights: Tensor, importance: Tensor, columns: slice) -> Tensor:
        """What stays of these columns."""
        return self.kept[:, columns]

    def preview(self, weights: Tensor, importance: Tensor) -> Tensor:
        """Nothing needs it: the width is that of a range."""
        return torch.ones(weights.shape, dtype=torch.bool)


@dataclass(kw_only=True)
class TilePruner:
    """The mask of one tile of rows, `width` columns at a time, for the sweep: `sweep.Pruner`.

    What is compared is the tile's next columns, about 128 of them (SparseGPT), or M; over the whole weight the count is
    exact all the same, as every step takes what is due by then.

    Attributes:
        pattern: the shape of the mask.
        total: how many weights of the tile go.
        in_features: columns of the weight.
        width: columns that are decided together.
    """

    pattern: Pattern
    total: int
    in_features: int
    width: int

    def choose(self, weights: Tensor, importance: Tensor, columns: slice) -> Tensor:
        """What stays of these columns [rows, columns]; the cost of losing one is weight² · importance."""
        scores = weights.square() * importance
        if self.pattern.kind == "n:m":
            return keep_n_of_m(scores, self.pattern)
        rows = len(scores)
        if self.pattern.kind == "row":
            each = self.total // rows
            return ~_least(scores, self._due(each, columns))
        if self.pattern.kind == "layer":
            return ~_least(scores.reshape(1, -1), self._due(self.total, columns)).view(scores.shape)
        sums, unit = block_sums(scores, self.pattern), self.pattern.rows * self.pattern.columns
        gone = _least(sums.reshape(1, -1), self._due(self.total // unit, columns)).view(sums.shape)
        return ~spread(gone, self.pattern)

    def preview(self, weights: Tensor, importance: Tensor) -> Tensor:
        """What would stay of any columns if they were all."""
        scores = weights.square() * importance
        if self.pattern.kind == "n:m" and scores.shape[1] % self.pattern.columns == 0:
            return keep_n_of_m(scores, self.pattern)
        count = scores.numel() * self.total // max(1, self.in_features * len(scores))
        return ~_least(scores.reshape(1, -1), min(count, scores.numel() - 1)).view(scores.shape)

    def _due(self, total: int, columns: slice) -> int:
        """How many of `total` fall to these columns."""
        first, last = int(columns.start), int(columns.stop)
        return total * last // self.in_features - total * first // self.in_features
