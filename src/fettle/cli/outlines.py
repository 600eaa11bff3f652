"""What the command line has to know of the methods before one runs: names, fields, help, bounds; without torch.

The methods' own dataclasses say all of it, but importing them imports what computes, which takes seconds. So their
outlines are kept as data (`outlines.json`, written from the methods by `make docs`; a test compares), and become
dataclasses again here: the same fields, types, defaults and metadata, and nothing that computes. Help, flags and errors
of flags need no more; what passes here is built and checked again from the real method.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fettle.methods.field_values import members

FILE = Path(__file__).with_name("outlines.json")
_TYPES: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool, "none": types.NoneType}
_NAMES = {kind: name for name, kind in _TYPES.items()}
_ABOUT = ("name", "title", "source", "objective", "switch")


def every_method() -> dict[str, type]:
    """The methods that compress, reshape or prune, by name."""
    return _held("methods")


def bases() -> dict[str, type]:
    """The methods for the whole model, which a switch turns on."""
    return _held("bases")


def train_methods() -> dict[str, type]:
    """The methods that train."""
    return _held("training")


def options(name: str) -> type:
    """Another dataclass whose fields are flags, such as "CalibrationOptions"."""
    return _held("options")[name]


def outline_of(cls: Any) -> dict[str, Any]:
    """A dataclass as plain data; `class_of` makes a class of it that equals it in all that flags are made from."""
    hints = get_type_hints(cls)
    about: dict[str, Any] = {key: getattr(cls, key) for key in _ABOUT if hasattr(cls, key)}
    if hasattr(cls, "statistics"):
        rescaling = cls().rescaler().statistics if hasattr(cls, "rescaler") else ()
        about["statistics"] = list(dict.fromkeys((*cls.statistics, *rescaling)))
    fields = [
        {
            "name": field.name,
            "type": [_type_words(member) for member in members(hints[field.name])],
            **({} if field.default is dataclasses.MISSING else {"default": field.default}),
            "metadata": dict(field.metadata),
        }
        for field in dataclasses.fields(cls)
    ]
    return {**about, "fields": fields}


def class_of(outline: Mapping[str, Any], name: str) -> type:
    """The dataclass that an outline describes."""
    about = {key: tuple(value) if key == "statistics" else value for key, value in outline.items() if key != "fields"}
    fields = [
        (
            entry["name"],
            functools.reduce(operator.or_, [_type_of(words) for words in entry["type"]]),
            dataclasses.field(default=entry.get("default", dataclasses.MISSING), metadata=entry["metadata"]),
        )
        for entry in outline["fields"]
    ]
    return dataclasses.make_dataclass(name, fields, namespace=about, kw_only=True, frozen=True)


@functools.cache
def _held(part: str) -> dict[str, type]:
    outlines = json.loads(FILE.read_text(encoding="utf-8"))[part]
    return {name: class_of(outline, name) for name, outline in outlines.items()}


def _type_words(member: Any) -> str | list[Any]:
    return list(get_args(member)) if get_origin(member) is Literal else _NAMES[member]


def _type_of(words: str | list[Any]) -> Any:
    return Literal[tuple(words)] if isinstance(words, list) else _TYPES[words]
