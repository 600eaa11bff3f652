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

`payoff.py` measures a and c while the engine runs, chooses k by the formula, and stops guessing where no k gains.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from typing import Protocol

from fettle.engine.runner import Piece, Runner, pack
from fettle.engine.sampler import draw_token
from fettle.engine.scheduler import Work
from fettle.engine.sequence import Sequence
from fettle.errors import UsageError

CATCH_UP_TOKENS = 512  # a draft model reads at most as many at once
FEW_TOKENS = 8  # so many missed ones are read together with the newest


class Drafter(Protocol):
    """Guesses the next tokens of decoding sequences."""

    def propose(self, works: Listed[Work]) -> list[list[int]]:
        """Up to `work.room` guessed tokens for each, in order; none where there is nothing to guess."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """The sequence is done."""
        ...


class PromptLookup:
    """Guesses that what followed the last few tokens before follows them again; no model needed.

    The longest of the last `longest` … `shortest` tokens that stands in the text already is looked up, its newest
    place first (Saxena 2023, prompt lookup decoding). Cost: a dictionary entry a token and length.
    """

    def __init__(self, *, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise UsageError(f"prompt look-up of {shortest} to {longest} tokens cannot be; give 1 ≤ shortest ≤ longest")
        self._lengths = range(longest, shortest - 1, -1)
        self._places: dict[int, tuple[int, dict[tuple[int, ...], int]]] = {}

    def propose(self, works: Listed[Work]) -> list[list[int]]:
        """As `Drafter.propose`."""
        return [self._guess(work.sequence, work.room) if work.room else [] for work in works]

    def forget(self, sequence: Sequence) -> None:
        """As `Drafter.forget`."""
        self._places.pop(sequence.number, None)

    def _guess(self, sequence: Sequence, room: int) -> list[int]:
        tokens = sequence.tokens
        seen, places = self._places.get(sequence.number, (0, {}))
        for end in range(seen, len(tokens)):  # an n-gram is entered when a token stands behind it
            for length in self._lengths:
                if end >= length:
                    places[tuple(tokens[end - length : end])] = end
        self._places[sequence.number] = (len(tokens), places)
        for length in self._lengths:
            found = places.get(tuple(tokens[-length:])) if len(tokens) >= length else None
            if found is not None:
                period = len(tokens) - found  # shorter than what may be guessed: the text goes round in a circle
                return [tokens[found + step % period] for step in range(room)]
        return []


class DraftModel:
    """Guesses with a smaller model, whose cache lies in pages of the same numbers as the big one's."""

    def __init__(self, runner: Runner, target: Runner) -> None:
        mine, its = runner.shape, target.shape
        if mine.vocab_size != its.vocab_size:
            raise UsageError(
                f"the draft model has {mine.vocab_size} tokens and the model {its.vocab_size}; a draft model needs the "
                "same vocabulary, such as a smaller model of the family or the model's own compressed version"
            )
        if (mine.pages, mine.page_size) != (its.pages, its.page_size):
            raise UsageError(
                f"the draft model's cache has {mine.pages} pages of {mine.page_size} tokens and the model's "
                f"{its.pages} of {its.page_size}; open both alike"
            )
        self._runner = runner
        self._fed: dict[int, tuple[int, int, list[int]]] = {}  # number → restarts, known tokens fed, guessed ones fed

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
            logits = self._runner.run(pack(pieces))
            for row, index in zip(logits, active, strict=True):
                guesses[index].append(draw_token(row, works[index].sequence.draw(guesses[index])))
            active = [index for index in active if len(guesses[index]) < rooms[index]]
            pieces = [self._next(works[index].sequence, guesses[index]) for index in active]
        for work, guess in zip(works, guesses, strict=True):
            if guess:
                self._fed[work.sequence.number] = (work.sequence.restarts, len(work.sequence.tokens), guess[:-1])
        return guesses

    def forget(self, sequence: Sequence) -> None:
        """As `Drafter.forget`."""
        self._fed.pop(sequence.number, None)

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
