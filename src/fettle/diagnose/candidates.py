"""Candidates: the methods with their fields that a diagnosis or a budget chooses from.

    gptq bits=3 group_size=64 asymmetric=true       one candidate, as it is written on the command line

A label is short and unique in its list: `gptq-3bit`, and where two candidates would share it, with what differs.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from fettle.errors import RecipeError
from fettle.methods import registry
from fettle.methods.protocols import MatrixMethod
from fettle.methods.statistics import OF_THE_WEIGHT
from fettle.tensors.masked import MaskedScheme
from fettle.tensors.weights import WeightScheme

DIAGNOSED_BITS = (2, 3, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method that a linear may get, and the scheme that it would leave behind."""

    label: str
    method: MatrixMethod
    scheme: WeightScheme

    def to_json(self) -> dict[str, Any]:
        """Label, method, fields and scheme as plain data."""
        return {
            "label": self.label,
            "method": self.method.name,
            "fields": registry.to_fields(self.method),
            "scheme": self.scheme.describe(),
        }


def default_methods(
    names: Sequence[str] = ("round_to_nearest", "gptq"), bits: Iterable[int] = DIAGNOSED_BITS
) -> list[MatrixMethod]:
    """Uniform grids of these widths, groups of 32 with zero points, chosen by each of these methods."""
    widths = list(bits)
    return [
        registry.matrix_method(name, {"bits": width, "group_size": 32, "asymmetric": True})
        for name in names
        for width in widths
    ]


def parse_candidate(text: str) -> MatrixMethod:
    """The method that `NAME FIELD=VALUE …` means.

    Raises:
        RecipeError: no method, an unknown field, or a value that cannot be.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise RecipeError(
            f"candidate {text!r} cannot be read ({error}); write it as in: gptq bits=3 group_size=64"
        ) from None
    if not words:
        raise RecipeError("a candidate is empty; write a method and its fields, such as: gptq bits=3 group_size=64")
    fields: dict[str, Any] = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals:
            raise RecipeError(
                f"candidate {text!r}: {word!r} is no FIELD=VALUE; write it as in: gptq bits=3 group_size=64"
            )
        pattern = ":" in value  # which YAML takes for a number to the base of sixty
        try:
            spelled = None if value == "none" else value if pattern else yaml.safe_load(value)
        except yaml.YAMLError:
            raise RecipeError(
                f"candidate {text!r}: {value!r} is no value; write it as in: gptq bits=3 group_size=64"
            ) from None
        fields[key.replace("-", "_")] = spelled
    return registry.matrix_method(words[0], fields)


def as_candidates(methods: Iterable[MatrixMethod | str | Mapping[str, Any]], dtype: str) -> list[Candidate]:
    """Candidates with their labels; a mapping is a recipe's step without `where`, a text is `parse_candidate`'s.

    Raises:
        RecipeError: none at all, two alike, or one that cannot be.
    """
    found = [_as_method(method) for method in methods]
    if not found:
        raise RecipeError("there are no candidates; give at least one, such as: gptq bits=3 group_size=32")
    for index, method in enumerate(found):
        if method.scheme(dtype).activations is not None:
            raise RecipeError(
                f"the candidate {method.name} quantizes inputs, and sensitivities are found with inputs as they are; "
                "compress with activations in a recipe, and measure that"
            )
        if OF_THE_WEIGHT.intersection(method.needs()):
            raise RecipeError(
                f"the candidate {method.name} looks at the gradient of the loss, which a scan of candidates does not "
                "collect; compress with it in a recipe, or give wanda"
            )
        if method in found[:index]:
            raise RecipeError(f"the candidate {method} is there twice; give each once")
    labels = [_title(method) for method in found]
    return [
        Candidate(label=_unique(labels, index, found), method=method, scheme=method.scheme(dtype))
        for index, method in enumerate(found)
    ]


def _as_method(method: MatrixMethod | str | Mapping[str, Any]) -> MatrixMethod:
    if isinstance(method, str):
        return parse_candidate(method)
    if isinstance(method, Mapping):
        fields = {key: value for key, value in method.items() if key != "method"}
        return registry.matrix_method(str(method.get("method")), fields)
    registry.validate(method)
    return method


def _title(method: MatrixMethod) -> str:
    bits, scheme = getattr(method, "bits", None), method.scheme("float32")
    pruned = f"-{100 * scheme.sparsity:.4g}%" if isinstance(scheme, MaskedScheme) else ""
    return f"{method.name}{pruned}-{bits}bit" if bits else f"{method.name}{pruned}"


def _unique(labels: Sequence[str], index: int, methods: Sequence[MatrixMethod]) -> str:
    """The label, with the fields in which candidates of the same label differ."""
    alike = [registry.to_fields(methods[i]) for i, label in enumerate(labels) if label == labels[index]]
    own = registry.to_fields(methods[index])
    differ = [key for key in own if any(key not in other or other[key] != own[key] for other in alike)]
    told = [f"{key}={'none' if own[key] is None else str(own[key]).lower()}" for key in differ]
    return " ".join([labels[index], *told])
