"""Choosing the next token: pure functions on one row of logits, float64 [vocab] inside.

    l  = logits + bias, less the penalties of tokens that are there already
    p  = softmax(l / temperature), cut to the top_k largest, then to the nucleus top_p, then to p ≥ min_p · max p
    token = argmin_i  e_i / p_i        e_i ~ Exp(1), from a counter: (seed, position)

The last line draws from p exactly (the exponential race, which is the Gumbel trick after taking logarithms: the first
of independent clocks with rates p_i rings at i with probability p_i). The noise of a position depends on the
request's seed and the position alone, so a request's tokens are the same alone or in a batch, undisturbed or computed
again after it was thrown out, and whatever was drafted for it: a draft that races with the same noise mostly picks
the same token (Daliri, Musco and Suresh 2024, https://arxiv.org/abs/2408.07978), which is what `speculative.py` lives
on.

Temperature 0 means the largest logit; of equal ones the first, as `argmax` has it. Sources: nucleus, Holtzman et al.
2019, https://arxiv.org/abs/1904.09751; min_p, Nguyen et al. 2024, https://arxiv.org/abs/2407.01082; repetition penalty,
Keskar et al. 2019, https://arxiv.org/abs/1909.05858. Cost: one pass over the vocabulary, and a sort of it for top_p.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Sequence as Listed
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fettle.errors import UsageError

Row = NDArray[np.float64]  # [vocab]
COLDEST = 1e-30  # temperatures below it are the same: the likeliest token


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; the default is greedy."""

    temperature: float = field(default=0.0, metadata={"help": "0 takes the likeliest token; larger is more varied"})
    top_k: int | None = field(default=None, metadata={"help": "draw among the k likeliest tokens only"})
    top_p: float = field(default=1.0, metadata={"help": "draw among the likeliest tokens that hold this probability"})
    min_p: float = field(default=0.0, metadata={"help": "draw no token less likely than this share of the likeliest"})
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "divides the logits of tokens that the text holds already; 1 changes nothing"}
    )
    presence_penalty: float = field(default=0.0, metadata={"help": "taken off the logits of tokens made already"})
    frequency_penalty: float = field(default=0.0, metadata={"help": "the same, once for each time"})
    seed: int = field(default=0, metadata={"help": "the same seed draws the same tokens"})

    def check(self) -> None:
        """Refuses what cannot be.

        Raises:
            UsageError: a value out of its range.
        """
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(
                f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number such as 0.8"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k is {self.top_k}; it must be at least 1, or not given")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}; it must be a whole number from 0 to 2^63 - 1")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p is {self.min_p}; it must be from 0 to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UsageError(f"repetition_penalty is {self.repetition_penalty}; it must be positive, 1 changes nothing")
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= 100:  # also refuses what is not a number
                raise UsageError(f"{name} is {getattr(self, name)}; it must be from -100 to 100")

    @property
    def penalizes(self) -> bool:
        """Whether logits depend on the tokens before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Everything that decides one token beside the logits.

    Attributes:
        sampling: how.
        position: of the token that is drawn, in its sequence.
        prompt, made: the tokens before it; they count only where something is penalized.
        bias: id → what is added to its logit.
        banned: ids that may not come now.
    """

    sampling: Sampling
    position: int
    prompt: Listed[int] = ()
    made: Listed[int] = ()
    bias: Mapping[int, float] = field(default_factory=dict)
    banned: Collection[int] = ()


def draw_token(logits: NDArray[np.float32], draw: Draw) -> int:
    """The next token's id, from logits [vocab]."""
    if draw.sampling.temperature == 0 and not (draw.sampling.penalizes or draw.bias or draw.banned):
        return int(logits.argmax())
    row = adjusted(logits, draw)
    if draw.sampling.temperature == 0:
        return int(row.argmax())
    return race(probabilities(row, draw.sampling), draw.sampling.seed, draw.position)


def adjusted(logits: NDArray[np.float32], draw: Draw) -> Row:
    """Logits with penalties, bias and bans: a fresh float64 [vocab]."""
    row = logits.astype(np.float64)
    sampling = draw.sampling
    if sampling.repetition_penalty != 1:
        seen = np.unique(np.asarray([*draw.prompt, *draw.made], dtype=np.int64))
        row[seen] = np.where(
            row[seen] > 0, row[seen] / sampling.repetition_penalty, row[seen] * sampling.repetition_penalty
        )
    if draw.made and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, counts = np.unique(np.asarray(draw.made, dtype=np.int64), return_counts=True)
        row[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    for token, bias in draw.bias.items():
        row[token] += bias
    row[list(draw.banned)] = -np.inf
    return row


def probabilities(logits: NDArray[np.floating], sampling: Sampling) -> Row:
    """The distribution that a token is drawn from: float64 [vocab], sums to 1. Needs a temperature above 0."""
    # From the largest down, so that a temperature near nothing gives -inf for the others and never NaN.
    with np.errstate(over="ignore"):
        scaled = (logits - logits.max()).astype(np.float64) / max(sampling.temperature, COLDEST)
    if sampling.top_k is not None and sampling.top_k < len(scaled):
        best = np.argsort(-scaled, kind="stable")[sampling.top_k :]
        scaled[best] = -np.inf
    chances: Row = np.exp(scaled)
    chances /= chances.sum()
    if sampling.top_p < 1:
        order = np.argsort(-chances, kind="stable")
        ordered = chances[order]
        before = np.cumsum(ordered) - ordered  # what the likelier tokens hold already
        chances[order[1:][before[1:] >= sampling.top_p]] = 0  # the likeliest always stays
    if sampling.min_p > 0:
        chances[chances < sampling.min_p * chances.max()] = 0
    chances /= chances.sum()
    return chances


def race(chances: Row, seed: int, position: int) -> int:
    """An id drawn from these probabilities [vocab], the same for the same seed and position."""
    noise = np.random.Generator(np.random.Philox(key=seed, counter=position << 128)).standard_exponential(len(chances))
    with np.errstate(divide="ignore"):
        return int(np.argmin(noise / chances))


def log_probabilities(logits: NDArray[np.float32]) -> Row:
    """Log softmax, float64 [vocab]: what the model itself says, untempered."""
    row = logits.astype(np.float64)
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    return row


def likeliest(row: Row, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` largest entries, best first, as (id, value); of equal ones the smaller id first."""
    kept = np.argsort(-row, kind="stable")[:count]
    return tuple((int(token), float(row[token])) for token in kept)
