"""Guessing changes no token, keeps the distribution, counts what was right, and stops where it does not pay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Listed
from dataclasses import dataclass

import numpy as np
import pytest

from fettle.engine.engine import Engine
from fettle.engine.payoff import AHEAD, SHARE, Payoff, gain
from fettle.engine.runner import Batch
from fettle.engine.sampler import Sampling, probabilities
from fettle.engine.scheduler import SchedulerOptions, Work
from fettle.engine.sequence import Request, Sequence
from fettle.engine.speculative import Drafter, DraftModel, PromptLookup, Rehearsal, scratch_pages
from fettle.errors import UsageError

from .guessing import Always
from .recall import EMPTY, VOCAB, Recall


class Blurred(Recall):
    """The same model with some noise: a draft that is often right."""

    blur = 0.5

    def logits(self, context: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(len(context) + int(context.sum())).standard_normal(VOCAB)
        return (super().logits(context) + self.blur * noise).astype(np.float32)


def requests(count: int = 6) -> list[Request]:
    return [
        Request(
            prompt=tuple((n * k) % VOCAB for k in range(3 + 5 * n)),
            max_tokens=6 + 4 * n,
            sampling=Sampling(
                temperature=n % 3, top_k=9 if n == 5 else None, repetition_penalty=1 + 0.1 * (n == 4), seed=n
            ),
        )
        for n in range(count)
    ]


def engine_with(kind: str, pages: int, most: int = 4) -> Engine:
    model = Recall(pages=pages, page_size=4)
    draft = Blurred(pages=pages + scratch_pages(4), page_size=4)
    drafter = {"none": None, "lookup": PromptLookup(longest=2, shortest=1), "draft": DraftModel(draft, model)}[kind]
    payoff = Always(most) if drafter is not None else None
    return Engine(model, options=SchedulerOptions(max_sequences=4, max_step_tokens=32), drafter=drafter, payoff=payoff)


@pytest.mark.parametrize("pages", [16, 80])
@pytest.mark.parametrize("kind", ["lookup", "draft"])
def test_guessing_changes_no_token_greedy_or_sampled(kind: str, pages: int) -> None:
    wanted = [made.tokens for made in engine_with("none", 80).generate(requests())]
    engine = engine_with(kind, pages)
    assert [made.tokens for made in engine.generate(requests())] == wanted
    assert engine.payoff is not None and engine.payoff.guessed > 20
    assert engine.scheduler.cache.free_pages == pages
    assert (engine.scheduler.preemptions > 0) == (pages == 16)


def test_right_guesses_save_steps_and_are_counted() -> None:
    request = Request(prompt=(1, 2, 3), max_tokens=40)
    model = Recall(pages=40, page_size=4)
    perfect = DraftModel(Recall(pages=40 + scratch_pages(4), page_size=4), model)
    engine = Engine(model, drafter=perfect, payoff=Always(4))
    assert engine.generate([request])[0].tokens == model.alone((1, 2, 3), 40)
    assert engine.payoff is not None and engine.payoff.guessed == engine.payoff.accepted == 31
    assert model.calls == 1 + 8  # the prompt gives one token, eight steps five each, the last one fewer


def test_sampled_guessing_keeps_the_distribution() -> None:
    """The third token of many seeds, against the exact distribution summed over the two before it."""
    sampling = Sampling(temperature=1.0)
    model = Recall(pages=400, page_size=4, sharpness=1.5)
    engine = Engine(
        model,
        options=SchedulerOptions(max_sequences=32),
        drafter=DraftModel(Blurred(pages=400 + scratch_pages(4), page_size=4, sharpness=1.5), model),
        payoff=Always(3),
    )
    first = probabilities(model.logits(np.array([5])), sampling)
    second = np.array([probabilities(model.logits(np.array([5, a])), sampling) for a in range(VOCAB)])
    wanted = first @ second
    count = 700
    made = engine.generate(
        Request(prompt=(5,), max_tokens=2, sampling=Sampling(temperature=1.0, seed=seed)) for seed in range(count)
    )
    found = Counter(completion.tokens[1] for completion in made)
    # max_tokens 2 leaves no room to guess behind the first token: ask for the second through a longer completion
    longer = engine.generate(
        Request(prompt=(5,), max_tokens=5, sampling=Sampling(temperature=1.0, seed=seed)) for seed in range(count)
    )
    guessed = Counter(completion.tokens[1] for completion in longer)
    assert guessed == found
    statistic = sum((guessed[token] - count * p) ** 2 / (count * p) for token, p in enumerate(wanted))
    assert statistic < 49.73  # 23 degrees of freedom, p = 0.001
    assert engine.payoff is not None and 0.3 < engine.payoff.accepted / engine.payoff.guessed < 0.95


def sequence_of(tokens: list[int]) -> Sequence:
    return Sequence(number=0, request=Request(prompt=tuple(tokens)), limit=64, ends=frozenset())


def test_look_up_finds_the_longest_and_newest_place() -> None:
    lookup = PromptLookup(longest=3, shortest=2)
    tokens = [1, 2, 3, 9, 8, 2, 3, 7, 6, 1, 2, 3]
    assert lookup.propose([Work(sequence_of(tokens), 1, 2)]) == [[9, 8]]
    assert PromptLookup(longest=2, shortest=2).propose([Work(sequence_of(tokens), 1, 2)]) == [[7, 6]]
    assert lookup.propose([Work(sequence_of(tokens), 1, 0)]) == [[]]
    assert PromptLookup().propose([Work(sequence_of([1, 2, 3, 4]), 1, 4)]) == [[]]
    assert PromptLookup().propose([Work(sequence_of([5, 6, 5, 6, 5, 6]), 1, 5)]) == [[5, 6, 5, 6, 5]]


def test_look_up_is_silent_where_no_pair_stood_before() -> None:
    lookup, sequence = PromptLookup(longest=3, shortest=2), sequence_of([1, 2, 3])
    said = []
    for token in (4, 1, 2, 3, 9, 4):
        sequence.tokens.append(token)
        said.append(lookup.silent(sequence))
        assert said[-1] == (lookup.propose([Work(sequence, 1, 2)]) == [[]])
    assert said == [True, True, False, False, True, True]


def test_drafts_of_another_vocabulary_or_cache_are_refused() -> None:
    model = Recall(pages=4, page_size=4)
    with pytest.raises(UsageError, match="open it with 12 pages of 4 tokens"):
        DraftModel(Recall(pages=4, page_size=4), model)
    other = Recall(pages=4, page_size=4)
    object.__setattr__(other.shape, "vocab_size", 99)
    with pytest.raises(UsageError, match="same vocabulary"):
        DraftModel(other, model)
    with pytest.raises(UsageError, match="1 ≤ shortest ≤ longest"):
        PromptLookup(longest=1, shortest=2)
    with pytest.raises(UsageError, match="0 tokens cannot be guessed"):
        Payoff(0)


def test_gain_is_leviathans_formula() -> None:
    assert gain(0.8, 0.1, 3) == pytest.approx((1 - 0.8**4) / (1 - 0.8) / (1 + 0.1 * 3))
    assert gain(0.0, 0.5, 2) == 0.5
    assert gain(1.0, 0.0, 4) == 5


@dataclass
class Planted:
    """A drafter of known costs, in plain steps, and what its rehearsals say."""

    drafting: float = 0.0
    entry: float = 0.0
    rehearsal: float = 0.0
    said: float = 0.0
    entered: bool = False

    def silent(self, sequence: Sequence) -> bool:
        return False

    def propose(self, works: Listed[Work]) -> list[list[int]]:
        raise AssertionError("the simulation guesses for itself")

    def rehearse(self, sequence: Sequence, seconds: float) -> Rehearsal:
        if self.rehearsal == 0 or self.rehearsal > seconds:
            return Rehearsal()
        return Rehearsal(right=round(16 * self.said), tried=16, seconds=self.rehearsal)

    def guess_seconds(self, rows: int) -> float:
        return self.drafting

    def entry_seconds(self, sequence: Sequence) -> float:
        return 0.0 if self.entered else self.entry

    def forget(self, sequence: Sequence) -> None:
        self.entered = False


def generation(
    payoff: Payoff, drafter: Planted, *, number: int, length: int, rate: float, checking: float, noise: float = 0.0
) -> tuple[float, int]:
    """(seconds over those of plain steps, guesses) of so many tokens; a plain step takes a second."""
    chosen = np.random.default_rng(number)
    sequence = Sequence(number=number, request=Request(prompt=(1,)), limit=length, ends=frozenset())
    seconds, guesses = 0.0, 0
    while sequence.made_count < length:
        if payoff.rests([sequence], drafter):
            sequence.tokens.append(1)
            seconds += 1 + noise * chosen.standard_normal()
            continue
        before = payoff.balance
        payoff.begin(1)
        k = payoff.wanted(sequence, drafter)
        if payoff.balance < before and sequence.made_count > 0:
            seconds += before - payoff.balance  # a rehearsal
        k = min(k, length - sequence.made_count - 1)
        right = next((i for i in range(k) if chosen.random() >= rate), k)
        blur = 1 + noise * chosen.standard_normal()
        drafted = (drafter.drafting * k + (0 if drafter.entered or k == 0 else drafter.entry)) * blur
        checked = (1 + checking * k) * blur
        drafter.entered |= k > 0
        payoff.observe(drafted, checked, k)
        payoff.count(sequence, k, right)
        sequence.tokens.extend([1] * (right + 1))
        seconds, guesses = seconds + drafted + checked, guesses + k
    payoff.forget(sequence)
    drafter.forget(sequence)
    return seconds / length, guesses


COSTS = [(0.0, 0.1), (0.0, 0.3), (0.0, 0.9), (0.1, 0.1), (0.3, 0.3), (0.9, 0.2), (2.0, 1.0)]


@pytest.mark.parametrize("said", [0.0, 1.0])
@pytest.mark.parametrize(("drafting", "checking"), COSTS)
@pytest.mark.parametrize("length", [96, 128, 256])
def test_wrong_guesses_cost_a_generation_under_three_percent(
    drafting: float, checking: float, length: int, said: float
) -> None:
    """Every guess is wrong, whatever rehearsals say; each of five generations holds the formula's bound."""
    payoff = Payoff(4)
    drafter = Planted(drafting=drafting, rehearsal=0.9 if drafting else 0.0, said=said)
    for number in range(5):
        took, _ = generation(payoff, drafter, number=number, length=length, rate=0.0, checking=checking)
        assert took - 1 <= AHEAD / length + SHARE + 1e-9 < 0.03


