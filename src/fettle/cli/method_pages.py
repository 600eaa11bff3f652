"""The registry as plain data: for `fettle methods`, its JSON, and the generated page docs/methods.md."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from fettle.cli import outlines
from fettle.cli.flags import default_words, flag_name, metavar


def describe_methods() -> list[dict[str, Any]]:
    """One entry a method: name, title, source, objective, statistics and fields, in the registry's order."""
    bases = outlines.bases()
    classes: dict[str, Any] = {**outlines.every_method(), **bases}
    return [
        {
            "name": name,
            "title": cls.title,
            "source": cls.source,
            "objective": cls.objective,
            "statistics": list(cls.statistics),
            "fields": _fields(cls, f"{cls.switch}_" if name in bases else ""),
        }
        for name, cls in classes.items()
    ]


def describe_training() -> list[dict[str, Any]]:
    """One entry a training method: name, title, source and fields."""
    classes: dict[str, Any] = outlines.train_methods()
    return [
        {"name": name, "title": cls.title, "source": cls.source, "fields": _fields(cls, "")}
        for name, cls in classes.items()
    ]


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
