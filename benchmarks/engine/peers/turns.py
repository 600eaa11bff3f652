"""What every engine that is measured here has in common: a shape, and a process that works when it is told to.

A line of standard input is what to do next, a line of standard output the seconds that it took; so the one who tells
can let engines take turns. Runs under any Python; only numpy.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, MLP, VOCABULARY = 2048, 32, 4, 64, 5632, 32000
PROMPT, DECODED, TOGETHER = 512, 16, 8


def peer_options(about: str | None, formats: Iterable[str]) -> argparse.Namespace:
    """What a peer's script is called with: a format, and where its file is kept."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=tuple(formats))
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True)
    return parser.parse_args()


def take_turns(work: dict[str, Callable[[], float | None]], told: dict[str, object]) -> None:
    """Answers until the input ends: first with what there is to tell, then with seconds for each name of work.

    A piece of work may measure itself and return its seconds; None: the call is timed.
    """
    print(json.dumps(told), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        seconds = work[line.strip()]()
        print(json.dumps(time.perf_counter() - began if seconds is None else seconds), flush=True)
