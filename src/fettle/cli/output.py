"""What goes to standard output: one JSON object, or text and tables for people.

Colour only where the output is a terminal (and NO_COLOR is not set): rich decides both. JSON carries `schema`, which
counts up when a key changes its meaning or goes; new keys do not change it. `docs/json.md` describes every key.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

SCHEMA = 1
PIPE_WIDTH = 160  # columns when the output is no terminal: wide enough that no cell wraps


def console() -> Console:
    """Standard output, for people."""
    out = Console(highlight=False, soft_wrap=True)
    return out if out.is_terminal else Console(highlight=False, soft_wrap=True, width=PIPE_WIDTH)


def emit_json(command: str, payload: Mapping[str, Any]) -> None:
    """Prints a verb's result as one JSON object with its schema number."""
    document = {"schema": SCHEMA, "command": command, **payload}
    print(json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False), file=sys.stdout)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> Table:
    """A table whose first column names the rows; `right` are the indices of right-aligned columns."""
    aligned = set(right)
    made = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index in aligned else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def show(out: Console, made: Table) -> None:
    """Prints a table without the blanks that rich puts after each line, so that it copies as text."""
    with out.capture() as captured:
        out.print(made)
    lines = "\n".join(line.rstrip() for line in captured.get().splitlines())
    out.file.write(lines.strip("\n") + "\n\n")


def size(count: float) -> str:
    """Bytes for people, in powers of 1000: 16.2 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}" if count < 10 * factor else f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds for people: 8.1 s, 2 min 5 s, 3 h 12 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60} min"


def number(value: Any, digits: int = 4) -> str:
    """A number with its significant digits; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.{digits}g}" if value and abs(value) < 10 ** (digits - 1) else f"{value:.0f}"
    return str(value)


def figure(value: float) -> str:
    """A measured figure with four significant digits, or whole with commas from a thousand on; never an exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 1e-4 else f"{value:.7f}"


def _plain(value: Any) -> Any:
    """JSON's own types: paths as text, infinities and NaN as null (JSON has no word for them)."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
