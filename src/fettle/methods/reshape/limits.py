"""What a narrowed model keeps to: a share of the parameters, of the time a step, or both; and the widths that do.

Every legal number of heads gets as many neurons as the limits leave (a bisection: both limits grow with the neurons).
The pair whose shares of heads and neurons are nearest comes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from fettle.errors import RecipeError
from fettle.methods.reshape.latency import LatencyTarget, Pieces, measured_pieces
from fettle.methods.reshape.legal_widths import Widths
from fettle.methods.reshape.subject import Subject, parse_share
from fettle.models.families import FREE_HEAD_SIZE


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Numbers that a model may not exceed; None for none.

    Attributes:
        parameters: of the whole model.
        seconds: of a step.
        pieces: how long a step takes.
        original_seconds: of the model as it was, by the same pieces.
        asked: what the user wrote, for errors.
    """

    parameters: float | None
    seconds: float | None
    pieces: Pieces | None
    original_seconds: float
    asked: str

    def hold(self, subject: Subject, widths: Widths) -> bool:
        """Whether the subject with these widths keeps to them."""
        if self.parameters is not None and widths.parameters(subject) > self.parameters:
            return False
        return self.seconds is None or self.predicted(subject, widths) <= self.seconds

    def predicted(self, subject: Subject, widths: Widths) -> float:
        """Seconds of a step of the subject with these widths."""
        assert self.pieces is not None
        return self.pieces.model(len(subject.anatomy.blocks), widths)

    def report(self, subject: Subject, widths: Widths) -> dict[str, Any]:
        """What was measured and what is predicted, in milliseconds; nothing without a limit of time."""
        if self.pieces is None:
            return {}
        return {
            "predicted_ms": 1e3 * self.predicted(subject, widths), "original_ms": 1e3 * self.original_seconds,
            "pieces": self.pieces.to_dict(),
        }  # fmt: skip

    def unreachable(self, subject: Subject, hidden: int, multiple: int) -> RecipeError:
        """What to say where no widths keep to them."""
        full, free = Widths.of(subject), subject.family.name in FREE_HEAD_SIZE
        fewest = 1 if free else full.heads.kv_heads
        least = full.shared(multiple / min(full.neurons), fewest / full.heads.kv_heads, hidden, multiple)
        left = f"{least.parameters(subject) / subject.parameters:.2f}x"
        if self.seconds is not None:
            left += f" of the parameters and {self.predicted(subject, least) / self.original_seconds:.2f}x of the time"
        return RecipeError(
            f"narrow: {self.asked} cannot be reached with neurons{' and heads' if free else ''} alone: their smallest "
            f"widths leave {left}. Give hidden as well (such as hidden: 0.75), drop layers, or trim the vocabulary"
        )


def find_limits(
    subject: Subject, parameters: str | None, latency: LatencyTarget, hidden: int, multiple: int, method: str
) -> Limits | None:
    """The limits that are asked for, relative to the subject; None for none. Measures where time is limited.

    Raises:
        RecipeError: no such share, blocks that differ, or nothing here that could measure.
    """
    if parameters is None and latency.share is None:
        return None
    allowed = None if parameters is None else parse_share(parameters, "parameters", method) * subject.parameters
    asked = f"parameters={parameters!r}" if latency.share is None else f"latency={latency.share!r}"
    if latency.share is None:
        return Limits(parameters=allowed, seconds=None, pieces=None, original_seconds=0.0, asked=asked)
    if subject.measure is None:
        raise RecipeError(f"{method}: latency is measured, and nothing here measures it; run it as a recipe's step")
    measure = partial(subject.measure, engine=latency.engine, tokens=latency.tokens)
    full = Widths.of(subject)
    pieces = measured_pieces(subject, measure, hidden, multiple)
    before = pieces if hidden == full.hidden else measured_pieces(subject, measure, full.hidden, multiple)
    original = before.model(len(subject.anatomy.blocks), full)
    seconds = parse_share(latency.share, "latency", method) * original
    return Limits(parameters=allowed, seconds=seconds, pieces=pieces, original_seconds=original, asked=asked)


def widths_within(subject: Subject, limits: Limits, hidden: int, multiple: int) -> list[Widths]:
    """For every legal number of heads the most neurons that the limits leave; the most even pair first."""
    full, free = Widths.of(subject), subject.family.name in FREE_HEAD_SIZE
    found: list[tuple[float, Widths]] = []
    for kept in range(1, full.heads.kv_heads + 1) if free else (full.heads.kv_heads,):
        widths = _most_neurons(subject, limits, full, kept / full.heads.kv_heads, hidden, multiple)
        if widths is not None and widths not in (known for _, known in found):
            kept_heads = widths.heads.heads / full.heads.heads
            found.append((abs(min(widths.neurons.values()) / min(widths.neurons) - kept_heads), widths))
    return [widths for _, widths in sorted(found, key=lambda pair: pair[0])]


def _most_neurons(
    subject: Subject, limits: Limits, full: Widths, heads: float, hidden: int, multiple: int
) -> Widths | None:
    """The widths with this share of heads and the most neurons within the limits; None where none are."""
    largest = max(full.neurons)
    shares = [k * multiple / largest for k in range(1, largest // multiple + 1)]
    shares = [share for share in shares if share * min(full.neurons) >= multiple]
    if not shares or shares[-1] < 1:
        shares.append(1.0)
    best, low, high = None, 0, len(shares)
    while low < high:
        middle = (low + high) // 2
        widths = full.shared(shares[middle], heads, hidden, multiple)
        if limits.pieces is not None and widths.heads.kv_heads not in limits.pieces.heads:
            return None
        if limits.hold(subject, widths):
            best, low = widths, middle + 1
        else:
            high = middle
    return best
