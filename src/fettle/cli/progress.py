"""Progress for people, on standard error: bars with the time left on a terminal, a plain line now and then elsewhere.

Both are what `fettle.progress.Progress` asks for. Nothing is shown for work that is over within two seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from fettle.cli.output import duration
from fettle.progress import Progress, Silent, Task

QUIET_SECONDS = 2.0  # work shorter than this shows nothing
LINE_SECONDS = 5.0  # between two plain lines


def progress(*, json: bool = False) -> Progress:
    """The progress that fits standard error; with `json` a program reads us, and only a terminal gets bars."""
    if sys.stderr.isatty():
        return TerminalProgress(Console(stderr=True))
    return Silent() if json else LineProgress(sys.stderr)


class PatientBars(Bars):
    """Rich's bars, each shown only once its work has lasted two seconds."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The rows that are due."""
        yield self.make_tasks_table([task for task in self.tasks if (task.elapsed or 0) >= QUIET_SECONDS])


class TerminalProgress:
    """One live display; nested tasks are rows of it."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._bars: Bars | None = None
        self._open = 0

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Task]:
        """A row for as long as the work lasts."""
        if self._bars is None:
            self._bars = PatientBars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self._console,
                get_time=self._clock,
                transient=True,
            )
            self._bars.start()
        row = self._bars.add_task(description, total=total)
        self._open += 1
        try:
            yield _Row(self._bars, row)
        finally:
            self._open -= 1
            self._bars.remove_task(row)
            if not self._open:
                self._bars.stop()
                self._bars = None


class _Row:
    def __init__(self, bars: Bars, row: TaskID) -> None:
        self._bars, self._row = bars, row

    def advance(self, n: int = 1) -> None:
        """Moves the bar."""
        self._bars.advance(self._row, n)


class LineProgress:
    """For logs and pipes: `compressing: 3 of 22, 12.0 s, 76.0 s left`, every few seconds."""

    def __init__(self, out: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._last = clock()

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Task]:
        """Says how far the work is, at most every five seconds over all tasks."""
        yield _Lines(self, description, total)

    def line(self, description: str, done: int, total: int, seconds: float) -> None:
        """Prints one line if the last one is old enough."""
        now = self._clock()
        if now - self._last < LINE_SECONDS:
            return
        self._last = now
        left = f", about {duration(seconds / done * (total - done))} left" if 0 < done < total else ""
        print(f"{description}: {done} of {total}, {duration(seconds)}{left}", file=self._out, flush=True)


class _Lines:
    def __init__(self, owner: LineProgress, description: str, total: int) -> None:
        self._owner, self._description, self._total = owner, description, total
        self._began = owner._clock()
        self._done = 0

    def advance(self, n: int = 1) -> None:
        """Counts, and lets the owner decide whether a line is due."""
        self._done += n
        self._owner.line(self._description, self._done, self._total, self._owner._clock() - self._began)