@pytest.mark.parametrize(("rate", "drafting", "checking"), [(0.1, 0.3, 0.3), (0.3, 0.2, 0.3), (0.5, 0.6, 0.4)])
@pytest.mark.parametrize("honest", [False, True])
def test_what_hardly_pays_costs_under_three_percent_with_noise(
    rate: float, drafting: float, checking: float, honest: bool
) -> None:
    for seed in range(20):
        payoff = Payoff(4)
        drafter = Planted(drafting=drafting, rehearsal=1.0, said=rate if honest else 0.9, entry=0.5)
        took, _ = generation(payoff, drafter, number=seed, length=96, rate=rate, checking=checking, noise=0.05)
        assert took < 1.03 * (1 + 0.05 * 3 / 96**0.5)  # three deviations of the planted noise


def test_a_draft_as_slow_as_the_model_is_never_asked() -> None:
    payoff, drafter = Payoff(4), Planted(drafting=1.0, rehearsal=0.1, said=1.0)
    assert generation(payoff, drafter, number=0, length=256, rate=1.0, checking=0.0) == (1.0, 0)


def test_reading_on_credit_needs_evidence_and_a_long_way_to_go() -> None:
    """Ten steps to read the prompt: never without a rehearsal, and not where twenty tokens are left."""
    unknown = Planted(drafting=0.1, entry=10.0)
    assert generation(Payoff(4), unknown, number=0, length=256, rate=0.9, checking=0.1)[1] == 0
    known = Planted(drafting=0.1, entry=10.0, rehearsal=0.5, said=0.9)
    assert generation(Payoff(4), known, number=0, length=20, rate=0.9, checking=0.1)[1] == 0
    took, guesses = generation(Payoff(4), known, number=0, length=256, rate=0.9, checking=0.1)
    assert guesses > 100 and took < 0.65


