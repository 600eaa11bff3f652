"""Which engine `--engine` means, said where it is not the one that a user would expect."""

from __future__ import annotations

import sys
from pathlib import Path

from fettle.engine.runners import RunnerOptions, choose_engine


def settle_engine(engine: str, folder: Path, options: RunnerOptions) -> str:
    """The runner's name; a line on standard error says why "auto" became torch."""
    chosen, reason = choose_engine(engine, folder, options)
    if reason is not None:
        print(f"fettle: --engine torch runs this: {reason}", file=sys.stderr)
    return chosen
