"""Narrowing: neurons, attention heads and channels of the residual stream go, every block the same number.

Muralidharan et al.: Minitron, 2024, https://arxiv.org/abs/2407.14679. Which units go: `unit_scores.py`; what is
cut with them: `widths.py`.

Widths are uniform and legal: neurons and channels in multiples, heads by whole key-value groups that divide the width.
So the result is the same architecture with smaller numbers in its configuration, and every loader reads it.
`parameters: 0.6x` gives every legal number of heads as many neurons as the target leaves, and takes the pair whose
shares are nearest.

Differs from the paper: nothing is retrained; norms over fewer channels are corrected so that what was removed counts as
zero; units keep their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fettle.errors import RecipeError
from fettle.methods.reshape.subject import Reshaped, Subject, parse_share
from fettle.methods.reshape.unit_scores import Score, UnitScores, unit_scores
from fettle.methods.reshape.widths import (
    Cuts,
    HeadShape,
    attention_of,
    head_shape,
    neuron_groups,
    require_free_heads,
    require_free_width,
)
from fettle.models.families import FREE_HEAD_SIZE
from fettle.models.view import parameter_count

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
    neurons: float | None = field(default=None, metadata={"help": "the share of feed-forward neurons kept", **_SHARE})
    heads: float | None = field(default=None, metadata={"help": "the share of attention heads kept", **_SHARE})
    hidden: float | None = field(default=None, metadata={"help": "the share of the hidden width kept", **_SHARE})
    score: Score = field(default="contribution", metadata={"help": "how units are judged"})
    multiple: int = field(default=16, metadata={"help": "widths are multiples of this", "minimum": 1})

    def needs(self) -> tuple[str, ...]:
        """Text, unless weights are enough."""
        return () if self.score == "magnitude" else self.statistics

    def validate(self) -> None:
        """A target: a share of the parameters, or of some widths."""
        shares = (self.neurons, self.heads, self.hidden)
        if self.parameters is None and all(share is None for share in shares):
            raise RecipeError("narrow: nothing to narrow; give parameters: 0.6x, or shares of neurons, heads or hidden")
        if self.parameters is not None:
            parse_share(self.parameters, "parameters", self.name)
            if self.neurons is not None or self.heads is not None:
                raise RecipeError(
                    "narrow: parameters chooses the shares of neurons and heads; leave them out, or parameters"
                )

    def label(self) -> str:
        """narrow-0.6x, or narrow-neurons-0.5."""
        if self.parameters is not None:
            return f"narrow-{self.parameters}"
        shares = {"neurons": self.neurons, "heads": self.heads, "hidden": self.hidden}
        return "-".join(["narrow", *(f"{name}-{share:g}" for name, share in shares.items() if share is not None)])

    def reshape(self, subject: Subject) -> Reshaped:
        """The model with the units that are missed most."""
        widths = self._widths(subject)
        scores = unit_scores(subject, self.score)
        view = widths.cut(subject, scores).view()
        kept = {
            "neurons": {str(k): v for k, v in widths.neurons.items()}, "heads": widths.heads.heads,
            "kv_heads": widths.heads.kv_heads, "hidden": widths.hidden,
        }  # fmt: skip
        return Reshaped(view=view, decided={"method": self.name, "score": self.score, "kept": kept})

    def _widths(self, subject: Subject) -> Widths:
        hidden = Widths.of(subject).hidden
        if self.hidden is not None and self.hidden < 1:
            require_free_width(subject)
            multiple = math.lcm(self.multiple, head_shape(subject).heads)  # heads go on dividing the width
            hidden = legal(hidden, self.hidden, multiple, "the hidden width", "hidden")
        if self.parameters is not None:
            return self._to_target(subject, hidden)
        if self.heads is not None and self.heads < 1:
            require_free_heads(subject)
        return Widths.of(subject).shared(self.neurons or 1.0, self.heads or 1.0, hidden, self.multiple)

    def _to_target(self, subject: Subject, hidden: int) -> Widths:
        """Of all legal numbers of heads with the most neurons that the target leaves: where the shares are nearest."""
        assert self.parameters is not None
        limit = parse_share(self.parameters, "parameters", self.name) * subject.parameters
        full, free = Widths.of(subject), subject.family.name in FREE_HEAD_SIZE
        groups = range(1, full.heads.kv_heads + 1) if free else (full.heads.kv_heads,)
        found: list[tuple[float, Widths]] = []
        for kept in groups:
            share = kept / full.heads.kv_heads
            widths = self._most_neurons(subject, full, share, hidden, limit)
            if widths is not None:
                kept_heads = widths.heads.heads / full.heads.heads
                found.append((abs(min(widths.neurons.values()) / min(widths.neurons) - kept_heads), widths))
        if found:
            return min(found, key=lambda pair: pair[0])[1]
        least = full.shared(self.multiple / min(full.neurons), groups[0] / full.heads.kv_heads, hidden, self.multiple)
        raise RecipeError(
            f"narrow: parameters={self.parameters!r} cannot be reached with neurons{' and heads' if free else ''} "
            f"alone: their smallest widths leave {least.parameters(subject) / subject.parameters:.2f}x. Give hidden as "
            "well (such as hidden: 0.75), drop layers, or trim the vocabulary"
        )

    def _most_neurons(self, subject: Subject, full: Widths, heads: float, hidden: int, limit: float) -> Widths | None:
        """The widths with this share of heads and the most neurons that are small enough; None where none are."""
        largest = max(full.neurons)
        shares = [k * self.multiple / largest for k in range(1, largest // self.multiple + 1)]
        shares = [share for share in shares if share * min(full.neurons) >= self.multiple]
        if not shares or shares[-1] < 1:
            shares.append(1.0)
        best, low, high = None, 0, len(shares)
        while low < high:  # parameters grow with the share
            middle = (low + high) // 2
            widths = full.shared(shares[middle], heads, hidden, self.multiple)
            if widths.parameters(subject) <= limit:
                best, low = widths, middle + 1
            else:
                high = middle
        return best


@dataclass(frozen=True, kw_only=True)
class Widths:
    """How wide a model is to be.

    Attributes:
        neurons: neurons a block has now (dense blocks and experts may differ) → neurons that stay.
        heads: heads that stay.
        hidden: channels that stay.
    """

    neurons: dict[int, int]
    heads: HeadShape
    hidden: int

    @classmethod
    def of(cls, subject: Subject) -> Widths:
        """As it is."""
        blocks, embedding = subject.anatomy.blocks, subject.anatomy.embedding
        sizes = {down.shape[1] for block in blocks for down, _ in neuron_groups(block)}
        if embedding is None or not sizes:
            raise RecipeError(f"a {subject.anatomy.family} model has no embedding or feed-forward part to narrow")
        return cls(neurons={n: n for n in sorted(sizes)}, heads=head_shape(subject), hidden=embedding.shape[1])

    def shared(self, neurons: float, heads: float, hidden: int, multiple: int) -> Widths:
        """The legal widths for these shares; RecipeError where nothing would be left."""
        kept = {n: legal(n, neurons, multiple, "a feed-forward part", "neurons") for n in self.neurons}
        return Widths(neurons=kept, heads=legal_heads(self.heads, heads, hidden), hidden=hidden)

    def parameters(self, subject: Subject) -> int:
        """How many parameters a model of these widths has; from headers."""
        return parameter_count(self.cut(subject, None).view())

    def cut(self, subject: Subject, scores: UnitScores | None) -> Cuts:
        """What is cut; without scores the first units stay, which is enough to count."""
        cuts, before = Cuts(subject), head_shape(subject)
        pick: Callable[[Tensor | None, int], Tensor] = _best
        neurons, heads = {}, {}
        for block in subject.anatomy.blocks:
            for down, _ in neuron_groups(block):
                of_these = None if scores is None else scores.neurons[down.name]
                neurons[down.name] = pick(of_these, self.neurons[down.shape[1]])
            output = attention_of(block)[0]
            heads[output.name] = best_heads(None if scores is None else scores.heads[output.name], before, self.heads)
        if any(before != after for before, after in self.neurons.items()):
            cuts.neurons(neurons)
        if self.heads != before:
            cuts.heads(heads, before, self.heads)
        assert subject.anatomy.embedding is not None
        if self.hidden != subject.anatomy.embedding.shape[1]:
            cuts.hidden(pick(None if scores is None else scores.hidden, self.hidden))
        return cuts


def legal(size: int, share: float, multiple: int, what: str, name: str) -> int:
    """The largest multiple within a share of `size`; `size` itself for all.

    Raises:
        RecipeError: nothing would be left.
    """
    if share >= 1:
        return size
    found = math.floor(size * share / multiple + 1e-9) * multiple
    if found < 1:
        raise RecipeError(
            f"narrow: {name}={share:g} of {what} of {size} is less than one multiple of {multiple}, so nothing would "
            "be left; keep more, or give a smaller multiple"
        )
    return found


def legal_heads(shape: HeadShape, share: float, hidden: int) -> HeadShape:
    """Whole key-value groups within the share; where that is none, heads of one group. Their number divides the width,
    as Llama's configuration asks even where the head size is said.

    Raises:
        RecipeError: no head would be left.
    """
    if share >= 1:
        return shape
    for groups in range(math.floor(shape.kv_heads * share + 1e-9), 0, -1):
        if hidden % (groups * shape.group) == 0:
            return HeadShape(heads=groups * shape.group, kv_heads=groups, size=shape.size)
    most = math.floor(shape.heads * share + 1e-9)
    heads = next((n for n in range(min(most, shape.group), 0, -1) if hidden % n == 0), 0)
    if heads < 1:
        raise RecipeError(
            f"narrow: heads={share:g} of {shape.heads} heads leaves no head; keep at least {1 / shape.heads:g}"
        )
    return HeadShape(heads=heads, kv_heads=1, size=shape.size)


def _best(scores: Tensor | None, count: int) -> Tensor:
    """The positions of the `count` best, ascending; of equals the first."""
    if scores is None:
        return torch.arange(count)
    return torch.sort(torch.sort(scores, descending=True, stable=True).indices[:count]).values


def best_heads(scores: Tensor | None, before: HeadShape, after: HeadShape) -> Tensor:
    """The query heads that stay: those of the best groups, and of these the best where a group loses some."""
    energy = torch.zeros(before.heads) if scores is None else scores.square()
    by_group = energy.view(before.kv_heads, before.group)
    groups = _best(by_group.sum(1), after.kv_heads)
    inside = torch.stack([_best(by_group[group], after.group) for group in groups])
    return (groups[:, None] * before.group + inside).flatten()
