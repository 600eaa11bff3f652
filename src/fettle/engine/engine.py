"""The engine: requests in, tokens out, one step at a time.

    schedule ──▶ guess ──▶ run ──▶ sample ──▶ postprocess
    (who, which  (drafts)  (the    (a token   (text, stops,
     tokens)               model)   a row)     pages back)

The scheduler touches no tensor and the runner no request; this is where they meet. A request's tokens depend on the
model, the prompt, its own settings and its seed: not on what else runs, in which chunks its prompt was read, what was
reused, guessed, thrown out or computed again. (The model's rounding may depend on the shape of a batch; in float32
that moves a token only where two are as good as equally likely.)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from collections.abc import Sequence as Listed
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fettle.engine.payoff import Payoff
from fettle.engine.prompts import Vocabulary
from fettle.engine.runner import Piece, Runner, pack
from fettle.engine.sampler import draw_token, likeliest, log_probabilities
from fettle.engine.scheduler import Plan, Scheduler, SchedulerOptions
from fettle.engine.sequence import Request, Sequence, Stopped, TokenLogprobs
from fettle.engine.speculative import Drafter
from fettle.engine.transcript import Transcript
from fettle.errors import NonFiniteError, UsageError


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came out of one request.

    Attributes:
        text: without the prompt and without the stop text; empty where the engine has no tokenizer.
        tokens: all that were made; those of a stop text are among them.
        prompt_tokens: how many the prompt has.
        stopped: "end" of text by the model; max_tokens gave the "length"; the model's "context" is full; a "stop"
            text came; or it was "cancelled".
        logprobs: one for each token, where they were asked for.
        reused_tokens: of the prompt, taken over from others at the first start.
        waiting_seconds: until its first step began.
        prefill_seconds: from there to the first token.
        decode_seconds: from the first token to the last.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    stopped: Stopped
    logprobs: tuple[TokenLogprobs, ...] = ()
    reused_tokens: int = 0
    waiting_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prompt tokens that were computed, by the time to the first token; None where no time passed."""
        computed = self.prompt_tokens - self.reused_tokens
        return computed / self.prefill_seconds if self.prefill_seconds > 0 else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens behind the first, by the time they took; None for fewer than two."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds > 0 else None


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a step did for one request.

    Attributes:
        number: the request's, as `add` returned it.
        text: new and certain.
        tokens: new ones, in order; several where guesses were right.
        completion: the whole, with the last update only.
    """

    number: int
    text: str
    tokens: tuple[int, ...]
    completion: Completion | None = None


@dataclass(eq=False)
class _Running:
    """A sequence with its text and its times."""

    sequence: Sequence
    transcript: Transcript | None
    added: float
    began: float | None = None
    first: float | None = None
    last: float | None = None
    reused: int = 0
    said: list[str] = field(default_factory=list)


class Engine:
    """A runner that serves many requests at once.

    Attributes:
        runner: the model. Its pages belong to this engine alone: another engine on the same runner may only follow it,
            or take turns while nothing runs and `reuse_prefixes` is off.
        vocabulary: its tokenizer and ends; None: requests are made of ids and only their limits end them.
        scheduler: for its figures; its state is the engine's business.
        payoff: how guessing goes; None without a drafter.
    """

    def __init__(
        self,
        runner: Runner,
        vocabulary: Vocabulary | None = None,
        options: SchedulerOptions | None = None,
        *,
        drafter: Drafter | None = None,
        payoff: Payoff | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.runner, self.vocabulary = runner, vocabulary
        self.scheduler = Scheduler(runner.shape, options)
        self._drafter = drafter
        self.payoff = None if drafter is None else payoff or Payoff()
        self._clock = clock
        self._running: dict[int, _Running] = {}
        self._listeners: dict[int, deque[Update]] = {}
        self._count = 0

    @property
    def busy(self) -> bool:
        """Whether any request is not done."""
        return bool(self._running)

    def encode(self, prompt: str) -> tuple[int, ...]:
        """The token ids of a text, for `Request.prompt`; raises as `prompts.checked_prompt`."""
        if self.vocabulary is None:
            raise UsageError("this engine has no tokenizer; give a prompt as token ids")
        return self.vocabulary.encode(prompt)

    def add(self, request: Request) -> int:
        """Takes a request; returns the number under which `step` tells of it.

        Raises:
            UsageError: a value that cannot be, or a prompt that fills the model's context.
            ResourceError: prompt and completion do not fit into the cache.
        """
        sequence = self._sequence(request)
        self.scheduler.add(sequence)
        tokenizer = None if self.vocabulary is None else self.vocabulary.tokenizer
        transcript = None if tokenizer is None else Transcript(tokenizer, request.stop, prompt=request.prompt)
        self._running[sequence.number] = _Running(sequence, transcript, self._clock())
        self._count += 1
        return sequence.number

    def _sequence(self, request: Request) -> Sequence:
        request.check(self.runner.shape.vocab_size)
        if request.stop and (self.vocabulary is None or self.vocabulary.tokenizer is None):
            raise UsageError("stop texts need a tokenizer, and this model has none; give stop_tokens")
        held = self.runner.shape.context_length
        limit = request.max_tokens if held is None else min(request.max_tokens, held - len(request.prompt))
        if limit < 1:
            raise UsageError(
                f"the prompt has {len(request.prompt)} tokens; this model's context holds {held}, one less for a prompt"
            )
        ends = frozenset() if request.ignore_end or self.vocabulary is None else self.vocabulary.ends
        return Sequence(number=self._count, request=request, limit=limit, ends=ends | request.stop_tokens)

    def cancel(self, number: int) -> Completion | None:
        """Ends a request before the next step; its pages are free when this returns. None: it was done already."""
        running = self._running.get(number)
        if running is None:
            return None
        self.scheduler.finish(running.sequence, "cancelled")
        return self._close(running)

    def step(self) -> list[Update]:
        """Computes the next tokens; returns what is new, in the order of arrival. Nothing to do gives nothing.

        Raises:
            NonFiniteError: the model's logits are not finite: it is damaged. All requests are dropped.
        """
        payoff, drafter = self._awake(), self._drafter
        plan = self.scheduler.schedule(None if payoff is None else self._lookahead)
        if not plan.work:
            return []
        began = self._clock()
        for work in plan.work:
            self._begin(work.sequence, began)
        guesses: list[list[int]] = [[] for _ in plan.work]
        drafted = began
        if drafter is not None and any(work.room for work in plan.work):
            guesses = drafter.propose(plan.work)
            drafted = self._clock()
        logits = self.runner.run(pack(_pieces(plan, guesses), plan.copies))
        self._check_finite(logits, plan)
        if payoff is not None and all(work.draws and work.count == 1 for work in plan.work):
            payoff.observe(drafted - began, self._clock() - drafted, sum(map(len, guesses)))
        updates = []
        start = 0
        for work, guess in zip(plan.work, guesses, strict=True):
            self.scheduler.computed(work)
            if work.sequence.missing == 0:
                rows = logits[start : start + 1 + len(guess)]
                start += len(rows)
                updates.append(self._take(work.sequence, rows, guess, payoff))
        for update in updates:
            if update.number in self._listeners:
                self._listeners[update.number].append(update)
        return updates

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Completes them all, as many at once as fit; results in their order. All are dropped where one cannot be.

        Requests that were added before run along; what the steps tell of them is not kept.
        """
        numbers: list[int] = []
        done: dict[int, Completion] = {}
        try:
            for request in requests:
                numbers.append(self.add(request))
            while not all(number in done for number in numbers):
                done.update({u.number: u.completion for u in self.step() if u.completion is not None})
        finally:
            for number in numbers:
                self.cancel(number)
        return [done[number] for number in numbers]

    def stream(self, request: Request) -> Generator[str, None, Completion]:
        """Yields the text piece by piece; returns the `Completion`. Closing it cancels the request.

        Several streams may run at the same time: each step serves all of them. A stream begins when it is first asked.
        """
        self._sequence(request)  # what cannot be is refused here, not at the first piece
        return self._follow(request)

    def _follow(self, request: Request) -> Generator[str, None, Completion]:
        number = self.add(request)
        inbox = self._listeners[number] = deque()
        try:
            while True:
                while not inbox:
                    self.step()
                update = inbox.popleft()
                if update.text:
                    yield update.text
                if update.completion is not None:
                    return update.completion
        finally:
            del self._listeners[number]
            self.cancel(number)

    def _awake(self) -> Payoff | None:
        """Who chooses how much is guessed in this step, told of it; None where the step is a plain one."""
        payoff, running = self.payoff, self.scheduler.running
        if payoff is None or self._drafter is None:
            return None
        if not self.scheduler.waiting and payoff.rests(running, self._drafter):
            return None
        payoff.begin(sum(sequence.missing == 1 for sequence in running))
        return payoff

    def _check_finite(self, logits: NDArray[np.float32], plan: Plan) -> None:
        if np.isfinite(logits).all():
            return
        known = max(len(work.sequence.tokens) for work in plan.work)
        for number in list(self._running):
            self.cancel(number)
        raise NonFiniteError(f"the model's logits are not finite after {known} tokens: it is damaged")

    def _lookahead(self, sequence: Sequence) -> int:
        if self.payoff is None or self._drafter is None:
            return 0
        return self.payoff.wanted(sequence, self._drafter)

    def _begin(self, sequence: Sequence, now: float) -> None:
        running = self._running[sequence.number]
        if running.began is None:
            running.began, running.reused = now, sequence.computed

    def _take(self, sequence: Sequence, rows: NDArray[np.float32], guess: list[int], payoff: Payoff | None) -> Update:
        """Draws a token for each row as long as the guesses are right; keeps text, times and pages up to date."""
        running = self._running[sequence.number]
        before, right = sequence.made_count, 0
        texts: list[str] = []
        for place, row in enumerate(rows):
            token = draw_token(row, sequence.draw())
            why = sequence.append(token)
            if sequence.made_count > before + place:  # an end is no part of it
                if sequence.request.logprobs is not None:
                    sequence.logprobs.append(_logprobs(row, token, sequence.request.logprobs))
                if running.transcript is not None:
                    early = sequence.made_count < sequence.request.min_tokens
                    texts.append(running.transcript.push(token, may_stop=not early))
                    if running.transcript.stopped:
                        why = "stop"
            if place < len(guess) and token == guess[place]:
                right += 1
            if why is not None or place == len(guess) or token != guess[place]:
                break
        if payoff is not None:
            payoff.count(sequence, len(guess), right)
        now = self._clock()
        running.first = now if running.first is None else running.first
        running.last = now
        new = tuple(sequence.made[before:])
        if why is None:
            self.scheduler.accepted(sequence)
            return Update(number=sequence.number, text="".join(texts), tokens=new)
        self.scheduler.finish(sequence, why)
        if running.transcript is not None:
            texts.append(running.transcript.finish())
        return Update(number=sequence.number, text="".join(texts), tokens=new, completion=self._close(running))

    def _close(self, running: _Running) -> Completion:
        sequence = running.sequence
        del self._running[sequence.number]
        if self._drafter is not None and self.payoff is not None:
            self._drafter.forget(sequence)
            self.payoff.forget(sequence)
        if running.transcript is not None:
            running.transcript.finish()
        assert sequence.stopped is not None
        began = self._clock() if running.began is None else running.began
        first = began if running.first is None else running.first
        return Completion(
            text="" if running.transcript is None else running.transcript.text,
            tokens=tuple(sequence.made),
            prompt_tokens=len(sequence.request.prompt),
            stopped=sequence.stopped,
            logprobs=tuple(sequence.logprobs),
            reused_tokens=running.reused,
            waiting_seconds=began - running.added,
            prefill_seconds=first - began,
            decode_seconds=(first if running.last is None else running.last) - first,
        )


def _pieces(plan: Plan, guesses: Listed[list[int]]) -> list[Piece]:
    pieces = []
    for work, guess in zip(plan.work, guesses, strict=True):
        sequence, start = work.sequence, work.sequence.computed
        pieces.append(
            Piece(
                tokens=[*sequence.tokens[start : start + work.count], *guess],
                start=start,
                pages=sequence.pages,
                known=len(sequence.tokens),
                logits=1 + len(guess) if work.draws else 0,
            )
        )
    return pieces


def _logprobs(row: NDArray[np.float32], token: int, count: int) -> TokenLogprobs:
    said: Any = log_probabilities(row)
    return TokenLogprobs(token=token, logprob=float(said[token]), top=likeliest(said, count))
