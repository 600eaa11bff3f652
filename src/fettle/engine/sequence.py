"""What is asked for, and how far it is: a request never changes, a sequence is its state while it runs.

    tokens   = prompt + what was made so far                      known
    computed = how many of them have keys and values in the cache

A sequence that was thrown out of the cache is the same with computed = 0: nothing else has to be remembered, because a
token that was drawn is never drawn again.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Listed
from dataclasses import dataclass, field
from typing import Literal

from fettle.engine.sampler import Draw, Sampling
from fettle.errors import UsageError

Stopped = Literal["end", "length", "context", "stop", "cancelled"]
MOST_LOGPROBS = 100


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to be completed.

    Attributes:
        prompt: token ids, at least one; `Vocabulary.encode` makes them from text.
        sampling: how tokens are drawn.
        max_tokens: how many are made at most.
        min_tokens: how many are made at least, before an end or a stop token may come.
        stop: texts that end the completion; none of them is part of it.
        stop_tokens: ids that end the completion as the model's own end does.
        ignore_end: the model's own end of text is an ordinary token.
        logit_bias: id → what is added to its logit.
        logprobs: how many of the likeliest tokens are told with their log-probabilities; None: not even the chosen one.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 64
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    ignore_end: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    def check(self, vocab_size: int) -> None:
        """Refuses what cannot be.

        Raises:
            UsageError: a value out of its range, or an id that the model does not have.
        """
        self.sampling.check()
        if not self.prompt:
            raise UsageError("the prompt has no tokens; give at least one")
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise UsageError(
                f"min_tokens is {self.min_tokens}; it must be from 0 to max_tokens, which is {self.max_tokens}"
            )
        if any(not text for text in self.stop):
            raise UsageError("a stop text is empty and would end every completion at once; leave it out")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise UsageError(f"logprobs is {self.logprobs}; it must be from 0 to {MOST_LOGPROBS}, or not given")
        for name, ids in (("prompt", self.prompt), ("stop_tokens", self.stop_tokens), ("logit_bias", self.logit_bias)):
            wrong = [token for token in ids if not 0 <= token < vocab_size]
            if wrong:
                raise UsageError(f"{name} names token {wrong[0]}; this model's ids go from 0 to {vocab_size - 1}")
        for token, bias in self.logit_bias.items():
            if not abs(bias) <= 1e4:  # also refuses what is not a number
                raise UsageError(f"logit_bias of token {token} is {bias}; it must be from -10000 to 10000")


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities under the model's own distribution, before temperature, penalties and bias, in nats.

    Attributes:
        token: the one that was chosen.
        logprob: its log-probability.
        top: the likeliest tokens, best first, as (id, log-probability).
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Sequence:
    """A request on its way.

    Attributes:
        number: counts requests up; the order of arrival.
        limit: how many tokens may be made: max_tokens, less where the context is full before.
        ends: ids that end it.
        tokens: the prompt and what was made.
        computed: how many tokens are in the cache.
        pages: where, in the order of positions.
        hashes: of its sealed pages, from the first on.
        long: whether its cached keys have the rotary factors of long sequences.
        restarts: how often its pages were taken away.
        stopped: why it ended; None while it runs.
    """

    number: int
    request: Request
    limit: int
    ends: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    long: bool = False
    restarts: int = 0
    stopped: Stopped | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def __post_init__(self) -> None:
        """The prompt is what is known at first."""
        self.tokens = list(self.request.prompt)

    @property
    def made(self) -> list[int]:
        """The tokens behind the prompt."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def made_count(self) -> int:
        """How many tokens were made."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def missing(self) -> int:
        """How many known tokens are not in the cache yet; 1 while it decodes."""
        return len(self.tokens) - self.computed

    def draw(self, drafted: Listed[int] = ()) -> Draw:
        """What decides the token behind all known ones and these drafted ones."""
        request, penalized = self.request, self.request.sampling.penalizes
        early = self.made_count + len(drafted) < request.min_tokens
        return Draw(
            sampling=request.sampling,
            position=len(self.tokens) + len(drafted),
            prompt=request.prompt if penalized else (),
            made=[*self.made, *drafted] if penalized else (),
            bias=request.logit_bias,
            banned=self.ends if early else (),
        )

    def draw_at(self, place: int) -> Draw:
        """What decided the made token at this place, when it was drawn."""
        request, penalized = self.request, self.request.sampling.penalizes
        before = self.tokens[len(request.prompt) : place]
        return Draw(
            sampling=request.sampling,
            position=place,
            prompt=request.prompt if penalized else (),
            made=before if penalized else (),
            bias=request.logit_bias,
            banned=self.ends if len(before) < request.min_tokens else (),
        )

    def append(self, token: int) -> Stopped | None:
        """Takes a drawn token; returns why this ends the sequence, if it does. An end is not part of the tokens."""
        if token in self.ends:
            self.stopped = "end"
            return self.stopped
        self.tokens.append(token)
        if self.made_count >= self.limit:
            self.stopped = "length" if self.limit == self.request.max_tokens else "context"
        return self.stopped
