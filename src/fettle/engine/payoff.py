"""How many tokens to guess, measured while the engine runs, and a bound on what guessing costs where it does not pay.

    gain(k) = (1 - a^(k+1)) / ((1 - a) · (1 + c·k))       a: a guess is right; c = drafting + checking, in plain steps

(Leviathan et al. 2023, theorem 3.8, with a guess's share of checking in c.) k is where gain(k) is largest; where that
is less than a few percent, nothing is guessed. What goes in is known before the first guess, as far as it can be:

- drafting: a draft model times its steps when it is opened, so one that is no faster than the model is never asked;
- a: the drafter *rehearses*, which says how many of the tokens that were made without guesses it would have guessed.
  Prompt look-up knows that for nothing; a draft model reads the last two dozen tokens in one call;
- checking: the median of steps with guesses and of two that nobody saw, with a third of a plain step for each guess.

What is known is the engine's, so later requests begin with it. None of it is certain, so there is an account, in
plain steps: a step with guesses costs its time less a plain step and earns a plain step for each right guess, a
rehearsal costs its time, every step pays in `SHARE`, and a new sequence starts with `AHEAD` at most. Nothing is guessed
that the account could not pay if all of it were wrong. So n tokens that take n plain steps alone take at most
n + AHEAD + SHARE·n, whatever the estimates of a say: 2.6% more for 96 tokens, 1.6% for 256.

A step that something else held up is charged twice what was feared, not more: it would have been held up without
guesses too. What a guess costs is forgotten bit by bit while nothing is guessed, so that it is tried again.

Looking whether to guess takes Python some hundredths of a short step. So where no sequence is to guess, nothing is
looked at for 2 steps, then 4, up to `LONGEST_REST`: a resting step is a plain engine's but for a counter. A step for
which the drafter has no guess at all is one too. What they pay in is settled afterwards. Requests that come or go end a
rest.

Beside the account there is a loan: a draft model that has not read a sequence yet may read it on credit, where guesses
are known to pay and would earn twice of all that is lent by the end. What the account has above `AHEAD` pays it back.
A sequence that ends early leaves a debt, and then the next one has to be worth both.

Only speed depends on the clock: no token does.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection
from dataclasses import dataclass, field
from statistics import median_low

from fettle.engine.sequence import Sequence
from fettle.engine.speculative import Drafter
from fettle.errors import UsageError

LEAST_GAIN = 1.05
SHARE = 0.01  # of every step, for guesses that may turn out wrong
AHEAD = 1.5  # plain steps that a sequence may be behind before it has paid anything in
BEST_RATE = 0.95  # no draft is right more often: what does not pay with that is not rehearsed
FIRST_CHECKING, MOST_CHECKING = 0.3, 1.0  # of a guess, in plain steps, before some are measured: expected, and feared
UNSEEN = 2  # steps with guesses that count as measured before there are any
FIRST_PAUSE, LONGEST_PAUSE = 64, 1024  # plain steps between rehearsals that cost something
FIRST_FADE = 16  # plain steps until costs are forgotten but for the newest; twice as many each time, up to the longest
ASKED_AGAIN = 4  # steps until a drafter is asked again that had too little to rehearse
EVIDENCE = 8  # rehearsed or real guesses, before a sequence is read on credit
NONE_KNOWN = -1  # number of requests: whatever comes ends a rest
LONGEST_REST = 16  # steps in which nothing is looked at
LONGEST_SILENCE = 16  # steps of which nothing is told: then one is timed again
REFRESH = 32  # a plain step after so many with guesses, so that its seconds stay known
TIMED = 15  # steps that a median is of
DECAY, PRIOR = 0.9, 4.0  # how fast a sequence's own counts fade; how many counts the others' weigh


@dataclass
class _Size:
    """What is known of steps with so many sequences."""

    steps: deque[float] = field(default_factory=lambda: deque(maxlen=TIMED))  # seconds without guesses
    checks: deque[float] = field(default_factory=lambda: deque(maxlen=TIMED))  # of a guess a row, in plain steps
    plain: float | None = None  # median of steps, from the second on
    checking: float | None = None  # median of checks and of those unseen; None without any
    guessed_steps: int = 0  # since the last one without
    waited: int = 0  # steps without guesses since the last one with, or since a cost was forgotten
    pause: int = FIRST_FADE

    def check(self, cost: float) -> None:
        """A guess took so many plain steps to check."""
        self.checks.append(cost)
        self.guessed_steps += 1
        self.waited, self.pause = 0, FIRST_FADE if cost < MOST_CHECKING else self.pause
        self._look()

    def fade(self, steps: int) -> None:
        """So many steps without guesses."""
        self.guessed_steps = 0
        self.waited += steps
        if self.checks and self.waited >= self.pause:
            while len(self.checks) > 1:
                self.checks.popleft()
            self.waited, self.pause = 0, min(2 * self.pause, LONGEST_PAUSE)
            self._look()

    def _look(self) -> None:
        self.checking = median_low([*self.checks, *[FIRST_CHECKING] * UNSEEN]) if self.checks else None


@dataclass
class _Counts:
    right: float = 0.0
    tried: float = 0.0

    def add(self, right: int, tried: int, decay: float) -> None:
        self.right, self.tried = self.right * decay + right, self.tried * decay + tried


@dataclass
class _Own(_Counts):
    """Of one sequence."""

    guessed: bool = False  # its newest tokens were counted as guesses: no rehearsal may count them again


class Payoff:
    """Chooses how many tokens to guess.

    Attributes:
        most: the largest k.
        guessed, accepted: tokens, in all.
        balance: of the account, in plain steps.
        loan: what was lent and not paid back yet, in plain steps.
    """

    def __init__(self, most: int = 4) -> None:
        if most < 1:
            raise UsageError(f"{most} tokens cannot be guessed at once; give at least 1, or no drafter")
        self.most = most
        self.guessed = self.accepted = 0
        self.balance, self.loan = AHEAD, 0.0
        self._all = _Counts(right=0.5, tried=1.0)
        self._own: dict[int, _Own] = {}
        self._sizes: dict[int, _Size] = defaultdict(_Size)
        self._rows = 1
        self._promised, self._longest = 0.0, 0  # what this step's guesses may cost so far; the largest k among them
        self._lent = 0.0  # in this step
        self._pause, self._waited = FIRST_PAUSE, FIRST_PAUSE  # the first rehearsal is due at once
        self._requests = NONE_KNOWN  # that ran in the newest step of which something was told
        self._dull = 0  # sequences for which there is nothing to guess in this step, nor soon
        self._longest_rest = LONGEST_REST  # behind this step
        self._left, self._rest = 0, 1  # steps of a rest: to come, and in all
        self._owed = 0  # steps of which nothing was told, which are not settled yet

    def rests(self, sequences: Collection[Sequence], drafter: Drafter) -> bool:
        """Whether the next step of all unfinished sequences, these, is a plain one; then no more is told of it."""
        if not sequences:  # an idle step pays nothing in
            return False
        if len(sequences) == self._requests and self._owed < LONGEST_SILENCE:
            if self._left > 0:
                self._left -= 1
                self._owed += 1
                return True
            if all(sequence.missing == 1 and drafter.silent(sequence) for sequence in sequences):
                self._owed += 1
                return True
        self._requests = len(sequences) if self._sizes[self._rows].plain is not None else NONE_KNOWN
        return False

    def begin(self, rows: int) -> None:
        """A step with so many decoding sequences is about to be planned."""
        if self._owed:
            self._settle()
        self._left = 0  # a rest that has not begun ends here as well
        self._rows = max(1, rows)
        self._promised, self._longest, self._lent = 0.0, 0, 0.0
        self._dull, self._longest_rest = 0, LONGEST_REST

    def wanted(self, sequence: Sequence, drafter: Drafter) -> int:
        """How many tokens to guess for a sequence in this step."""
        own = self._own.get(sequence.number)
        if own is None:
            own = self._own[sequence.number] = _Own()
            self.balance = min(self.balance, AHEAD)
        size = self._sizes[self._rows]
        if size.plain is None:
            return 0
        drafting = drafter.guess_seconds(self._rows) / size.plain
        if drafting >= 1:  # never, not even if every guess were right
            self._dull += 1
            return 0
        checking = self._checking(size)
        expected = drafting + checking
        self._rehearse(sequence, own, drafter, size.plain, expected)
        if size.guessed_steps >= REFRESH:
            return 0
        count = min(best_guesses(self._rate(own), expected, self.most), 1 + int(own.right))
        entry = drafter.entry_seconds(sequence) / size.plain if count else 0.0
        feared = max(checking, MOST_CHECKING if len(size.checks) <= UNSEEN else 0.0) / self._rows
        short = AHEAD
        while count:
            cost = drafting * max(0, count - self._longest) + feared * count
            left = self.balance - self._promised - cost
            on_credit = left >= 0 and entry > 0 and self._lends(entry, sequence, expected)
            if left >= entry or on_credit:
                self._promised += cost + (0.0 if on_credit else entry)
                self._lent += entry if on_credit else 0.0
                self._longest = max(self._longest, count)
                return count
            count -= 1
            short = entry - left
        self._dull += 1
        self._longest_rest = min(self._longest_rest, int(short / SHARE))  # until the account can pay
        return 0

    def observe(self, drafting: float, checking: float, guesses: int) -> None:
        """A step of nothing but decoding: seconds before and in the model's run, guesses for all sequences together."""
        size = self._sizes[self._rows]
        self._pay_in()
        if guesses == 0:
            size.steps.append(drafting + checking)
            size.plain = median_low(size.steps) if len(size.steps) > 1 else None
            size.fade(1)
            self._waited += 1
            if self._dull >= self._rows:
                self._left = self._rest = max(1, min(2 * self._rest, self._longest_rest))
            return
        self._rest = 1
        if size.plain is not None:
            size.check(max(0.0, checking / size.plain - 1) * self._rows / guesses)
            self.loan += self._lent
            self.balance -= min((drafting + checking) / size.plain - 1 - self._lent, 2 * self._promised)

    def count(self, sequence: Sequence, guessed: int, accepted: int) -> None:
        """So many of a sequence's guesses were right, up to the first wrong one."""
        own = self._own.get(sequence.number)
        if own is not None:
            own.guessed = guessed > 0
        if guessed == 0:
            return
        if own is None:
            own = self._own[sequence.number] = _Own(guessed=True)
        self.guessed += guessed
        self.accepted += accepted
        self.balance += accepted / self._rows
        self._note(own, accepted, accepted + (accepted < guessed))  # what stands behind a wrong guess was never tried

    def forget(self, sequence: Sequence) -> None:
        """The sequence is done."""
        self._own.pop(sequence.number, None)
        self._requests = NONE_KNOWN

    def _settle(self) -> None:
        """What steps of which nothing was told pay in and let fade."""
        for _ in range(self._owed):
            self._pay_in()
        self._sizes[self._rows].fade(self._owed)
        self._waited += self._owed
        self._left = self._owed = 0

    def _rehearse(self, sequence: Sequence, own: _Own, drafter: Drafter, plain: float, expected: float) -> None:
        """Asks what would have been guessed: as often as it costs nothing, else now and then, with what there is."""
        due = self._waited >= self._pause and best_guesses(BEST_RATE, expected, self.most) > 0
        allowed = max(0.0, self.balance - self._promised) if due else 0.0
        told = drafter.rehearse(sequence, allowed * plain)
        if told.tried and not own.guessed:
            self._note(own, told.right, told.tried, 1 if told.seconds > 0 else told.tried)
        if told.seconds > 0:
            self.balance -= min(told.seconds / plain, 2 * allowed)
            pays = best_guesses(self._rate(own), expected, self.most) > 0
            self._pause = FIRST_PAUSE if pays else min(2 * self._pause, LONGEST_PAUSE)
            self._waited = 0
        elif due:
            self._waited -= ASKED_AGAIN
            self._longest_rest = ASKED_AGAIN

    def _pay_in(self) -> None:
        """A step's share, which nobody saves, and what was earned pays back what was lent."""
        if self.balance < AHEAD:
            self.balance = min(AHEAD, self.balance + SHARE)
        elif self.loan > 0:
            paid = min(self.loan, self.balance - AHEAD + SHARE)
            self.loan -= paid
            self.balance = max(AHEAD, self.balance - paid)

    def _lends(self, entry: float, sequence: Sequence, expected: float) -> bool:
        """Whether the guesses for this sequence would earn twice what is lent, by a careful look at what is known."""
        known = self._all
        if known.tried < EVIDENCE:
            return False
        rate = known.right / known.tried - 0.5 / known.tried**0.5
        count = best_guesses(rate, expected, self.most)
        remaining = (sequence.limit - sequence.made_count) / self._rows
        return count > 0 and remaining * (1 - 1 / gain(rate, expected, count)) >= 2 * (entry + self.loan + self._lent)

    def _checking(self, size: _Size) -> float:
        """What checking a guess a row costs, in plain steps; of the nearest number of rows where it was measured."""
        if size.checking is not None:
            return size.checking
        if len(self._sizes) == 1:
            return FIRST_CHECKING
        known = {abs(rows - self._rows): other.checking for rows, other in self._sizes.items()}
        return min(((far, cost) for far, cost in known.items() if cost is not None), default=(0, FIRST_CHECKING))[1]

    def _note(self, own: _Own, right: int, tried: int, steps: int = 1) -> None:
        own.add(right, tried, DECAY**steps)
        self._all.add(right, tried, (1 - (1 - DECAY) / 8) ** steps)

    def _rate(self, own: _Own) -> float:
        shared = self._all.right / self._all.tried
        return (own.right + PRIOR * shared) / (own.tried + PRIOR)


def best_guesses(rate: float, cost: float, most: int) -> int:
    """The k up to `most` with the largest gain; 0 where none is worth it. In every step, so it has to be quick."""
    best, largest = 0, 1.0
    tokens = power = 1.0
    for k in range(1, most + 1):
        power *= rate
        tokens += power
        gained = tokens / (1 + cost * k)
        if gained <= largest:  # tokens grow less and less, costs by the same: what falls once goes on falling
            break
        best, largest = k, gained
    return best if largest >= LEAST_GAIN else 0


def gain(rate: float, cost: float, guesses: int) -> float:
    """Tokens a plain step's time, for guesses that are right with probability `rate` and cost `cost` steps each."""
    tokens = sum(rate**power for power in range(guesses + 1))
    return tokens / (1 + cost * guesses)
