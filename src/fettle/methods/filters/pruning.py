"""The rounds: score, choose, cut, heal; and again with a larger share.

Each round traces the network anew, since the last one changed it. Scores look at the network as it is then, after the
healing of the round before. What heals is any function of the network and the round's number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fettle.methods.filters.dependencies import ChannelGroup, channel_groups, cut_checked
from fettle.methods.filters.healing import Heal
from fettle.methods.filters.scores import ImageBatch, ScoreName, comparable, group_scores
from fettle.methods.filters.selection import Shares, removed_channels


@dataclass(frozen=True)
class Round:
    """What one round did: the sparsity that it went to, the channels that went and stayed in all groups."""

    sparsity: float
    removed: int
    channels: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"sparsity": round(self.sparsity, 6), "removed": self.removed, "channels": self.channels}


def prune_in_place(
    network: nn.Module,
    example: Tensor,
    rounds: Sequence[Shares],
    *,
    score: ScoreName = "l2",
    data: ImageBatch | None = None,
    heal: Heal | None = None,
    told: Callable[[], None] = lambda: None,
) -> list[Round]:
    """Prunes a network round by round; it is in eval mode afterwards.

    Args:
        network: an image classifier in float32.
        example: float32 [1, channels, height, width], what it is traced with.
        rounds: the share of each round, ascending.
        score: what says which channels are missed.
        data: images, and labels, for the scores that look at them.
        heal: called after each round.
        told: called after each round, too.

    Raises:
        ModelError: it cannot be traced.
        RecipeError: a share that leaves no filter, or data that the score lacks.
    """
    original: dict[str, int] = {}
    done = []
    for number, shares in enumerate(rounds):
        groups = channel_groups(network, example)
        for group in groups:
            original.setdefault(group.name, group.size)
        scores = group_scores(network, groups, score, data)
        if shares.scope == "global":
            scores = comparable(scores, score)
        removed = removed_channels(groups, scores, original, shares)
        cut_checked(network, groups, removed, example)
        done.append(_round(shares, groups, removed))
        if heal is not None:
            heal(network, number)
        told()
    return done


def _round(shares: Shares, groups: Sequence[ChannelGroup], removed: dict[str, list[int]]) -> Round:
    gone = sum(map(len, removed.values()))
    return Round(shares.sparsity, gone, sum(group.size for group in groups) - gone)