@pytest.mark.parametrize(("rate", "drafting", "checking"), [(0.9, 0.0, 0.1), (0.8, 0.0, 0.3), (0.9, 0.1, 0.1)])
def test_what_pays_is_used_and_remembered(rate: float, drafting: float, checking: float) -> None:
    payoff, drafter = Payoff(4), Planted(drafting=drafting, rehearsal=0.5 if drafting else 0.0, said=rate)
    best = max(gain(rate, drafting + checking, k) for k in range(5))
    first, _ = generation(payoff, drafter, number=0, length=256, rate=rate, checking=checking)
    later, _ = generation(payoff, drafter, number=1, length=256, rate=rate, checking=checking)
    assert 1 / first > 0.8 * best
    assert 1 / later > 0.87 * best


class Ticking(Blurred):
    """A model whose runs take as long as is planted, on a clock that it moves."""

    def __init__(self, clock: list[float], step: float, token: float, **sizes: int) -> None:
        super().__init__(**sizes)
        self.clock, self.step, self.token = clock, step, token

    def run(self, batch: Batch) -> np.ndarray:
        self.clock[0] += self.step + self.token * len(batch.tokens)
        return super().run(batch)


def ticking_seconds(
    drafter: str | None, *, step: float = 0.1, blur: float, requests: int = 2, length: int = 96
) -> tuple[list[float], Payoff | None]:
    """Seconds that each of some requests decodes, by the engine's own account; the model takes 0.8 + 0.2 a token."""
    clock = [0.0]
    model = Ticking(clock, 0.8, 0.2, pages=80, page_size=4)
    model.blur = 0.0
    guesser: Drafter | None = None
    if drafter == "draft":
        draft = Ticking(clock, step, 0.2 * step, pages=80 + scratch_pages(4), page_size=4)
        draft.blur = blur
        guesser = DraftModel(draft, model, lambda: clock[0])
    elif drafter == "lookup":
        guesser = PromptLookup(longest=1, shortest=1)
    engine = Engine(model, drafter=guesser, clock=lambda: clock[0])
    made = [
        engine.generate([Request(prompt=tuple(range(1 + n, 11 + n)), max_tokens=length, ignore_end=True)])[0]
        for n in range(requests)
    ]
    return [each.decode_seconds for each in made], engine.payoff


