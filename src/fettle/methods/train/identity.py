"""Whose a run folder's files are: what was drawn, found or begun for one training is no other training's.

A training that goes on takes what it wrote before the kill: masks, drawn windows, an adapter's bases. Beside them
stands what they follow from; where another kind, rank, seed or model asks for them, they are refused and not taken.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fettle.data.windows import read_text
from fettle.errors import UsageError
from fettle.models.writer import write_json

IDENTITY = "identity.json"
TEXTS = ("text", "replay", "held_back_text")  # told by what they hold
ELSEWHERE = ("teacher", "minutes")  # files told by their hashes, or nothing that another run would draw by


def told_fields(method: Any) -> dict[str, Any]:
    """A training method's fields as plain values, texts by their SHA-256 and without the names of files."""
    given = {item.name: getattr(method, item.name) for item in dataclasses.fields(method)}
    kept = {name: value for name, value in given.items() if name not in (*TEXTS, *ELSEWHERE)}
    texts = {name: read_text(given.get(name)).sha256 for name in TEXTS if name == "text" or given.get(name) is not None}
    return {"method": type(method).__name__, "fields": kept, "texts": texts}


def settle_identity(folder: Path, told: Mapping[str, Any], what: str, name: str = IDENTITY) -> None:
    """Writes whose files `folder` holds, or checks it.

    Args:
        folder: of the files.
        told: what they follow from, plain values.
        what: the files, in words.
        name: of the file that says it.

    Raises:
        UsageError: they are another training's.
    """
    path, plain = folder / name, json.loads(json.dumps(told))
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known != plain:
            raise UsageError(
                f"{folder} holds {what} of another training ({', '.join(_differing(known, plain))} differ); use "
                "another output, or start over with --fresh"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, plain)


def _differing(first: Any, second: Any) -> list[str]:
    """The keys by which two mappings differ, those of mappings inside in their place."""
    if not isinstance(first, dict) or not isinstance(second, dict):
        return ["all"]
    found: list[str] = []
    for key in sorted(first.keys() | second.keys()):
        mine, other = first.get(key), second.get(key)
        if mine != other:
            inside = isinstance(mine, dict) and isinstance(other, dict) and key == "fields"
            found += _differing(mine, other) if inside else [key]
    return found
