"""The scheduler's order and its laws, on a model whose logits show any page that is not what it should be."""

from __future__ import annotations

import gc
import random
import tracemalloc

import pytest

from fettle.engine.engine import Engine
from fettle.engine.scheduler import Scheduler, SchedulerOptions
from fettle.engine.sequence import Request, Sequence
from fettle.engine.speculative import PromptLookup
from fettle.errors import ResourceError, UsageError

from .guessing import Always
from .recall import VOCAB, Recall


def sequence(number: int, prompt: int, count: int) -> Sequence:
    request = Request(prompt=tuple((number + i) % VOCAB for i in range(prompt)), max_tokens=count)
    return Sequence(number=number, request=request, limit=count, ends=frozenset())


def planned(scheduler: Scheduler) -> list[tuple[int, int]]:
    """(number, tokens) of the next step; every sequence that reaches its end draws token 0."""
    plan = scheduler.schedule()
    made = [(work.sequence.number, work.count) for work in plan.work]
    for work in plan.work:
        scheduler.computed(work)
        if work.sequence.missing == 0 and work.sequence.append(0):
            scheduler.finish(work.sequence, "length")
    return made


def scheduler_of(pages: int, size: int, **options: int | bool) -> Scheduler:
    return Scheduler(Recall(pages=pages, page_size=size).shape, SchedulerOptions(**options))


def test_decoding_comes_before_prompts_and_prompts_come_in_chunks() -> None:
    scheduler = scheduler_of(100, 4, max_sequences=4, max_step_tokens=8)
    scheduler.add(sequence(0, 3, 9))
    assert planned(scheduler) == [(0, 3)]
    scheduler.add(sequence(1, 20, 2))
    scheduler.add(sequence(2, 3, 2))
    assert planned(scheduler) == [(0, 1), (1, 7)]
    assert planned(scheduler) == [(0, 1), (1, 7)]
    assert planned(scheduler) == [(0, 1), (1, 6), (2, 1)]
    assert planned(scheduler) == [(0, 1), (1, 1), (2, 2)]
    assert planned(scheduler) == [(0, 1), (2, 1)]


def test_a_finished_sequence_makes_room_at_once() -> None:
    scheduler = scheduler_of(100, 4, max_sequences=1, max_step_tokens=8)
    scheduler.add(sequence(0, 2, 2))
    scheduler.add(sequence(1, 2, 1))
    assert [planned(scheduler) for _ in range(4)] == [[(0, 2)], [(0, 1)], [(1, 2)], []]


def test_the_youngest_gives_up_its_pages_and_the_oldest_never_does() -> None:
    scheduler = scheduler_of(6, 2, max_sequences=3, max_step_tokens=16, reuse_prefixes=False)
    for number in range(3):
        scheduler.add(sequence(number, 2, 10))
    seen: list[list[tuple[int, int]]] = []
    while scheduler.running or scheduler.waiting:
        seen.append(planned(scheduler))
        assert [s.number for s in scheduler.running] == sorted(s.number for s in scheduler.running)
    first = [dict(step).get(0, 0) for step in seen]
    assert first[:10] == [2] + [1] * 9  # never interrupted
    assert scheduler.preemptions > 0
    finished = [max(i for i, step in enumerate(seen) if number in dict(step)) for number in range(3)]
    assert finished == sorted(finished)
    assert scheduler.cache.free_pages == 6


def test_what_never_fits_is_refused() -> None:
    scheduler = scheduler_of(3, 4)
    scheduler.add(sequence(0, 8, 4))
    with pytest.raises(ResourceError, match="9 tokens and 4 new ones do not fit into a cache of 12"):
        scheduler.add(sequence(1, 9, 4))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"max_sequences": 0}, "max_sequences is 0"), ({"max_step_tokens": 3}, "max_step_tokens is 3")],
)
def test_options_that_cannot_be_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        SchedulerOptions(**options).check()


def test_a_prompt_that_is_known_whole_copies_its_last_page() -> None:
    model = Recall(pages=8, page_size=4)
    engine = Engine(model, options=SchedulerOptions(max_sequences=2))
    prompt = tuple(range(8))
    first = engine.generate([Request(prompt=prompt, max_tokens=3)])[0]
    before = model.tokens
    again = engine.generate([Request(prompt=prompt, max_tokens=3)])[0]
    assert again.tokens == first.tokens == model.alone(prompt, 3)
    assert again.reused_tokens == 7
    assert model.tokens - before == 1 + 2


def small_engine(*, guess: bool) -> Engine:
    return Engine(
        Recall(pages=22, page_size=4, context=60),
        options=SchedulerOptions(max_sequences=6, max_step_tokens=24),
        drafter=PromptLookup(longest=2, shortest=1) if guess else None,
        payoff=Always(4) if guess else None,
    )


def churn(engine: Engine, count: int, *, seed: int) -> int:
    """Random requests that share prefixes, in a cache that is too small, some cancelled; how many were checked."""
    chosen = random.Random(seed)
    model = engine.runner
    assert isinstance(model, Recall)
    prefixes = [tuple(chosen.randrange(VOCAB) for _ in range(24)) for _ in range(4)]
    waiting = count
    live: dict[int, Request] = {}
    checked = 0
    while waiting or engine.busy:
        while waiting and len(live) < 9 and chosen.random() < 0.7:
            start = chosen.choice(prefixes)[: chosen.randrange(25)]
            prompt = start + tuple(chosen.randrange(VOCAB) for _ in range(chosen.randrange(1, 8)))
            request = Request(prompt=prompt, max_tokens=chosen.randrange(1, 20))
            live[engine.add(request)] = request
            waiting -= 1
        if live and chosen.random() < 0.06:
            number = chosen.choice(list(live))
            ended = engine.cancel(number)
            assert ended is not None and ended.stopped == "cancelled"
            del live[number]
        for update in engine.step():
            if update.completion is not None:
                request = live.pop(update.number)
                assert update.completion.tokens == model.alone(request.prompt, len(update.completion.tokens))
                assert len(update.completion.tokens) == min(request.max_tokens, 60 - len(request.prompt))
                checked += 1
    return checked


def leaked(engine: Engine) -> int:
    cache = engine.scheduler.cache
    assert all(cache.holders(page) == 0 for page in range(cache.pages))
    return cache.pages - cache.free_pages


@pytest.mark.parametrize("guess", [False, True])
def test_random_requests_and_cancels_leak_no_page_and_change_no_token(guess: bool) -> None:
    engine = small_engine(guess=guess)
    checked = churn(engine, 150, seed=1)
    assert leaked(engine) == 0
    assert checked > 60
    assert engine.scheduler.preemptions > 0 and engine.scheduler.cache.reused_tokens > 0
    if guess:
        assert engine.payoff is not None and engine.payoff.guessed > 0


@pytest.mark.exhaustive
def test_ten_thousand_random_requests_leak_nothing_and_memory_is_flat() -> None:
    engine = small_engine(guess=True)
    tracemalloc.start()
    peaks = []
    for part in range(5):
        gc.collect()  # beside a test runner's objects, cycles wait long for the collector
        tracemalloc.reset_peak()
        assert churn(engine, 2000, seed=part) > 800
        assert leaked(engine) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert max(peaks[1:]) < 1.1 * peaks[0] + 100_000, peaks
