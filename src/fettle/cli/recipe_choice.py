"""Which recipe the flags mean: a named or written one, or one method in one line; and what is said about the text.

    --recipe gptq-4bit                              a shipped recipe; --recipe my.yaml a file
    --method gptq --bits 4 --group-size 32          one method for every linear of the blocks
    --parameters 0.6x                               the method resize: depth and widths are chosen together
    (neither)                                       the recipe "default"
    --rotate                                        any of these, on the rotated model

The calibration's flags and --rotate go with all three. A method's flags go with --method only: a recipe says them
itself, for each of its steps, and a flag could not say which step it means.
"""

from __future__ import annotations

import dataclasses
import inspect as python_inspect
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from fettle.cli import outlines
from fettle.cli.flags import dataclass_flags, flag_name, given, method_fields, method_flags, switched_flags
from fettle.errors import RecipeError, UsageError, unknown_word
from fettle.methods.field_values import require_possible

if TYPE_CHECKING:
    from fettle.pipeline.recipe import Recipe

CALIBRATION_NAMES = {"text": "calibration"}  # `--calibration FILE` reads better than `--text FILE` beside evaluate's
DEFAULT_RECIPE = "default"
ROTATION = "rotation"


def recipe_flags() -> list[python_inspect.Parameter]:
    """The flags of the calibration and of all methods."""
    rotation: Any = outlines.bases()[ROTATION]
    return [
        *dataclass_flags(outlines.options("CalibrationOptions"), rename=CALIBRATION_NAMES, panel="calibration"),
        *switched_flags(rotation.switch, "Rotate the model first, by randomized Hadamard matrices.", rotation),
        *method_flags(outlines.every_method()),
    ]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the flags say, once they can be: a recipe's name or a method, and the fields that were given."""

    recipe: str | None
    method: str | None
    fields: Mapping[str, Any]  # of the method
    calibration: Mapping[str, Any]
    rotation: Mapping[str, Any] | None  # None: it was not asked for


def checked_choice(recipe: str | None, method: str | None, fields: Mapping[str, Any]) -> Choice:
    """What the flags say, checked as far as names, types and bounds go: without importing what computes.

    Raises:
        UsageError: --recipe and --method together, a method's flag without its method, or a value that cannot be.
    """
    if recipe is not None and method is not None:
        raise UsageError(f"--recipe {recipe} and --method {method} exclude each other; give one of them")
    rotation = _rotation(fields)
    options = outlines.options("CalibrationOptions")
    own = {f.name for f in dataclasses.fields(options)}
    calibration = given(own & set(fields), fields, get_type_hints(options))
    rest = {name: value for name, value in fields.items() if name not in own and not name.startswith("rotate")}
    flags = [name for name, value in rest.items() if value is not None]
    methods = outlines.every_method()
    if method is None and recipe is None and "parameters" in flags:
        method = "resize"  # a shape alone: depth and widths are chosen together
    if method is None and flags:
        spelled = ", ".join(f"--{flag_name(name)}" for name in flags)
        where = f"the recipe {recipe} says that itself, for each step: edit a copy of it" if recipe else "say which"
        raise UsageError(f"{spelled} belongs to a method; {where}, or use --method NAME (one of {', '.join(methods)})")
    found: Mapping[str, Any] = {}
    if method is not None and method not in outlines.bases():  # of those the registry says what they are for
        if method not in methods:
            raise RecipeError(unknown_word("method", method, methods))
        found = method_fields(methods, method, rest)
        require_possible(methods[method], found)
    return Choice(recipe=recipe, method=method, fields=found, calibration=calibration, rotation=rotation)


def chosen_recipe(recipe: str | None, method: str | None, fields: Mapping[str, Any]) -> Recipe:
    """The recipe that the flags mean.

    Raises:
        UsageError: as `checked_choice`, or values that cannot be together.
    """
    choice = checked_choice(recipe, method, fields)
    from fettle.methods.registry import basis_from_fields
    from fettle.pipeline.recipe import with_basis

    chosen = _unrotated(choice)
    return chosen if choice.rotation is None else with_basis(chosen, basis_from_fields(ROTATION, choice.rotation))


def _rotation(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """What --rotate and its flags mean; None where it is not given."""
    rotation = outlines.bases()[ROTATION]
    hints = {f"rotate_{f.name}": get_type_hints(rotation)[f.name] for f in dataclasses.fields(rotation)}
    found = given(hints, fields, hints)
    if found and not fields.get("rotate"):
        raise UsageError(f"--{flag_name(next(iter(found)))} belongs to --rotate; give that as well")
    values = {name.removeprefix("rotate_"): value for name, value in found.items()}
    require_possible(rotation, values)
    return values if fields.get("rotate") else None


def _unrotated(choice: Choice) -> Recipe:
    from fettle.methods.registry import get
    from fettle.pipeline.recipe import CalibrationOptions, load_recipe, parse_recipe, recipe_from_method

    if choice.method is not None:
        get(choice.method)
        options = dataclasses.replace(CalibrationOptions(), **choice.calibration)
        return recipe_from_method(choice.method, choice.fields, options)
    name = choice.recipe or DEFAULT_RECIPE
    base = load_recipe(name)
    if not choice.calibration:
        return base
    mapping = base.to_dict()
    return parse_recipe({**mapping, "calibration": {**mapping["calibration"], **choice.calibration}}, name)


def with_masks(recipe: Recipe, *, dense: bool, allocation: str | None) -> Recipe:
    """The recipe with what --dense and --allocation say.

    Raises:
        RecipeError: they do not fit its steps, or an unknown allocation.
    """
    from fettle.pipeline.recipe import parse_recipe

    keys = {**({"storage": "dense"} if dense else {}), **({"allocation": allocation} if allocation else {})}
    return parse_recipe({**recipe.to_dict(), **keys}, recipe.name) if keys else recipe


def calibration_note(recipe: Recipe) -> str:
    """What is said when no calibration text was given."""
    looks = [step.method.statistics for step in recipe.steps]
    if recipe.calibration.text is not None or not any(kinds and kinds != ("images",) for kinds in looks):
        return ""
    return "No --calibration given: the embedded text (Python source code) is the calibration text."


def command_line(arguments: list[str]) -> str:
    """The command that does the same again, quoted for a shell."""
    return shlex.join(["fettle", *arguments])
