"""Speculative decoding: guess some tokens cheaply, check them all in one step of the model, keep what is right.

Leviathan, Kalman and Matias 2023 (https://arxiv.org/abs/2211.17192). A step that computes k guessed tokens beside the
known one gives the model's distributions at k + 1 places. With a guess right with probability a, and a guess that
costs c steps,

    tokens a step = (1 - a^(k+1)) / (1 - a)        gain(k) = tokens a step / (1 + c·k)

Exact by construction: at every place the engine draws its token from the model's own distribution, as if nobody had
guessed, and a guess counts where it is that token. Leviathan's test (keep x with min(1, p(x)/q(x)), else draw from
the rest) has the same law but makes the tokens depend on the guesses. Here the drafter races with the same noise as
the model (`sampler.race`, Daliri et al. 2024, https://arxiv.org/abs/2408.07978), so the tokens are bit for bit those
of a run without speculation, for greedy and for sampled requests alike, whatever is guessed and whenever guessing is
switched off. The price: a guess is right with probability at least (1 - d)/(1 + d) instead of 1 - d, d the total
variation between p and q; equal for prompt look-up and for greedy.

`payoff.py` measures a and c while the engine runs, chooses k by the formula, and guesses nothing where no k gains.
What it needs of a drafter beside guesses: what one more costs, what has to be read before the first, and rehearsals.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from collections.abc import Sequence as Listed
from dataclasses import dataclass, field
from statistics import median_low
from typing import Protocol

from fettle.engine.runner import Piece, Runner, pack
from fettle.engine.sampler import draw_token
from fettle.engine.scheduler import Work
from fettle.engine.sequence import Sequence
from fettle.errors import UsageError

CATCH_UP_TOKENS = 512  # a draft model reads at most as many at once
FEW_TOKENS = 8  # so many missed ones are read together with the newest
SCRATCH_TOKENS = 32  # of a draft model's cache, behind the pages that it shares the numbers of: for rehearsals
REHEARSED, LEAST_REHEARSED = 24, 12  # tokens that a rehearsal reads, at most and at least
OPENING_RUNS = 5  # timed when a draft model is opened; the fastest counts
TIMED = 15  # steps that a median is of


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a drafter would have guessed of tokens that were made without it.

    Attributes:
        right: guesses of a single token that were right.
        tried: how many there were.
        seconds: that it took; 0 where it costs next to nothing.
    """

    right: int = 0
    tried: int = 0
    seconds: float = 0.0


NOTHING = Rehearsal()


class Drafter(Protocol):
    """Guesses the next tokens of decoding sequences."""

    def silent(self, sequence: Sequence) -> bool:
        """Whether it has nothing to guess behind the newest token, told within a few microseconds; else False."""
        ...

    def propose(self, works: Listed[Work]) -> list[list[int]]:
        """Up to `work.room` guessed tokens for each, in order; none where there is nothing to guess."""
        ...

    def rehearse(self, sequence: Sequence, seconds: float) -> Rehearsal:
        """What it would have guessed of the newest tokens; only as much as fits into so many seconds."""
        ...

    def guess_seconds(self, rows: int) -> float:
        """What one more guess takes, for so many sequences together."""
        ...

    def entry_seconds(self, sequence: Sequence) -> float:
        """What has to be read before the first guess for a sequence, in seconds."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """The sequence is done."""
        ...


@dataclass
class _Text:
    """What look-up knows of a sequence's first `end` tokens."""

    end: int = 0
    places: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram → what stood behind it the last time
    grams: list[tuple[int, ...]] = field(default_factory=list)  # those that end here, longest first: not in places yet
    found: int | None = None  # the place of the first of them that stood there before
    right: int = 0  # of made tokens that had something found before them, since a rehearsal told of them
    tried: int = 0


