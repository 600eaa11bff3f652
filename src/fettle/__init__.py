"""fettle: makes a pretrained language model small, fast and cheap to run, and proves what that cost.

Four calls: `load`, `compress`, `evaluate`, `generate`; and two that look first: `plan`, `inspect`. They are imported when
they are first used, so that `import fettle` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["__version__", "compress", "evaluate", "generate", "inspect", "load", "plan"]

if TYPE_CHECKING:
    from fettle.api import compress, evaluate, generate, inspect, load, plan


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("fettle.api"), name)
    raise AttributeError(f"module 'fettle' has no attribute '{name}'")
