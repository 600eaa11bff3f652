"""Narrowing: neurons, attention heads and channels of the residual stream go, every block the same number.

Muralidharan et al.: Minitron, 2024, https://arxiv.org/abs/2407.14679. Which units go: `unit_scores.py`; what is
cut with them: `widths.py`.

Widths are uniform and legal: neurons and channels in multiples, heads by whole key-value groups that divide the width.
So the result is the same architecture with smaller numbers in its configuration, and every loader reads it.
`parameters: 0.6x` and `latency: 0.5x` give every legal number of heads as many neurons as the target leaves, and take
the pair whose shares are nearest. Latency is measured here, piece by piece: `latency.py`.

`by_block` spreads the same number of neurons and heads over the blocks by their scores (squared contributions, which
are in the units of the residual stream, so that blocks compare). No configuration of transformers can say that: the
folder is for `fettle.load` and the engines alone (the native one where heads are alike), and says so.

`channels: principal` turns the residual stream into its principal directions before channels go (SliceGPT; one basis
for all blocks): `principal.py`.

Differs from the paper: nothing is retrained; norms over fewer channels are corrected so that what was removed counts as
zero; units keep their order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from fettle.errors import RecipeError
from fettle.methods.reshape.latency import LATENCY_HELP, LatencyEngine, LatencyTarget
from fettle.methods.reshape.legal_widths import Widths, cut_by_block, legal
from fettle.methods.reshape.limits import Limits, find_limits, widths_within
from fettle.methods.reshape.principal import principal_directions, turned
from fettle.methods.reshape.subject import Reshaped, Subject, parse_share
from fettle.methods.reshape.unit_scores import Score, unit_scores
from fettle.methods.reshape.widths import head_shape, require_free_heads, require_free_width

_SHARE = {"minimum": 1e-3, "maximum": 1.0}


@dataclass(frozen=True, kw_only=True)
class Narrow:
    """Makes every block narrower: fewer neurons, heads, channels, those that the score misses least."""

    name: ClassVar[str] = "narrow"
    title: ClassVar[str] = "Narrowing"
    source: ClassVar[str] = "after Minitron, Muralidharan et al. 2024, https://arxiv.org/abs/2407.14679"
    statistics: ClassVar[tuple[str, ...]] = ("text",)
    objective: ClassVar[str] = "shape"

    parameters: str | None = field(
        default=None, metadata={"help": "the share of all parameters that may stay, such as 0.6x"}
    )
    latency: str | None = field(default=None, metadata={"help": LATENCY_HELP})
    latency_engine: LatencyEngine = field(default="native", metadata={"help": "the engine that is measured"})
    latency_tokens: int = field(
        default=1, metadata={"help": "tokens a step that is measured: 1 is writing, more is reading", "minimum": 1}
    )
    neurons: float | None = field(default=None, metadata={"help": "the share of feed-forward neurons kept", **_SHARE})
    heads: float | None = field(default=None, metadata={"help": "the share of attention heads kept", **_SHARE})
    hidden: float | None = field(default=None, metadata={"help": "the share of the hidden width kept", **_SHARE})
    score: Score = field(default="contribution", metadata={"help": "how units are judged"})
    multiple: int = field(default=16, metadata={"help": "widths are multiples of this", "minimum": 1})
    channels: Literal["importance", "principal"] = field(
        default="importance",
        metadata={"help": "which channels go: the least important, or the last of the principal directions (SliceGPT)"},
    )
    by_block: bool = field(
        default=False,
        metadata={"help": "spread neurons and heads over the blocks by their scores; only fettle loads the result"},
    )

    def needs(self) -> tuple[str, ...]:
        """Text, unless weights are enough."""
        return () if self.score == "magnitude" and self.channels == "importance" else self.statistics

    def validate(self) -> None:
        """A target: a share of the parameters or of the time, or of some widths."""
        shares = (self.neurons, self.heads, self.hidden)
        targets = {"parameters": self.parameters, "latency": self.latency}
        if not any(targets.values()) and all(share is None for share in shares):
            raise RecipeError(
                "narrow: nothing to narrow; give parameters: 0.6x, latency: 0.5x, or shares of neurons, heads or hidden"
            )
        if self.channels == "principal" and (self.hidden is None or any(targets.values())):
            raise RecipeError(
                "narrow: channels=principal turns the residual stream and cuts it; say how far with hidden: 0.75, and "
                "leave parameters and latency out (a tied head gets a matrix of its own)"
            )
        for name, text in targets.items():
            if text is None:
                continue
            parse_share(text, name, self.name)
            if self.neurons is not None or self.heads is not None:
                raise RecipeError(f"narrow: {name} chooses the shares of neurons and heads; leave them out, or {name}")

    def label(self) -> str:
        """narrow-0.6x, narrow-latency-0.5x, or narrow-neurons-0.5."""
        targets = [self.parameters, f"latency-{self.latency}" if self.latency is not None else None]
        if any(targets):
            return "-".join(["narrow", *filter(None, targets)])
        shares = {"neurons": self.neurons, "heads": self.heads, "hidden": self.hidden}
        return "-".join(["narrow", *(f"{name}-{share:g}" for name, share in shares.items() if share is not None)])

    def reshape(self, subject: Subject) -> Reshaped:
        """The model with the units that are missed most."""
        limits = self._limits(subject)
        widths = self._widths(subject, limits)
        scores, turn = unit_scores(subject, self.score), {}
        if self.channels == "principal" and widths.hidden < Widths.of(subject).hidden:
            basis = principal_directions(subject)
            subject, scores = turned(subject, basis), replace(scores, hidden=basis.energies)
            turn = {"channels": self.channels, "kept_energy": basis.kept(widths.hidden)}
        if self.by_block:
            cuts, kept = cut_by_block(subject, widths, scores, self.multiple)
        else:
            cuts, kept = widths.cut(subject, scores), widths.to_dict()
        view, decided = cuts.view(), {"method": self.name, "score": self.score, "kept": kept, **turn}
        return Reshaped(view=view, decided=decided | (limits.report(subject, widths) if limits is not None else {}))

    def _limits(self, subject: Subject) -> Limits | None:
        """What parameters and latency allow; None where neither is given."""
        asked = LatencyTarget(share=self.latency, engine=self.latency_engine, tokens=self.latency_tokens)
        return find_limits(subject, self.parameters, asked, self._hidden(subject), self.multiple, self.name)

    def _hidden(self, subject: Subject) -> int:
        """Channels that stay."""
        hidden = Widths.of(subject).hidden
        if self.hidden is None or self.hidden >= 1:
            return hidden
        require_free_width(subject)
        multiple = math.lcm(self.multiple, head_shape(subject).heads)  # heads go on dividing the width
        return legal(hidden, self.hidden, multiple, "the hidden width", "hidden")

    def _widths(self, subject: Subject, limits: Limits | None) -> Widths:
        if limits is not None:
            found = widths_within(subject, limits, self._hidden(subject), self.multiple)
            if found:
                return found[0]
            raise limits.unreachable(subject, self._hidden(subject), self.multiple)
        if self.heads is not None and self.heads < 1 and not self.by_block:
            require_free_heads(subject)
        return Widths.of(subject).shared(self.neurons or 1.0, self.heads or 1.0, self._hidden(subject), self.multiple)