class PromptLookup:
    """Guesses that what followed the last few tokens before follows them again; no model needed.

    The longest of the last `longest` … `shortest` tokens that stands in the text already is looked up, its newest
    place first (Saxena 2023, prompt lookup decoding). Cost: a dictionary entry a token and length.
    """

    def __init__(self, *, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise UsageError(f"prompt look-up of {shortest} to {longest} tokens cannot be; give 1 ≤ shortest ≤ longest")
        self._lengths = range(longest, shortest - 1, -1)
        self._texts: dict[int, _Text] = {}

    def silent(self, sequence: Sequence) -> bool:
        """As `Drafter.silent`."""
        return self._enter(sequence).found is None

    def propose(self, works: Listed[Work]) -> list[list[int]]:
        """As `Drafter.propose`."""
        return [self._guess(work.sequence, work.room) if work.room else [] for work in works]

    def rehearse(self, sequence: Sequence, seconds: float) -> Rehearsal:
        """As `Drafter.rehearse`, with all made tokens since the last time, whatever the seconds."""
        text = self._enter(sequence)
        if text.tried == 0:
            return NOTHING
        told = Rehearsal(right=text.right, tried=text.tried)
        text.right = text.tried = 0
        return told

    def guess_seconds(self, rows: int) -> float:
        """Nothing: a few dictionary look-ups."""
        return 0.0

    def entry_seconds(self, sequence: Sequence) -> float:
        """Nothing: every token is entered as it comes."""
        return 0.0

    def forget(self, sequence: Sequence) -> None:
        """As `Drafter.forget`."""
        self._texts.pop(sequence.number, None)

    def _enter(self, sequence: Sequence) -> _Text:
        """Enters n-grams behind which a token stands by now, after seeing what each would have guessed."""
        text = self._texts.get(sequence.number)
        if text is None:
            text = self._texts[sequence.number] = _Text()
        tokens, places = sequence.tokens, text.places
        for end in range(text.end, len(tokens)):
            if text.found is not None and end >= len(sequence.request.prompt):
                text.tried += 1
                text.right += tokens[text.found] == tokens[end]
            for gram in text.grams:
                places[gram] = end
            text.end = known = end + 1
            text.grams = [tuple(tokens[known - length : known]) for length in self._lengths if length <= known]
            text.found = None
            for gram in text.grams:
                if gram in places:
                    text.found = places[gram]
                    break
        return text

    def _guess(self, sequence: Sequence, room: int) -> list[int]:
        tokens, found = sequence.tokens, self._enter(sequence).found
        if found is None:
            return []
        period = len(tokens) - found  # shorter than what may be guessed: the text goes round in a circle
        return [tokens[found + step % period] for step in range(room)]


def scratch_pages(page_size: int) -> int:
    """How many pages a draft model's cache has beyond those of the model that it guesses for."""
    return -(-SCRATCH_TOKENS // page_size)


class DraftModel:
    """Guesses with a smaller model, whose cache lies in pages of the same numbers as the big one's.

    Behind them it has `scratch_pages` more, in which it is timed when it is opened, and rehearses: it reads the newest
    tokens as if the text began there, and says at each what it would have guessed. So what it knows of a sequence, and
    of another one with which that shares pages, stays as it is.
    """

    def __init__(self, runner: Runner, target: Runner, clock: Callable[[], float] = time.perf_counter) -> None:
        mine, its = runner.shape, target.shape
        if mine.vocab_size != its.vocab_size:
            raise UsageError(
                f"the draft model has {mine.vocab_size} tokens and the model {its.vocab_size}; a draft model needs the "
                "same vocabulary, such as a smaller model of the family or the model's own compressed version"
            )
        needed = its.pages + scratch_pages(its.page_size)
        if (mine.pages, mine.page_size) != (needed, its.page_size):
            raise UsageError(
                f"the draft model's cache has {mine.pages} pages of {mine.page_size} tokens and the model's "
                f"{its.pages} of {its.page_size}; open it with {needed} pages of {its.page_size} tokens"
            )
        self._runner, self._clock = runner, clock
        self._scratch = range(its.pages, needed)
        self._fed: dict[int, tuple[int, int, list[int]]] = {}  # number → restarts, known tokens fed, guessed ones fed
        step, self._token_seconds = self._time_opening()  # of a token among many that are read at once
        self._reads = deque([self._token_seconds], maxlen=TIMED)
        self._guess_seconds = {1: step}  # rows → seconds of a guess
        self._steps: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=TIMED))
        self._steps[1].append(step)

    def silent(self, sequence: Sequence) -> bool:
        """As `Drafter.silent`: a model always has a guess."""
        return False

    def propose(self, works: Listed[Work]) -> list[list[int]]:
        """As `Drafter.propose`; one call of the draft model a guessed token, for all sequences at once."""
        longest = self._runner.shape.context_length
        guesses: list[list[int]] = [[] for _ in works]
        rooms = [
            work.room if longest is None else min(work.room, longest - len(work.sequence.tokens)) for work in works
        ]
        active = [index for index, room in enumerate(rooms) if room > 0]
        pieces = [self._first(works[index].sequence) for index in active]
        while active:
            rows, single, began = len(active), all(len(piece.tokens) == 1 for piece in pieces), self._clock()
            logits = self._runner.run(pack(pieces))
            for row, index in zip(logits, active, strict=True):
                guesses[index].append(draw_token(row, works[index].sequence.draw(guesses[index])))
            if single:
                self._steps[rows].append(self._clock() - began)
                self._guess_seconds[rows] = median_low(self._steps[rows])
            active = [index for index in active if len(guesses[index]) < rooms[index]]
            pieces = [self._next(works[index].sequence, guesses[index]) for index in active]
        for work, guess in zip(works, guesses, strict=True):
            if guess:
                self._fed[work.sequence.number] = (work.sequence.restarts, len(work.sequence.tokens), guess[:-1])
        return guesses

    def rehearse(self, sequence: Sequence, seconds: float) -> Rehearsal:
        """As `Drafter.rehearse`, in one call; nothing where the seconds or the made tokens do not suffice."""
        if seconds <= 0:
            return NOTHING
        tokens, last = sequence.tokens, len(sequence.tokens) - 1
        longest = min(REHEARSED, last, self._rehearsable, sequence.made_count * 3 // 2)
        fits = int(min(seconds / self._token_seconds, longest))
        if fits < LEAST_REHEARSED:
            return NOTHING
        tried = fits * 2 // 3  # the first third is past for the others
        began = self._clock()
        logits = self._runner.run(pack([self._in_scratch(tokens[last - fits : last], 0, tried)]))
        wanted = range(last + 1 - tried, last + 1)
        right = sum(
            draw_token(row, sequence.draw_at(place)) == tokens[place] for row, place in zip(logits, wanted, strict=True)
        )
        took = self._clock() - began
        self._reads.append(took / fits)
        self._token_seconds = median_low(self._reads)
        return Rehearsal(right=right, tried=tried, seconds=took)

    def guess_seconds(self, rows: int) -> float:
        """As `Drafter.guess_seconds`; of the nearest number of sequences where this one was not measured."""
        known = self._guess_seconds
        return known[rows] if rows in known else known[min(known, key=lambda other: abs(other - rows))]

    def entry_seconds(self, sequence: Sequence) -> float:
        """As `Drafter.entry_seconds`: of the known tokens that it has not read, but for the newest."""
        return max(0, len(sequence.tokens) - 1 - self._held(sequence)) * self._token_seconds

    def forget(self, sequence: Sequence) -> None:
        """As `Drafter.forget`."""
        self._fed.pop(sequence.number, None)

    @property
    def _rehearsable(self) -> int:
        longest = self._runner.shape.context_length
        return SCRATCH_TOKENS if longest is None else min(SCRATCH_TOKENS, longest)

    def _time_opening(self) -> tuple[float, float]:
        """Seconds of a step, and of a token among many that are read at once: the fastest of a few."""
        many = max(1, min(REHEARSED, self._rehearsable - 1))
        steps, reads = [], []
        for _ in range(OPENING_RUNS):
            began = self._clock()
            self._runner.run(pack([self._in_scratch([0] * many, 0, 1)]))
            read = self._clock()
            self._runner.run(pack([self._in_scratch([0], many, 1)]))
            reads.append((read - began) / many)
            steps.append(self._clock() - read)
        return min(steps), min(reads)

    def _in_scratch(self, tokens: Listed[int], start: int, logits: int) -> Piece:
        known = start + len(tokens)
        return Piece(tokens=tokens, start=start, pages=self._scratch, known=known, logits=logits)

    def _held(self, sequence: Sequence) -> int:
        """How many tokens of the sequence the draft model's cache holds; at least the newest has to be computed."""
        restarts, known, guessed = self._fed.get(sequence.number, (sequence.restarts, 0, []))
        if restarts != sequence.restarts:
            return 0
        for guess, token in zip(guessed, sequence.tokens[known:], strict=False):
            if guess != token:
                break
            known += 1
        return min(known, len(sequence.tokens) - 1)

    def _first(self, sequence: Sequence) -> Piece:
        """The tokens up to the last known one; what is far behind is read before, alone: its pages may be shared."""
        held, last = self._held(sequence), len(sequence.tokens) - 1
        if held == 0 or last - held > FEW_TOKENS:
            for start in range(held, last, CATCH_UP_TOKENS):
                self._runner.run(pack([self._piece(sequence, start, min(start + CATCH_UP_TOKENS, last), 0)]))
            held = last
        return self._piece(sequence, held, last + 1, 1)

    def _piece(self, sequence: Sequence, start: int, end: int, logits: int) -> Piece:
        return Piece(
            tokens=sequence.tokens[start:end],
            start=start,
            pages=sequence.pages,
            known=len(sequence.tokens),
            logits=logits,
        )

    def _next(self, sequence: Sequence, guess: list[int]) -> Piece:
        known = len(sequence.tokens)
        return Piece(tokens=guess[-1:], start=known + len(guess) - 1, pages=sequence.pages, known=known, logits=1)
