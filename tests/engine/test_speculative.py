"""Guessing changes no token, keeps the distribution, counts what was right, and stops where it does not pay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fettle.engine.engine import Engine
from fettle.engine.payoff import Payoff, gain
from fettle.engine.sampler import Sampling, probabilities
from fettle.engine.scheduler import SchedulerOptions, Work
from fettle.engine.sequence import Request, Sequence
from fettle.engine.speculative import DraftModel, PromptLookup
from fettle.errors import UsageError

from .recall import VOCAB, Recall


class Always(Payoff):
    """Guesses as many as allowed in every step."""

    def wanted(self, sequence: Sequence) -> int:
        return self.most


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
    draft = Blurred(pages=pages, page_size=4)
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
    perfect = DraftModel(Recall(pages=40, page_size=4), model)
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
        drafter=DraftModel(Blurred(pages=400, page_size=4, sharpness=1.5), model),
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


def test_drafts_of_another_vocabulary_or_cache_are_refused() -> None:
    model = Recall(pages=4, page_size=4)
    with pytest.raises(UsageError, match="open both alike"):
        DraftModel(Recall(pages=5, page_size=4), model)
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


def simulate(rate: float, cost: float, steps: int, *, seed: int = 0) -> tuple[float, float]:
    """(tokens a plain step's time, share of steps with guesses) for guesses that are right and cost as given."""
    chosen = np.random.default_rng(seed)
    payoff, sequence = Payoff(4), sequence_of([1])
    seconds = tokens = guessing = 0.0
    for _ in range(steps):
        payoff.begin(1)
        k = payoff.wanted(sequence)
        right = next((i for i in range(k) if chosen.random() > rate), k)
        took = (1 + cost * k) * (1 + 0.05 * chosen.standard_normal())
        payoff.count(sequence, k, right)
        payoff.observe(took, k)
        seconds, tokens, guessing = seconds + took, tokens + 1 + right, guessing + (k > 0)
    return tokens / seconds, guessing / steps


@pytest.mark.parametrize(("rate", "cost"), [(0.0, 0.3), (0.1, 0.6), (0.3, 0.5), (0.5, 1.0)])
def test_what_does_not_pay_is_switched_off_and_costs_under_three_percent(rate: float, cost: float) -> None:
    speed, guessing = simulate(rate, cost, 1000)
    assert speed > 0.97
    assert 0 < guessing < 0.05


@pytest.mark.parametrize(("rate", "cost"), [(0.9, 0.1), (0.8, 0.05), (0.95, 0.3)])
def test_what_pays_is_used(rate: float, cost: float) -> None:
    speed, guessing = simulate(rate, cost, 1000)
    best = max(gain(rate, cost, k) for k in range(5))
    assert speed > 0.93 * best
    assert guessing > 0.9


def test_the_payoff_itself_changes_no_token() -> None:
    wanted = [made.tokens for made in engine_with("none", 80).generate(requests())]
    model = Recall(pages=80, page_size=4)
    ticks = iter(np.random.default_rng(0).random(10**5).cumsum())
    engine = Engine(
        model, drafter=PromptLookup(longest=1, shortest=1), payoff=Payoff(3), clock=lambda: float(next(ticks))
    )
    assert [made.tokens for made in engine.generate(requests())] == wanted
