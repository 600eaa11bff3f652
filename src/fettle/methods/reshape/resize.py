"""Depth and widths together: every depth that can meet a target, with the widths that then meet it; the best of them.

    for each number of blocks that go, from none on:   drop them (drop_layers), narrow the others to the target (narrow)
    each candidate runs over the text; the one with the least loss is taken

Muralidharan et al.: Minitron, 2024, https://arxiv.org/abs/2407.14679, search the same grid and rank candidates after a
short retraining; here they are ranked as they are. Every candidate stands in `fettle.json` with its parameters and its
loss, and is printed.

Cost: a candidate is one scoring pass and one pass for its loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from fettle.errors import RecipeError
from fettle.methods.reshape.block_scores import model_loss
from fettle.methods.reshape.drop_layers import DropLayers
from fettle.methods.reshape.drop_layers import Score as BlockScore
from fettle.methods.reshape.narrow import Narrow
from fettle.methods.reshape.subject import Reshaped, Subject, parse_share
from fettle.methods.reshape.unit_scores import Score
from fettle.models.anatomy import read_anatomy
from fettle.models.view import parameter_count


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Chooses how many blocks go and how narrow the others get, by the loss of every candidate."""

    name: ClassVar[str] = "resize"
    title: ClassVar[str] = "Depth and widths together"
    source: ClassVar[str] = "after Minitron, Muralidharan et al. 2024, https://arxiv.org/abs/2407.14679"
    statistics: ClassVar[tuple[str, ...]] = ("text",)
    objective: ClassVar[str] = "shape"

    parameters: str = field(default="0.6x", metadata={"help": "the share of all parameters that may stay"})
    by: BlockScore = field(default="block_influence", metadata={"help": "how blocks are judged"})
    score: Score = field(default="contribution", metadata={"help": "how units are judged"})
    multiple: int = field(default=16, metadata={"help": "widths are multiples of this", "minimum": 1})

    def needs(self) -> tuple[str, ...]:
        """Text."""
        return self.statistics

    def validate(self) -> None:
        """A share of the parameters."""
        parse_share(self.parameters, "parameters", self.name)

    def label(self) -> str:
        """resize-0.6x."""
        return f"resize-{self.parameters}"

    def reshape(self, subject: Subject) -> Reshaped:
        """The candidate with the least loss."""
        subject.require_predictions(self.name)
        limit = parse_share(self.parameters, "parameters", self.name) * subject.parameters
        tried: list[dict[str, Any]] = []
        best: tuple[float, Reshaped] | None = None
        for drop in range(len(subject.anatomy.blocks)):
            try:
                found = self._candidate(subject, drop, limit)
            except RecipeError:
                continue  # too deep for any width
            if found is None:
                break  # so few blocks that nothing is left to narrow: fewer would only be worse
            loss = model_loss(replace(subject, checkpoint=found.view, anatomy=read_anatomy(found.view)))
            tried.append(
                {**found.decided, "parameters": parameter_count(found.view), "loss": loss, "perplexity": math.exp(loss)}
            )
            if best is None or loss < best[0]:
                best = loss, found
        if best is None:
            raise RecipeError(
                f"resize: parameters={self.parameters!r} cannot be reached by fewer blocks and narrower ones; ask for "
                "more, trim the vocabulary first, or narrow the hidden width"
            )
        return Reshaped(
            view=best[1].view, decided={"method": self.name, **best[1].decided, "loss": best[0], "candidates": tried}
        )

    def _candidate(self, subject: Subject, drop: int, limit: float) -> Reshaped | None:
        """The model without `drop` blocks, narrowed to the limit; None once fewer blocks alone went well below it."""
        dropped: dict[str, Any] = {"dropped": []}
        current, view = subject, None
        if drop:
            shallower = DropLayers(drop=drop, by=self.by).reshape(subject)
            view, dropped = shallower.view, {"dropped": shallower.decided["dropped"]}
            current = replace(subject, checkpoint=view, anatomy=read_anatomy(view))
        share = limit / current.parameters
        if view is not None and share >= 1:
            widest = subject.parameters - (drop - 1) * (subject.parameters - current.parameters) / drop
            return None if widest <= limit else Reshaped(view=view, decided={**dropped, "kept": None})
        narrowed = Narrow(parameters=f"{share:.12f}x", score=self.score, multiple=self.multiple).reshape(current)
        return Reshaped(view=narrowed.view, decided={**dropped, "kept": narrowed.decided["kept"]})
