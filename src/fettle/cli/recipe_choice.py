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
from typing import Any, get_type_hints

from fettle.cli.flags import dataclass_flags, flag_name, given, method_fields, method_flags, switched_flags
from fettle.errors import UsageError
from fettle.methods.protocols import BasisMethod
from fettle.methods.quantize.rotation import Rotation
from fettle.methods.registry import EVERY_METHOD, basis_from_fields, get
from fettle.pipeline.recipe import CalibrationOptions, Recipe, load_recipe, parse_recipe, recipe_from_method, with_basis

CALIBRATION_NAMES = {"text": "calibration"}  # `--calibration FILE` reads better than `--text FILE` beside evaluate's
DEFAULT_RECIPE = "default"
ROTATION_NAMES = ("rotate", *(f"rotate_{field.name}" for field in dataclasses.fields(Rotation)))


def recipe_flags() -> list[python_inspect.Parameter]:
    """The flags of the calibration and of all methods."""
    return [
        *dataclass_flags(CalibrationOptions, rename=CALIBRATION_NAMES, panel="calibration"),
        *switched_flags(Rotation.switch, "Rotate the model first, by randomized Hadamard matrices.", Rotation),
        *method_flags(EVERY_METHOD),
    ]


def chosen_recipe(recipe: str | None, method: str | None, fields: Mapping[str, Any]) -> Recipe:
    """The recipe that the flags mean.

    Raises:
        UsageError: --recipe and --method together, a method's flag without its method, or a value that cannot be.
    """
    rotation = _rotation(fields)
    chosen = _unrotated(recipe, method, {k: v for k, v in fields.items() if k not in ROTATION_NAMES})
    return chosen if rotation is None else with_basis(chosen, rotation)


def _rotation(fields: Mapping[str, Any]) -> BasisMethod | None:
    """What --rotate and its flags mean; None where it is not given."""
    hints = {f"rotate_{name}": hint for name, hint in get_type_hints(Rotation).items()}
    found = given(ROTATION_NAMES[1:], fields, hints)
    if fields.get("rotate"):
        return basis_from_fields(Rotation.name, {name.removeprefix("rotate_"): value for name, value in found.items()})
    if found:
        raise UsageError(f"--{flag_name(next(iter(found)))} belongs to --rotate; give that as well")
    return None


def _unrotated(recipe: str | None, method: str | None, fields: Mapping[str, Any]) -> Recipe:
    own = {f.name for f in dataclasses.fields(CalibrationOptions)}
    flags = [name for name, value in fields.items() if value is not None and name not in own]
    calibration = given(own & set(fields), fields, get_type_hints(CalibrationOptions))
    if recipe is not None and method is not None:
        raise UsageError(f"--recipe {recipe} and --method {method} exclude each other; give one of them")
    if method is not None:
        get(method)
        options = dataclasses.replace(CalibrationOptions(), **calibration)
        return recipe_from_method(method, method_fields(EVERY_METHOD, method, fields), options)
    if recipe is None and "parameters" in flags:  # a shape alone: depth and widths are chosen together
        return chosen_recipe(None, "resize", fields)
    if flags:
        spelled = ", ".join(f"--{flag_name(name)}" for name in flags)
        where = f"the recipe {recipe} says that itself, for each step: edit a copy of it" if recipe else "say which"
        raise UsageError(
            f"{spelled} belongs to a method; {where}, or use --method NAME (one of {', '.join(EVERY_METHOD)})"
        )
    base = load_recipe(recipe or DEFAULT_RECIPE)
    if not calibration:
        return base
    mapping = base.to_dict()
    return parse_recipe({**mapping, "calibration": {**mapping["calibration"], **calibration}}, recipe or DEFAULT_RECIPE)


def with_masks(recipe: Recipe, *, dense: bool, allocation: str | None) -> Recipe:
    """The recipe with what --dense and --allocation say.

    Raises:
        RecipeError: they do not fit its steps, or an unknown allocation.
    """
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
