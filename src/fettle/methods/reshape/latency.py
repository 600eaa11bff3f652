"""How long models of other shapes would take here: pieces of blocks, measured; whole models, added up.

    step(shape) = rest + Σ over blocks (block(heads, neurons))
    block(h, n) = block(h, N) + block(H, n) - block(H, N)          H, N: as many as there are

What is measured are models of two blocks (and one of a single block), cut to each candidate number of heads beside all
neurons, and to a few numbers of neurons beside all heads; between those neurons are interpolated. So nothing larger
than two blocks with embedding and head is ever opened, and no candidate model is. It runs on the engine that will serve
the model, in the type that the files have, with as many tokens a step as asked: 1 for writing, more for reading.

Attention and feed-forward part run one after the other, so their times add; what the sum misses shows where
prediction and measurement of the written folder stand side by side. Times are this machine's, and not the same twice: a
table that was measured stands in `fettle.json`, and a resumed run that would choose another shape is refused.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from fettle.errors import RecipeError
from fettle.methods.reshape.drop_layers import without_blocks
from fettle.methods.reshape.legal_widths import Widths
from fettle.methods.reshape.subject import Subject
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.families import FREE_HEAD_SIZE

NEURON_POINTS = 6  # numbers of neurons that are measured
ROUNDS = 3  # times that every shape is measured, in turn; the fastest counts
Measure = Callable[[Checkpoint], float]  # a model → seconds of a step
LatencyEngine = Literal["native", "torch"]
LATENCY_HELP = "the share of the original's time a step that it may take on this machine, such as 0.5x"


@dataclass(frozen=True, kw_only=True)
class LatencyTarget:
    """What of the original's time may stay; None for no limit. Measured on an engine, with so many tokens a step."""

    share: str | None
    engine: LatencyEngine = "native"
    tokens: int = 1


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """The measured table, in seconds a step.

    Attributes:
        rest: everything but the blocks.
        heads: key-value heads → a block with these and all neurons.
        neurons: neurons → a block with these and all heads; ascending.
    """

    rest: float
    heads: dict[int, float]
    neurons: dict[int, float]

    def block(self, kv_heads: int, neurons: int) -> float:
        """Seconds of a block; never less than nothing, which noise could say of a tiny one."""
        both = self.heads[max(self.heads)]
        found = self.heads[kv_heads] + self._with_neurons(neurons) - both
        return max(found, 0.0)

    def _with_neurons(self, neurons: int) -> float:
        known = sorted(self.neurons)
        if len(known) == 1:
            return self.neurons[known[0]]
        place = min(max(bisect.bisect_left(known, neurons), 1), len(known) - 1)
        low, high = known[place - 1], known[place]
        share = (neurons - low) / (high - low)
        return self.neurons[low] + share * (self.neurons[high] - self.neurons[low])

    def model(self, blocks: int, widths: Widths) -> float:
        """Seconds of a step of a model of these widths."""
        return self.rest + blocks * self.block(widths.heads.kv_heads, next(iter(widths.neurons.values())))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in milliseconds."""
        return {
            "rest_ms": 1e3 * self.rest,
            "block_ms_by_kv_heads": {str(k): 1e3 * v for k, v in sorted(self.heads.items())},
            "block_ms_by_neurons": {str(k): 1e3 * v for k, v in sorted(self.neurons.items())},
        }


def measured_pieces(subject: Subject, measure: Measure, hidden: int, multiple: int) -> Pieces:
    """The table for blocks of this hidden width.

    Raises:
        RecipeError: blocks that differ, so that two of them do not stand for all.
    """
    full = Widths.of(subject)
    kinds = [[(x.role, x.shape, x.expert) for x in block.linears] for block in subject.anatomy.blocks]
    if len(full.neurons) != 1 or any(kind != kinds[0] for kind in kinds):
        raise RecipeError(
            "latency: the blocks of this model differ (dense ones between experts), so no block stands for all; give "
            "parameters instead"
        )
    all_neurons = next(iter(full.neurons))
    depth = min(2, len(subject.anatomy.blocks))
    one, several = (_of_depth(subject, count) for count in (1, depth))

    def seconds(of: Subject, kv_heads: int, neurons: int) -> float:
        heads = replace(full.heads, heads=kv_heads * full.heads.group, kv_heads=kv_heads)
        widths = Widths(neurons={all_neurons: neurons}, heads=heads, hidden=hidden)
        return measure(widths.cut(of, None).view())

    most, free = full.heads.kv_heads, subject.family.name in FREE_HEAD_SIZE
    groups = [k for k in range(1, most + 1) if k == most or (free and hidden % (k * full.heads.group) == 0)]
    steps = range(1, NEURON_POINTS)
    points = {max(multiple, all_neurons * k // NEURON_POINTS // multiple * multiple) for k in steps} | {all_neurons}
    shapes = [(several, k, all_neurons) for k in groups]
    shapes += [(several, most, n) for n in sorted(points) if n < all_neurons]
    shapes += [(one, most, all_neurons)] if depth > 1 else []
    best = [math.inf] * len(shapes)
    for _ in range(ROUNDS):
        best = [min(known, seconds(*shape)) for known, shape in zip(best, shapes, strict=True)]
    found = {(len(of.anatomy.blocks), k, n): value for (of, k, n), value in zip(shapes, best, strict=True)}
    whole = found[depth, most, all_neurons]
    block = max(whole - found[1, most, all_neurons], 0.0) if depth > 1 else whole
    rest = max(whole - depth * block, 0.0)
    heads = {k: max(found[depth, k, all_neurons] - rest, 0.0) / depth for k in groups}
    neurons = {n: max(found[depth, most, n] - rest, 0.0) / depth for d, k, n in found if (d, k) == (depth, most)}
    return Pieces(rest=rest, heads=_never_slower(heads), neurons=_never_slower(neurons))


def _never_slower(times: dict[int, float]) -> dict[int, float]:
    """Times by width, ascending, where no narrower block takes longer than a wider one: that was the machine."""
    least, found = math.inf, {}
    for width in sorted(times, reverse=True):
        least = min(least, times[width])
        found[width] = least
    return dict(sorted(found.items()))


def _of_depth(subject: Subject, count: int) -> Subject:
    view = without_blocks(subject, range(count))
    return replace(subject, checkpoint=view, anatomy=read_anatomy(view))
