"""How long work says how far it is: a protocol of two calls, silent unless the caller passes another.

The rooms below never print. The command line passes bars with the time left (`cli/progress.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of work of a known length."""

    def advance(self, n: int = 1) -> None:
        """Says that `n` more of the total are done."""
        ...


class Progress(Protocol):
    """Where pieces of work are announced."""

    def task(self, description: str, total: int) -> AbstractContextManager[Task]:
        """Announces a piece of work of `total` steps for as long as the context lasts."""
        ...


class _SilentTask:
    def advance(self, n: int = 1) -> None:
        """Says nothing."""


class Silent:
    """The default: says nothing."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Task]:
        """Announces nothing."""
        yield _SilentTask()
