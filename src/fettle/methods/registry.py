"""Every method by its name, and methods from the plain values of a recipe or of flags.

A method is registered by its import line in `methods/quantize/__init__.py`, `methods/prune/__init__.py` or
`methods/factor/__init__.py`; one that gives the whole model another shape, in `methods/reshape/__init__.py`, or a
convolution network, in `methods/filters/__init__.py`. `METHODS` compress one matrix each, `MODEL_METHODS` reshape a
language model, `NETWORK_METHODS` an image classifier; `BASES` put the whole model into other coordinates.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from fettle.errors import RecipeError, unknown_word
from fettle.methods import factor, filters, prune, quantize, reshape
from fettle.methods.field_values import fits, require_possible
from fettle.methods.filters.prune_filters import NetworkMethod
from fettle.methods.protocols import BasisMethod, MatrixMethod, SettledMethod
from fettle.methods.reshape.subject import ModelMethod

Method = MatrixMethod | ModelMethod | NetworkMethod


def _classes(verb: str, *rooms: types.ModuleType) -> dict[str, Any]:
    """The methods of these packages that can do `verb`, by name: what a package imports beside them is none."""
    held = (value for room in rooms for value in vars(room).values())
    found = (value for value in held if isinstance(value, type) and hasattr(value, verb))
    classes: list[Any] = [value for value in found if dataclasses.is_dataclass(value)]
    return {cls.name: cls for cls in classes}


METHODS: dict[str, type[MatrixMethod]] = _classes("compress", quantize, prune, factor)
MODEL_METHODS: dict[str, type[ModelMethod]] = _classes("reshape", reshape)
NETWORK_METHODS: dict[str, type[NetworkMethod]] = _classes("prune_network", filters)
EVERY_METHOD: dict[str, type[Method]] = {**METHODS, **MODEL_METHODS, **NETWORK_METHODS}
BASES: dict[str, type[BasisMethod]] = _classes("residual_map", quantize)
Built = TypeVar("Built")


def get(name: str) -> type[Method]:
    """The method of this name.

    Raises:
        RecipeError: there is none; offers the nearest spelling.
    """
    if name in BASES:
        raise RecipeError(
            f"{name} is for the whole model and compresses no linear by itself; make it the first step of a recipe "
            f"(- method: {name}), or give --{BASES[name].switch} beside --method"
        )
    if name not in EVERY_METHOD:
        raise RecipeError(unknown_word("method", name, EVERY_METHOD))
    return EVERY_METHOD[name]


def reshapes(method: Method) -> typing.TypeGuard[ModelMethod]:
    """Whether it gives the model another shape; else it compresses one matrix at a time."""
    return type(method).name in MODEL_METHODS


def prunes_networks(method: Method) -> typing.TypeGuard[NetworkMethod]:
    """Whether it is for convolution networks, and for nothing else."""
    return type(method).name in NETWORK_METHODS


def matrix_method(name: str, mapping: Mapping[str, Any]) -> MatrixMethod:
    """`from_fields` where only methods for a matrix can be.

    Raises:
        RecipeError: the method reshapes models.
    """
    method = from_fields(name, mapping)
    if reshapes(method) or prunes_networks(method):
        raise RecipeError(
            f"the method {name} gives the model another shape, and here a linear gets a method; one of "
            f"{', '.join(METHODS)}"
        )
    found = typing.cast(MatrixMethod, method)
    if isinstance(found, SettledMethod) and not found.is_settled:
        raise RecipeError(
            f"{name} is compared with other methods by the bytes that it leaves, so its rank has to be a number here; "
            "give rank, such as rank=32"
        )
    return found


def from_fields(name: str, mapping: Mapping[str, Any]) -> Method:
    """A checked method from plain values; what is not given keeps its default.

    Raises:
        RecipeError: an unknown method or field (with the nearest spelling), or a value that cannot be.
    """
    return build(get(name), mapping)


def basis_from_fields(name: str, mapping: Mapping[str, Any]) -> BasisMethod:
    """The same of a method for the whole model; `name` is one of `BASES`."""
    return build(BASES[name], mapping)


def build(cls: type[Built], mapping: Mapping[str, Any]) -> Built:
    """A checked instance of any method's dataclass from plain values; what is not given keeps its default.

    Raises:
        RecipeError: an unknown field (with the nearest spelling), or a value that cannot be.
    """
    fields = [field.name for field in dataclasses.fields(typing.cast(Any, cls))]
    for key in mapping:
        if key not in fields:
            raise RecipeError(unknown_word(f"field of the method {_name(cls)}", str(key), fields))
    hints = get_type_hints(cls)
    method = cls(**{key: _plain(value, hints[key]) for key, value in mapping.items()})
    validate(typing.cast(Any, method))
    return method


def _name(cls: type) -> str:
    return str(getattr(cls, "name", cls.__name__))


def _plain(value: Any, hint: Any) -> Any:
    """The value; the word none, as help and errors spell it, for a field that may have no value."""
    return None if value == "none" and fits(None, hint) and not fits(value, hint) else value


def to_fields(method: Method | BasisMethod) -> dict[str, Any]:
    """Every field with its value: what `from_fields` reads back to an equal method."""
    return {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}


def validate(method: Method | BasisMethod) -> None:
    """Checks every field's type and bounds, then what the method itself asks.

    Raises:
        RecipeError: says the field, the value, the allowed set and the next step.
    """
    require_possible(type(method), {field.name: getattr(method, field.name) for field in dataclasses.fields(method)})
    method.validate()
