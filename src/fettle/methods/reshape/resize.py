"""Depth and widths together: every depth that can meet a target, with the widths that then meet it; the best of them.

    for each number of blocks that go, from none on:   drop them (drop_layers), narrow the others to the target
                                                       (narrow): the pairs of heads and neurons that are most even
    each candidate runs over the text; the one with the least loss is taken

The target is a share of the parameters, or of the time that a step takes on this machine (`latency.py`), or both.

Muralidharan et al.: Minitron, 2024, https://arxiv.org/abs/2407.14679, search the same grid and rank candidates after a
short retraining; here they are ranked as they are. Every candidate stands in `fettle.json` with its parameters, its
predicted time where time is limited, and its loss, and is printed.

Cost: a scoring pass for each depth and one pass for the loss of each candidate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from fettle.errors import RecipeError
from fettle.methods.reshape.block_scores import model_loss
from fettle.methods.reshape.drop_layers import DropLayers
from fettle.methods.reshape.drop_layers import Score as BlockScore
from fettle.methods.reshape.latency import LATENCY_HELP, LatencyEngine, LatencyTarget
from fettle.methods.reshape.legal_widths import Widths
from fettle.methods.reshape.limits import Limits, find_limits, widths_within
from fettle.methods.reshape.subject import Reshaped, Subject, parse_share
from fettle.methods.reshape.unit_scores import Score, unit_scores
from fettle.models.anatomy import read_anatomy
from fettle.models.view import parameter_count

USUAL_SHARE = "0.6x"


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Chooses how many blocks go and how narrow the others get, by the loss of every candidate."""

    name: ClassVar[str] = "resize"
    title: ClassVar[str] = "Depth and widths together"
    source: ClassVar[str] = "after Minitron, Muralidharan et al. 2024, https://arxiv.org/abs/2407.14679"
    statistics: ClassVar[tuple[str, ...]] = ("text",)
    objective: ClassVar[str] = "shape"

    parameters: str | None = field(
        default=None, metadata={"help": "the share of all parameters that may stay; 0.6x where nothing is said"}
    )
    latency: str | None = field(default=None, metadata={"help": LATENCY_HELP})
    latency_engine: LatencyEngine = field(default="native", metadata={"help": "the engine that is measured"})
    latency_tokens: int = field(
        default=1, metadata={"help": "tokens a step that is measured: 1 is writing, more is reading", "minimum": 1}
    )
    pairs: int = field(
        default=2, metadata={"help": "how many pairs of heads and neurons are tried at each depth", "minimum": 1}
    )
    by: BlockScore = field(default="block_influence", metadata={"help": "how blocks are judged"})
    score: Score = field(default="contribution", metadata={"help": "how units are judged"})
    multiple: int = field(default=16, metadata={"help": "widths are multiples of this", "minimum": 1})

    def needs(self) -> tuple[str, ...]:
        """Text."""
        return self.statistics

    def validate(self) -> None:
        """Shares of the parameters and the time."""
        for name, text in (("parameters", self.parameters), ("latency", self.latency)):
            if text is not None:
                parse_share(text, name, self.name)

    def label(self) -> str:
        """resize-0.6x, or resize-latency-0.5x."""
        timed = None if self.latency is None else f"latency-{self.latency}"
        return "-".join(["resize", *filter(None, [self._parameters, timed])])

    @property
    def _parameters(self) -> str | None:
        return USUAL_SHARE if self.parameters is None and self.latency is None else self.parameters

    def reshape(self, subject: Subject) -> Reshaped:
        """The candidate with the least loss."""
        subject.require_predictions(self.name)
        asked = LatencyTarget(share=self.latency, engine=self.latency_engine, tokens=self.latency_tokens)
        limits = find_limits(subject, self._parameters, asked, Widths.of(subject).hidden, self.multiple, self.name)
        assert limits is not None
        tried: list[dict[str, Any]] = []
        best: tuple[float, Reshaped] | None = None
        for found in self._candidates(subject, limits):
            loss = model_loss(replace(subject, checkpoint=found.view, anatomy=read_anatomy(found.view)))
            tried.append(
                {**found.decided, "parameters": parameter_count(found.view), "loss": loss, "perplexity": math.exp(loss)}
            )
            if best is None or loss < best[0]:
                best = loss, found
        if best is None:
            raise RecipeError(
                f"resize: {limits.asked} cannot be reached by fewer blocks and narrower ones; ask for more, trim the "
                "vocabulary first, or narrow the hidden width"
            )
        report = limits.report(subject, Widths.of(subject)) | dict(best[1].decided)
        return Reshaped(
            view=best[1].view, decided={"method": self.name, **report, "loss": best[0], "candidates": tried}
        )

    def _candidates(self, subject: Subject, limits: Limits) -> Iterator[Reshaped]:
        """Every depth with its most even widths, up to the first that fewer blocks alone bring within the limits."""
        for drop in range(len(subject.anatomy.blocks)):
            current = subject
            dropped: dict[str, Any] = {"dropped": []}
            if drop:
                shallower = DropLayers(drop=drop, by=self.by).reshape(subject)
                dropped = {"dropped": shallower.decided["dropped"]}
                current = replace(subject, checkpoint=shallower.view, anatomy=read_anatomy(shallower.view))
            full = Widths.of(current)
            if drop and limits.hold(current, full):
                yield Reshaped(
                    view=shallower.view, decided={**dropped, "kept": None, **_predicted(limits, current, full)}
                )
                return
            chosen = widths_within(current, limits, full.hidden, self.multiple)[: self.pairs]
            scores = unit_scores(current, self.score) if chosen else None
            for widths in chosen:
                view = widths.cut(current, scores).view()
                told = {**dropped, "kept": widths.to_dict(), **_predicted(limits, current, widths)}
                yield Reshaped(view=view, decided=told)


def _predicted(limits: Limits, subject: Subject, widths: Widths) -> dict[str, float]:
    """Milliseconds of a step, where they were asked for."""
    return {} if limits.pieces is None else {"predicted_ms": 1e3 * limits.predicted(subject, widths)}