@pytest.mark.parametrize(("drafter", "step", "blur"), [("lookup", 0, 0), ("draft", 0.1, 50), ("draft", 0.4, 50)])
@pytest.mark.parametrize("length", [96, 128])
def test_the_engine_holds_the_bound_on_a_planted_clock(drafter: str, step: float, blur: float, length: int) -> None:
    plain, _ = ticking_seconds(None, blur=0, length=length)
    guessing, payoff = ticking_seconds(drafter, step=step, blur=blur, length=length)
    assert payoff is not None
    assert all(took <= 1.03 * alone for took, alone in zip(guessing, plain, strict=True))


def test_the_engine_uses_a_good_draft_and_leaves_a_slow_one() -> None:
    plain, _ = ticking_seconds(None, blur=0)
    good, payoff = ticking_seconds("draft", step=0.05, blur=0.0)
    assert payoff is not None and payoff.accepted > 100
    assert good[1] < 0.6 * plain[1]
    slow, payoff = ticking_seconds("draft", step=1.0, blur=0.0)
    assert payoff is not None and payoff.guessed == 0
    assert slow == pytest.approx(plain)


def test_a_rehearsal_says_what_would_have_been_guessed_and_disturbs_nothing() -> None:
    """A perfect draft is right everywhere its context reaches back far enough; what it holds stays as it was."""
    model = Recall(pages=20, page_size=4)
    draft = Recall(pages=20 + scratch_pages(4), page_size=4)
    drafter = DraftModel(draft, model, iter(range(1000)).__next__)
    sequence = sequence_of([5])
    sequence.tokens.extend(model.alone((5,), 30))
    before = draft.slots[:20].copy()
    assert drafter.rehearse(sequence, 0.0) == Rehearsal()
    said = drafter.rehearse(sequence, 100.0)
    assert said.tried == 16 and said.seconds == 1
    assert (draft.slots[:20] == before).all() and (draft.slots[20:] != EMPTY).any()
    whole = sequence_of([5])
    whole.tokens.extend(model.alone((5,), 23))
    assert drafter.rehearse(whole, 100.0).right == 15  # 23 of 24 tokens are read: all but the first are seen whole


