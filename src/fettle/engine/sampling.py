"""Choosing the next token: pure functions on logits.

    p_i = softmax(logits / temperature)_i

restricted to the `top_k` largest, then to the smallest set whose probabilities sum to at least `top_p` (the nucleus,
Holtzman et al. 2019, https://arxiv.org/abs/1904.09751), then renormalized. Temperature 0 means the largest logit; of
equal ones the first, as `argmax` has it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fettle.errors import UsageError

COLDEST = 1e-30  # temperatures below it are the same: the likeliest token


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; the default is greedy."""

    temperature: float = field(default=0.0, metadata={"help": "0 takes the likeliest token; larger is more varied"})
    top_k: int | None = field(default=None, metadata={"help": "draw among the k likeliest tokens only"})
    top_p: float = field(default=1.0, metadata={"help": "draw among the likeliest tokens that hold this probability"})
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


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that a token is drawn from: float32 [vocab], sums to 1. Needs a temperature above 0."""
    # From the largest down, so that a temperature near nothing gives -inf for the others and never NaN.
    scaled = (logits.float() - logits.float().max()) / max(sampling.temperature, COLDEST)  # [vocab]
    if sampling.top_k is not None and sampling.top_k < scaled.numel():
        kept = scaled.topk(sampling.top_k).indices
        scaled = torch.full_like(scaled, float("-inf")).scatter(0, kept, scaled[kept])
    chances = torch.softmax(scaled, dim=0)
    if sampling.top_p < 1:
        ordered, order = chances.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered  # what the likelier tokens hold already
        kept = before < sampling.top_p
        kept[0] = True  # a top_p smaller than float32 can tell from 0 still leaves the likeliest
        ordered = torch.where(kept, ordered, 0)
        chances = torch.zeros_like(chances).scatter(0, order, ordered)
        chances = chances / chances.sum()
    return chances


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token's id from logits [vocab]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(probabilities(logits, sampling).cpu(), 1, generator=generator))
