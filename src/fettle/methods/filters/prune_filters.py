"""Pruning the filters of a convolution network, with everything that depends on them.

Li et al.: Pruning Filters for Efficient ConvNets, 2017, https://arxiv.org/abs/1608.08710; the groups are those of Fang
et al.: DepGraph, 2023, https://arxiv.org/abs/2301.12900. Iterative pruning with fine-tuning in between: Molchanov et
al. 2017, https://arxiv.org/abs/1611.06440.

    for each round:  trace → score every channel of every group → cut the least → heal

A filter's cost is quadratic: 80% of the filters gone leaves a twenty-fifth of the weights between two pruned layers.
The result is a smaller dense network: nothing has to be skipped at run time, so multiply-adds and time fall alike.

This file is what a recipe and the flags say; the work is in the files beside it. Differs from the papers: scores are
summed over whole groups, every cut is checked against a network that ignores the same channels, and healing learns from
the original as well as from labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from fettle.errors import RecipeError
from fettle.methods.filters.healing import FineTuning, Heal, fine_tune_, logits_for
from fettle.methods.filters.pruning import Round, prune_in_place
from fettle.methods.filters.scores import LOOKS_AT_IMAGES, ImageBatch, ScoreName
from fettle.methods.filters.selection import Scope, Shares
from fettle.methods.protocols import StepMethod
from fettle.methods.prune.schedule import ScheduleName, sparsities


class NetworkMethod(StepMethod, Protocol):
    """Prunes a convolution network; `statistics` is ("images",) where images run through it."""

    def label(self) -> str:
        """What one step with these fields is called in the name of a recipe."""
        ...

    def prune_network(self, network: nn.Module, example: Tensor, data: ImageBatch | None = None) -> list[Round]:
        """Prunes the network in place."""
        ...


@dataclass(frozen=True, kw_only=True)
class PruneFilters:
    """Removes whole filters of an image classifier, in rounds, each of which may heal."""

    name: ClassVar[str] = "prune_filters"
    title: ClassVar[str] = "Pruning the filters of a convolution network"
    source: ClassVar[str] = (
        "Li et al. 2017, https://arxiv.org/abs/1608.08710, over the groups of DepGraph, Fang et al. 2023"
    )
    statistics: ClassVar[tuple[str, ...]] = ("images",)
    objective: ClassVar[str] = "shape"

    sparsity: float = field(
        default=0.5, metadata={"help": "the share of the filters that goes", "minimum": 0, "maximum": 0.999}
    )
    score: ScoreName = field(default="l2", metadata={"help": "what says which filters are missed least"})
    score_images: int = field(
        default=512, metadata={"help": "at how many of the images the score looks, drawn once", "minimum": 1}
    )
    scope: Scope = field(
        default="layer",
        metadata={"help": "the same share of every layer, or the least missed filters of the whole network"},
    )
    least: float = field(
        default=0.1,
        metadata={"help": "the share of a layer that stays where the scope is global", "minimum": 0, "maximum": 1},
    )
    multiple: int = field(default=1, metadata={"help": "widths are multiples of this", "minimum": 1})
    rounds: int = field(default=1, metadata={"help": "prune in so many rounds, each healed", "minimum": 1})
    schedule: ScheduleName = field(default="cubic", metadata={"help": "how the share grows from round to round"})
    heal_steps: int = field(
        default=0, metadata={"help": "training steps after each round; 0 trains none", "minimum": 0}
    )
    last_steps: int = field(default=0, metadata={"help": "further training steps after the last round", "minimum": 0})
    heal_batch: int = field(default=32, metadata={"help": "images a training step", "minimum": 2})
    heal_rate: float = field(default=1e-3, metadata={"help": "the largest step size of healing", "minimum": 0})
    heal_seed: int = field(default=0, metadata={"help": "which images healing sees when", "minimum": 0})

    @property
    def trains(self) -> bool:
        """Whether it heals by training."""
        return self.heal_steps + self.last_steps > 0

    def needs(self) -> tuple[str, ...]:
        """Images, where the score or the healing looks at them."""
        return self.statistics if self.score in LOOKS_AT_IMAGES or self.trains else ()

    def validate(self) -> None:
        """Something goes, and a step has a size."""
        if self.sparsity <= 0:
            raise RecipeError("prune_filters: sparsity=0 removes nothing; give a share such as 0.5")
        if self.trains and self.heal_rate <= 0:
            raise RecipeError("prune_filters: heal_rate=0 trains nothing; give one such as 0.001, or heal_steps: 0")

    def label(self) -> str:
        """filters-50%."""
        return f"filters-{100 * self.sparsity:g}%"

    def shares(self) -> list[Shares]:
        """What each round goes to."""
        return [
            Shares(sparsity=sparsity, scope=self.scope, least=self.least, multiple=self.multiple)
            for sparsity in sparsities(self.sparsity, self.rounds, self.schedule)
        ]

    def healing(self, network: nn.Module, data: ImageBatch | None) -> Heal | None:
        """What heals after each round: training on the images, taught by `network` as it is now; None where none is.

        Raises:
            RecipeError: healing without images.
        """
        if not self.trains:
            return None
        if data is None:
            raise RecipeError("prune_filters: healing trains on images, and there are none; give --images")
        images, teacher = data, logits_for(network, data)

        def heal(pruned: nn.Module, number: int) -> None:
            steps = self.heal_steps + (self.last_steps if number == self.rounds - 1 else 0)
            if steps:
                options = FineTuning(
                    steps=steps, batch=self.heal_batch, rate=self.heal_rate, seed=self.heal_seed + number
                )
                fine_tune_(pruned, images, options, teacher)

        return heal

    def prune_network(
        self,
        network: nn.Module,
        example: Tensor,
        data: ImageBatch | None = None,
        *,
        heal: Heal | None = None,
        told: Callable[[], None] = lambda: None,
    ) -> list[Round]:
        """Prunes the network in place, in all rounds; `heal` instead of the fields' own where a caller brings one.

        Args:
            network: an image classifier in float32.
            example: float32 [1, channels, height, width].
            data: images and labels.
            heal: called with the network and the round's number after each round.
            told: called after each round.

        Raises:
            RecipeError, ModelError: see `prune_in_place`.
        """
        healer = self.healing(network, data) if heal is None else heal
        seen = None if data is None else data.drawn(self.score_images)
        return prune_in_place(network, example, self.shares(), score=self.score, data=seen, heal=healer, told=told)


def described(rounds: list[Round]) -> list[dict[str, Any]]:
    """The rounds as plain data."""
    return [one.to_json() for one in rounds]
