"""How many tokens to guess, measured while the engine runs, and none where guessing does not pay.

    gain(k) = (1 - a^(k+1)) / ((1 - a) · (1 + c·k))        a: a guess is right; c: seconds a guess adds, in plain steps

(Leviathan et al. 2023, theorem 3.8, with a guess's share of drafting and of checking in c.) a is counted for each
sequence and drawn towards that of all; c is a median of measured steps that decode the same number of sequences,
since what a guess costs depends on it. k is where gain(k) is largest; where that is less than a few percent, nothing
is guessed. A trial of three steps with one guess follows after 64 steps, later and later as long as it finds the same,
and never so often that trials take more than a fiftieth of the time.

Only speed depends on the clock: no token does.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from statistics import median

from fettle.engine.sequence import Sequence
from fettle.errors import UsageError

LEAST_GAIN = 1.05
TRIAL_STEPS = 3  # the first also reads what a draft model has missed, and is not timed
FIRST_PAUSE = 64  # plain steps between trials, at least
TRIALS_SHARE = 0.02  # of the time, for trials that found nothing
REFRESH = 64  # a plain step after so many with guesses, so that its seconds stay known
TIMED = 15  # steps that a median is of
DECAY, PRIOR = 0.9, 4.0  # how fast a sequence's own counts fade; how many counts the others' weigh


@dataclass
class _Size:
    """What is known of steps with so many sequences."""

    plain: deque[float] = field(default_factory=lambda: deque(maxlen=TIMED))
    costs: deque[float] = field(default_factory=lambda: deque(maxlen=TIMED))  # of a guess, in plain steps
    trial: int = TRIAL_STEPS
    pause: int = FIRST_PAUSE
    waited: int = 0
    wasted: float = 0.0  # by the trial under way, in plain steps
    guessed_steps: int = 0
    untimed: bool = True  # the next step with guesses catches up


@dataclass
class _Counts:
    right: float = 0.0
    tried: float = 0.0


class Payoff:
    """Chooses how many tokens to guess.

    Attributes:
        most: the largest k.
        guessed, accepted: tokens, in all.
    """

    def __init__(self, most: int = 4) -> None:
        if most < 1:
            raise UsageError(f"{most} tokens cannot be guessed at once; give at least 1, or no drafter")
        self.most = most
        self.guessed = self.accepted = 0
        self._all = _Counts(right=0.5, tried=1.0)
        self._own: dict[int, _Counts] = defaultdict(_Counts)
        self._sizes: dict[int, _Size] = defaultdict(_Size)
        self._rows = 1

    def begin(self, rows: int) -> None:
        """A step with so many decoding sequences is about to be planned."""
        self._rows = rows

    def wanted(self, sequence: Sequence) -> int:
        """How many tokens to guess for a sequence in this step."""
        size = self._sizes[self._rows]
        if len(size.plain) < 2 or size.guessed_steps >= REFRESH:
            return 0
        if size.trial > 0:
            return 1
        return self._best(self._rate(sequence), median(size.costs) if size.costs else 0.0)

    def observe(self, seconds: float, guesses: int) -> None:
        """A step of nothing but decoding took so long, with so many guesses for all sequences together."""
        size = self._sizes[self._rows]
        if guesses == 0:
            size.plain.append(seconds)
            size.guessed_steps = 0
            size.untimed = True
            if size.trial == 0:
                size.waited += 1
                if size.waited >= size.pause:
                    size.trial, size.waited = TRIAL_STEPS, 0
            return
        size.guessed_steps += 1
        size.waited = 0
        if not size.plain:
            return
        plain = median(size.plain)
        if not size.untimed:
            size.costs.append(max(0.0, seconds - plain) / plain * self._rows / guesses)
        size.untimed = False
        if size.trial > 0:
            size.wasted += max(0.0, seconds / plain - 1)
            self._end_trial(size)

    def _end_trial(self, size: _Size) -> None:
        """Judges a trial when it is over, or as soon as no guess could ever pay."""
        cost = median(size.costs) if size.costs else 0.0
        size.trial = 0 if cost > 1 else size.trial - 1
        if size.trial == 0:
            pays = self._best(self._shared_rate(), cost) > 0
            size.pause = FIRST_PAUSE if pays else max(2 * size.pause, round(size.wasted / TRIALS_SHARE))
            size.wasted = 0.0

    def count(self, sequence: Sequence, guessed: int, accepted: int) -> None:
        """So many of a sequence's guesses were right, up to the first wrong one."""
        if guessed == 0:
            return
        self.guessed += guessed
        self.accepted += accepted
        tried = accepted + (accepted < guessed)  # what stands behind a wrong guess was never tried
        for counts, decay in ((self._own[sequence.number], DECAY), (self._all, 1 - (1 - DECAY) / 8)):
            counts.right = counts.right * decay + accepted
            counts.tried = counts.tried * decay + tried

    def forget(self, sequence: Sequence) -> None:
        """The sequence is done."""
        self._own.pop(sequence.number, None)

    def _shared_rate(self) -> float:
        return self._all.right / self._all.tried

    def _rate(self, sequence: Sequence) -> float:
        own = self._own[sequence.number]
        return (own.right + PRIOR * self._shared_rate()) / (own.tried + PRIOR)

    def _best(self, rate: float, cost: float) -> int:
        gains = [gain(rate, cost, k) for k in range(self.most + 1)]
        best = max(range(self.most + 1), key=gains.__getitem__)
        return best if gains[best] >= LEAST_GAIN else 0


def gain(rate: float, cost: float, guesses: int) -> float:
    """Tokens a plain step's time, for guesses that are right with probability `rate` and cost `cost` steps each."""
    tokens = sum(rate**power for power in range(guesses + 1))
    return tokens / (1 + cost * guesses)
