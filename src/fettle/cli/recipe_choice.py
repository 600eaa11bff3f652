"""Which recipe the flags mean: a named or written one, or one method in one line; and what is said about the text.

    --recipe gptq-4bit                              a shipped recipe; --recipe my.yaml a file
    --method gptq --bits 4 --group-size 32          one method for every linear of the blocks
    --parameters 0.6x                               the method resize: depth and widths are chosen together
    (neither)                                       the recipe "default"

The calibration's flags go with all three. A method's flags go with --method only: a recipe says them itself, for each
of its steps, and a flag could not say which step it means.
"""

from __future__ import annotations

import dataclasses
import inspect as python_inspect
import shlex
from collections.abc import Mapping
from typing import Any, get_type_hints

from fettle.cli.flags import dataclass_flags, flag_name, given, method_fields, method_flags
from fettle.errors import UsageError, unknown_word
from fettle.methods.registry import EVERY_METHOD
from fettle.pipeline.recipe import CalibrationOptions, Recipe, load_recipe, parse_recipe, recipe_from_method

CALIBRATION_NAMES = {"text": "calibration"}  # `--calibration FILE` reads better than `--text FILE` beside evaluate's
DEFAULT_RECIPE = "default"


def recipe_flags() -> list[python_inspect.Parameter]:
    """The flags of the calibration and of all methods."""
    return [
        *dataclass_flags(CalibrationOptions, rename=CALIBRATION_NAMES, panel="calibration"),
        *method_flags(EVERY_METHOD),
    ]


def chosen_recipe(recipe: str | None, method: str | None, fields: Mapping[str, Any]) -> Recipe:
    """The recipe that the flags mean.

    Raises:
        UsageError: --recipe and --method together, a method's flag without its method, or a value that cannot be.
    """
    own = {f.name for f in dataclasses.fields(CalibrationOptions)}
    flags = [name for name, value in fields.items() if value is not None and name not in own]
    calibration = given(own & set(fields), fields, get_type_hints(CalibrationOptions))
    if recipe is not None and method is not None:
        raise UsageError(f"--recipe {recipe} and --method {method} exclude each other; give one of them")
    if method is not None:
        if method not in EVERY_METHOD:
            raise UsageError(unknown_word("method", method, EVERY_METHOD))
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


def calibration_note(recipe: Recipe) -> str:
    """What is said when no calibration text was given."""
    if recipe.calibration.text is not None or not any(step.method.statistics for step in recipe.steps):
        return ""
    return "No --calibration given: the embedded text (Python source code) is the calibration text."


def command_line(arguments: list[str]) -> str:
    """The command that does the same again, quoted for a shell."""
    return shlex.join(["fettle", *arguments])
