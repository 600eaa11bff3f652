"""What a field of a method may hold, by its type and its bounds: the part of a check that needs no torch.

A method's dataclass says it (`Literal`, `int | None`, `metadata={"minimum": 1}`); the registry asks for every method
that it builds, and the command line before it imports what computes.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fettle.errors import RecipeError

LARGEST = 2**63 - 1  # what torch and the files can count


def require_possible(cls: Any, values: Mapping[str, Any]) -> None:
    """Refuses a value that a field of the dataclass `cls` cannot hold; fields without a value are not looked at.

    Raises:
        RecipeError: says the method, the field, the value, the allowed set and the next step.
    """
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        value, hint = values[field.name], hints[field.name]
        if not fits(value, hint, field.metadata):
            allowed = _allowed(members(hint), field.metadata, value)
            raise RecipeError(
                f"{cls.name}: {field.name}={value!r} cannot be; allowed: {allowed}. "
                f"Leave it out for the default, {_spelled(field.default)}"
            )


def members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type that it is."""
    return get_args(hint) if get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def fits(value: Any, hint: Any, metadata: Mapping[str, Any] = types.MappingProxyType({})) -> bool:
    """Whether a value is of a field's type, and within its bounds."""
    return any(_fits_member(value, member, metadata) for member in members(hint))


def _fits_member(value: Any, member: Any, metadata: Mapping[str, Any]) -> bool:
    if member is types.NoneType or value is None:
        return member is types.NoneType and value is None
    if get_origin(member) is Literal:
        return any(value == allowed and type(value) is type(allowed) for allowed in get_args(member))
    if member is bool or isinstance(value, bool):
        return member is bool and isinstance(value, bool)
    if member in (int, float):
        if not isinstance(value, int if member is int else (int, float)) or not _is_countable(value):
            return False
        return bool(metadata.get("minimum", -math.inf) <= value <= metadata.get("maximum", math.inf))
    return isinstance(value, member)


def _is_countable(value: float) -> bool:
    """Whether a number is finite, and small enough to be counted where it is an integer."""
    return -LARGEST <= value <= LARGEST if isinstance(value, int) else math.isfinite(value)


def _allowed(members: tuple[Any, ...], metadata: Mapping[str, Any], value: Any) -> str:
    words: list[str] = []
    for member in members:
        if get_origin(member) is Literal:
            words += [_spelled(choice) for choice in get_args(member)]
        elif member in (int, float):
            kind = "integers" if member is int else "numbers"
            low, high = (
                metadata.get("minimum"),
                metadata.get("maximum", LARGEST if isinstance(value, int) and value > LARGEST else None),
            )
            words.append(
                kind + (f" from {low}" if low is not None else "") + (f" to {high}" if high is not None else "")
            )
        else:
            words.append(
                {bool: "true, false", str: "text", types.NoneType: "none"}.get(member, getattr(member, "__name__", ""))
            )
    return ", ".join(words)


def _spelled(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
