"""fettle: makes a pretrained language model small, fast and cheap to run, and proves what that cost.

Five calls: `load`, `compress`, `train`, `evaluate`, `generate`; those that look and write nothing: `plan`, `inspect`,
`diagnose`, `evaluate_cache`; `open_engine` serves many requests at once. They are imported when they are first used, so
that `import fettle` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "AsyncEngine",
    "Budget",
    "CacheScheme",
    "Completion",
    "Engine",
    "Request",
    "RunnerOptions",
    "Sampling",
    "SchedulerOptions",
    "Update",
    "__version__",
    "compress",
    "diagnose",
    "evaluate",
    "evaluate_cache",
    "generate",
    "inspect",
    "load",
    "open_engine",
    "plan",
    "train",
]

if TYPE_CHECKING:
    from fettle.api import (
        AsyncEngine,
        Budget,
        CacheScheme,
        Completion,
        Engine,
        Request,
        RunnerOptions,
        Sampling,
        SchedulerOptions,
        Update,
        compress,
        diagnose,
        evaluate,
        evaluate_cache,
        generate,
        inspect,
        load,
        open_engine,
        plan,
        train,
    )


_CALLS = frozenset(__all__) - {"__version__"}


class _Library(ModuleType):
    """The package itself. Importing the room `fettle.evaluate` binds its name here; the call of that name must win."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _CALLS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in _CALLS:
            return getattr(importlib.import_module("fettle.api"), name)
        raise AttributeError(f"module 'fettle' has no attribute '{name}'")


sys.modules[__name__].__class__ = _Library