def test_look_up_rehearses_made_tokens_once() -> None:
    lookup, sequence = PromptLookup(longest=2, shortest=1), sequence_of([1, 2, 3, 1])
    sequence.tokens.extend([2, 3, 9])
    assert lookup.rehearse(sequence, 0.0) == Rehearsal(right=2, tried=3)
    assert lookup.rehearse(sequence, 0.0) == Rehearsal()
    assert lookup.propose([Work(sequence, 1, 1)]) == [[]]
    sequence.tokens.append(1)
    assert lookup.rehearse(sequence, 0.0) == Rehearsal(right=0, tried=0)
    assert lookup.propose([Work(sequence, 1, 2)]) == [[2, 3]]


def test_the_payoff_itself_changes_no_token() -> None:
    wanted = [made.tokens for made in engine_with("none", 80).generate(requests())]
    model = Recall(pages=80, page_size=4)
    ticks = iter(np.random.default_rng(0).random(10**5).cumsum())
    engine = Engine(
        model, drafter=PromptLookup(longest=1, shortest=1), payoff=Payoff(3), clock=lambda: float(next(ticks))
    )
    assert [made.tokens for made in engine.generate(requests())] == wanted


class Reluctant(Planted):
    """As slow as the model, or silent; notes after how many tokens it is asked what it costs."""

    def __init__(self, *, nothing: bool) -> None:
        super().__init__(drafting=1.0)
        self.nothing, self.asked = nothing, list[int]()

    def silent(self, sequence: Sequence) -> bool:
        return self.nothing

    def guess_seconds(self, rows: int) -> float:
        self.asked.append(rows)
        return super().guess_seconds(rows)


def step_of(payoff: Payoff, sequence: Sequence, drafter: Drafter) -> bool:
    """A step without guesses; whether it was one of a rest."""
    rests = payoff.rests([sequence], drafter)
    if not rests:
        payoff.begin(1)
        assert payoff.wanted(sequence, drafter) == 0
        payoff.observe(0.0, 1.0, 0)
        payoff.count(sequence, 0, 0)
    return rests


@pytest.mark.parametrize(
    ("silent", "awake"), [(False, [0, 1, 2, 5, 10, 19, 36, 53, 70, 87]), (True, [0, 1, 2, 19, 36, 53, 70, 87])]
)
def test_a_resting_step_asks_nothing_and_pays_in(silent: bool, awake: list[int]) -> None:
    payoff, drafter = Payoff(4), Reluctant(nothing=silent)
    payoff.balance = 0.0
    sequence = sequence_of([1])
    assert [made for made in range(100) if not step_of(payoff, sequence, drafter)] == awake
    assert len(drafter.asked) == len(awake) - 2  # what a plain step takes has to be known first
    payoff.begin(1)
    assert payoff.balance == pytest.approx(100 * SHARE)


@pytest.mark.parametrize("change", ["none", "one comes", "one is done", "nobody is left"])
def test_a_rest_ends_where_a_request_comes_or_goes(change: str) -> None:
    payoff, sequence, drafter = Payoff(4), sequence_of([1, 2]), Reluctant(nothing=False)
    while step_of(payoff, sequence, drafter) or len(drafter.asked) < 5:
        pass
    assert step_of(payoff, sequence, drafter)
    if change == "one is done":
        payoff.forget(sequence)
    running = {"one comes": [sequence, sequence_of([3])], "nobody is left": []}.get(change, [sequence])
    assert payoff.rests(running, drafter) == (change == "none")


def test_a_rest_that_has_not_begun_ends_as_well() -> None:
    """A request that comes between the step that asked for a rest and the first step of it is asked about."""
    payoff, sequence, drafter = Payoff(4), sequence_of([1, 2]), Reluctant(nothing=False)
    while step_of(payoff, sequence, drafter) or len(drafter.asked) < 5:
        pass
    payoff.begin(1)  # a request waits: the step is not a resting one
    asked = len(drafter.asked)
    step_of(payoff, sequence, drafter)
    assert len(drafter.asked) > asked


def test_idle_steps_pay_nothing_in() -> None:
    payoff, drafter = Payoff(4), Reluctant(nothing=False)
    before = payoff.balance
    assert not any(payoff.rests([], drafter) for _ in range(100))
    payoff.begin(0)
    assert payoff.balance == before
