"""The engine under asyncio: steps run in a thread of their own, requests come and go between them.

The engine itself is not made for two threads. So what arrives while a step computes is put down, and taken in before
the next one; a cancelled request is gone within that step. The loop runs while there is work and sleeps otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from fettle.engine.engine import Completion, Engine, Update
from fettle.engine.sequence import Request
from fettle.errors import FettleError, UsageError

Inbox = asyncio.Queue[Update | BaseException]


class AsyncEngine:
    """Serves requests of many tasks at once; enter it as an asynchronous context.

    async with AsyncEngine(engine) as serving:
        async for update in serving.stream(request): ...
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._arrived: list[tuple[Request, Inbox]] = []
        self._left: list[Inbox] = []
        self._inboxes: dict[int, Inbox] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "fettle-engine")

    async def __aenter__(self) -> AsyncEngine:
        self._task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown(wait=True)
        for number in list(self._inboxes):
            self.engine.cancel(number)

    async def stream(self, request: Request) -> AsyncIterator[Update]:
        """What every step does for a request; the last update holds the completion. Leaving it early cancels it.

        Raises:
            UsageError: the context was not entered, so nothing would ever come.
            FettleError: as `Engine.add` and `Engine.step`.
        """
        if self._task is None:
            raise UsageError("this engine is not serving; use it inside: async with AsyncEngine(engine) as serving")
        inbox: Inbox = asyncio.Queue()
        self._arrived.append((request, inbox))
        self._wake.set()
        try:
            while True:
                update = await inbox.get()
                if isinstance(update, BaseException):
                    raise update
                yield update
                if update.completion is not None:
                    return
        finally:
            self._left.append(inbox)
            self._wake.set()

    async def generate(self, request: Request) -> Completion:
        """The whole completion. Cancelling the task cancels the request."""
        last: Completion | None = None
        updates = self.stream(request)
        try:
            async for update in updates:
                last = update.completion
        finally:
            await updates.aclose()  # type: ignore[attr-defined]
        assert last is not None
        return last

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._take_in()
            if not self.engine.busy:
                self._wake.clear()
                if not (self._arrived or self._left):
                    await self._wake.wait()
                continue
            try:
                updates = await loop.run_in_executor(self._thread, self.engine.step)
            except Exception as error:  # whoever waits has to hear of it, whatever it is
                self._fail(error)
                continue
            for update in updates:
                inbox = self._inboxes.get(update.number)
                if inbox is not None:
                    inbox.put_nowait(update)
                if update.completion is not None:
                    self._inboxes.pop(update.number, None)

    def _take_in(self) -> None:
        """Requests that came and went since the last step."""
        arrived, self._arrived = self._arrived, []
        left, self._left = self._left, []
        for request, inbox in arrived:
            if inbox in left:
                continue
            try:
                self._inboxes[self.engine.add(request)] = inbox
            except FettleError as error:
                inbox.put_nowait(error)
        for number, inbox in list(self._inboxes.items()):
            if inbox in left:
                self.engine.cancel(number)
                del self._inboxes[number]

    def _fail(self, error: Exception) -> None:
        for number, inbox in self._inboxes.items():
            self.engine.cancel(number)
            inbox.put_nowait(error)
        self._inboxes.clear()
