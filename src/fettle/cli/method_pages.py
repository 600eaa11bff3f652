"""The registry as plain data: for `fettle methods`, its JSON, and the generated page docs/methods.md."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from fettle.cli.flags import default_words, flag_name, metavar
from fettle.methods.protocols import RescalingMethod
from fettle.methods.registry import BASES, EVERY_METHOD
from fettle.methods.train import TRAIN_METHODS

_ALL: dict[str, type[Any]] = {**EVERY_METHOD, **BASES}


def describe_methods() -> list[dict[str, Any]]:
    """One entry a method: name, title, source, objective, statistics and fields, in the registry's order."""
    return [
        {
            "name": name,
            "title": cls.title,
            "source": cls.source,
            "objective": cls.objective,
            "statistics": list(dict.fromkeys((*cls.statistics, *_rescaling(cls)))),
            "fields": _fields(cls, f"{cls.switch}_" if name in BASES else ""),
        }
        for name, cls in _ALL.items()
    ]


def describe_training() -> list[dict[str, Any]]:
    """One entry a training method: name, title, source and fields."""
    return [
        {"name": name, "title": cls.title, "source": cls.source, "fields": _fields(cls, "")}
        for name, cls in TRAIN_METHODS.items()
    ]


def _rescaling(cls: Any) -> tuple[str, ...]:
    """What the method's rescaler looks at."""
    return tuple(cls().rescaler().statistics) if issubclass(cls, RescalingMethod) else ()


def _fields(cls: Any, prefix: str) -> list[dict[str, str]]:
    hints = get_type_hints(cls)
    return [
        {
            "name": field.name,
            "flag": f"--{flag_name(prefix + field.name)}",
            "type": "yes|no" if hints[field.name] is bool else metavar(hints[field.name]),
            "default": default_words(field),
            "help": str(field.metadata.get("help", "")),
        }
        for field in dataclasses.fields(cls)
    ]
