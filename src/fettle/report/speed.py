"""The page of a speed measurement: what `fettle bench` found in, one self-contained HTML page out; the rules of
page.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fettle.report.atomic import write_atomically
from fettle.report.plots import rows
from fettle.report.tables import NONE
from fettle.report.templates import render

FIGURES = (  # key, name, unit, factor
    ("prefill_tokens_per_second", "prefill", "tokens/s", 1.0),
    ("time_to_first_token_seconds", "time to the first token", "ms", 1e3),
    ("read_bytes_per_second", "memory of this machine, read", "GB/s", 1e-9),
    ("float32_operations_per_second", "float32 products of this machine", "Gop/s", 1e-9),
    ("integer_operations_per_second", "products of bytes of this machine", "Gop/s", 1e-9),
)


def write_speed(path: str | Path, document: Mapping[str, Any]) -> None:
    """Writes the page of one measurement, whole or not at all."""
    write_atomically(Path(path), render_speed(document))


def render_speed(document: Mapping[str, Any]) -> str:
    """The page as text.

    Raises:
        UsageError: the document lacks what every measurement has.
    """
    return render("speed.html.j2", _view, document, "the measurement; make it again with fettle bench --json")


def _view(document: Mapping[str, Any]) -> dict[str, Any]:
    decode: Mapping[Any, float] = document["decode_tokens_per_second"]
    spread: Mapping[str, Any] = document["spread"]
    used = {
        "memory, one sequence decodes": document["memory_bandwidth_share"],
        "arithmetic, prefill": document["arithmetic_share"],
    }
    table = [
        (name, f"{document[key] * factor:,.4g} {unit}", f"{spread[key]:.0%}")
        for key, name, unit, factor in FIGURES
        if document.get(key) is not None
    ]
    table += [
        (f"decode, {batch} at once", f"{value:,.4g} tokens/s", f"{spread['decode_tokens_per_second'][batch]:.0%}")
        for batch, value in decode.items()
    ]
    table += [(f"share of the {name}", NONE if share is None else f"{share:.1%}", "") for name, share in used.items()]
    return {
        "title": f"{document['model']} · speed",
        "words": _words(document),
        "decode": _rows(
            {f"{batch} at once": value for batch, value in decode.items()}, "Decoding, all sequences", "tokens/s"
        ),
        "shares": _rows(
            {name: 100 * share for name, share in used.items() if share is not None}, "Shares of the limits", "%"
        ),
        "table": table,
        "repetitions": document["repetitions"],
        "command": document["command_line"],
    }


def _words(document: Mapping[str, Any]) -> str:
    share = document["memory_bandwidth_share"]
    kind = "float32" if document.get("integer_operations_per_second") is None else "integer"
    told = "" if share is None else f" One sequence uses {share:.0%} of the memory's speed,"
    told += f"{' a' if told else ' A'} prompt {document['arithmetic_share']:.0%} of the {kind} arithmetic."
    return f"{document['engine']} on {document['device']}, {document['threads']} threads.{told}"


def _rows(values: Mapping[str, float], title: str, unit: str) -> Markup:
    described = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
    return Markup(rows(values, title=title, unit=unit, description=described))
