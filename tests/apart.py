"""A function in a process of its own, which it may kill: forked from a server that has imported everything once.

A fresh interpreter spends seconds on imports before it does what a test is about. The server imports the package, does
nothing else (it never starts a thread), and each child is a fork of it, as isolated as a new process.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300  # a child that hangs fails its test instead of the suite
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fettle.api", "transformers.models.llama.modeling_llama", "transformers.trainer"])


@dataclass(frozen=True)
class Ended:
    """How a child ended: the exit code (minus the signal's number where one ended it) and all that it printed."""

    code: int | None
    said: str


def run_apart(function: Callable[..., None], *arguments: Any, folder: Path) -> Ended:
    """Calls a module's function in a process of its own and waits for its end; `folder` takes what it prints."""
    return run_together(function, arguments, [{}], folder)[0]


def run_together(
    function: Callable[..., None], arguments: Sequence[Any], environments: Sequence[Mapping[str, str]], folder: Path
) -> list[Ended]:
    """The same in several processes at once, one for each set of variables that its environment has besides."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # a child imports the test's module by its name
    said = [folder / f"said-apart-{number}.txt" for number in range(len(environments))]
    children = [
        CONTEXT.Process(target=_call, args=(path, dict(environment), function, tuple(arguments)))
        for path, environment in zip(said, environments, strict=True)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(SECONDS)
        if child.is_alive():
            child.kill()
            child.join()
    return [Ended(child.exitcode, path.read_text(encoding="utf-8")) for child, path in zip(children, said, strict=True)]


def signal_at_sync(limit: int, number: int) -> Callable[[], int]:
    """From here on, the call `limit` of os.fsync sends this process the signal `number`; gives how many came so far."""
    calls, real = 0, os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == limit:
            os.kill(os.getpid(), number)
        real(descriptor)

    os.fsync = fsync  # type: ignore[assignment]
    return lambda: calls


def _call(said: Path, environment: dict[str, str], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with said.open("wb") as sink:
        os.dup2(sink.fileno(), sys.stdout.fileno())
        os.dup2(sink.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    function(*arguments)
    sys.stdout.flush()
