"""The engine under asyncio: many tasks, the same tokens, and cancelled ones are gone within a step."""

from __future__ import annotations

import asyncio

import pytest

from fettle.engine.asynchronous import AsyncEngine
from fettle.engine.engine import Completion, Engine
from fettle.engine.sampler import Sampling
from fettle.engine.scheduler import SchedulerOptions
from fettle.engine.sequence import Request
from fettle.errors import NonFiniteError, UsageError

from .recall import Recall


def engine() -> Engine:
    return Engine(Recall(pages=40, page_size=4), options=SchedulerOptions(max_sequences=4, max_step_tokens=16))


REQUESTS = [
    Request(prompt=tuple(range(n + 1)), max_tokens=5 + 3 * n, sampling=Sampling(temperature=n % 2, seed=n))
    for n in range(7)
]


def test_many_tasks_get_what_the_synchronous_engine_gives() -> None:
    async def serve() -> list[Completion]:
        async with AsyncEngine(engine()) as serving:
            return list(await asyncio.gather(*(serving.generate(request) for request in REQUESTS)))

    wanted = engine().generate(REQUESTS)
    assert [made.tokens for made in asyncio.run(serve())] == [made.tokens for made in wanted]


def test_updates_add_up_and_leaving_a_stream_cancels_it() -> None:
    async def serve() -> None:
        made = engine()
        async with AsyncEngine(made) as serving:
            tokens: list[int] = []
            async for update in serving.stream(REQUESTS[2]):
                tokens += update.tokens
                last = update.completion
            assert last is not None and last.tokens == tuple(tokens)
            left = serving.stream(Request(prompt=(1, 2), max_tokens=100))
            await anext(left)
            await left.aclose()
            other = await serving.generate(REQUESTS[1])  # whose first step comes after the cancelling
            assert other.stopped == "length"
            assert not made.busy
            assert made.scheduler.cache.free_pages == 40

    asyncio.run(serve())


def test_a_cancelled_task_gives_its_pages_back() -> None:
    async def serve() -> None:
        made = engine()
        async with AsyncEngine(made) as serving:
            task = asyncio.create_task(serving.generate(Request(prompt=(1, 2), max_tokens=120)))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len((await serving.generate(REQUESTS[0])).tokens) == 5
            assert made.scheduler.cache.free_pages == 40

    asyncio.run(serve())


def test_errors_reach_the_task_that_made_them_and_then_all() -> None:
    async def serve() -> None:
        made = engine()
        async with AsyncEngine(made) as serving:
            fine = asyncio.create_task(serving.generate(REQUESTS[3]))
            with pytest.raises(UsageError, match="max_tokens is 0"):
                await serving.generate(Request(prompt=(1,), max_tokens=0))
            assert len((await fine).tokens) == 14
            made.runner.sharpness = float("nan")  # type: ignore[attr-defined]
            tasks = [asyncio.create_task(serving.generate(request)) for request in REQUESTS[:3]]
            for found in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(found, NonFiniteError)
            assert not made.busy

    asyncio.run(serve())


def test_an_engine_that_does_not_serve_says_so() -> None:
    with pytest.raises(UsageError, match="not serving"):
        asyncio.run(AsyncEngine(engine()).generate(REQUESTS[0]))
