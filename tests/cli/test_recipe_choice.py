"""Which recipe the flags mean."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fettle.cli.recipe_choice import calibration_note, chosen_recipe, recipe_flags
from fettle.errors import UsageError
from fettle.methods.registry import METHODS
from fettle.pipeline.recipe import load_recipe

NOTHING: dict[str, Any] = {parameter.name: None for parameter in recipe_flags()}


def test_every_field_of_every_method_and_of_the_calibration_is_one_flag() -> None:
    names = [parameter.name for parameter in recipe_flags()]
    fields = {f.name for method in METHODS.values() for f in dataclasses.fields(method)}
    assert fields <= set(names)
    assert len(names) == len(set(names))


def test_without_flags_the_default_recipe() -> None:
    assert chosen_recipe(None, None, NOTHING) == load_recipe("default")


def test_one_line_is_one_step() -> None:
    given = {
        **NOTHING,
        "bits": "3",
        "group_size": "32",
        "asymmetric": True,
        "windows": "4",
        "text": "t.txt",
        "seed": "9",
    }
    recipe = chosen_recipe(None, "gptq", given)
    (step,) = recipe.steps
    assert (step.method.name, step.method.bits, step.method.group_size, step.method.asymmetric) == ("gptq", 3, 32, True)
    assert (recipe.calibration.windows, recipe.calibration.text, recipe.calibration.seed) == (4, "t.txt", 9)
    assert recipe.calibration.length == 256


def test_the_calibrations_flags_go_with_a_recipe() -> None:
    recipe = chosen_recipe("gptq-3bit", None, {**NOTHING, "windows": "7"})
    assert recipe.calibration.windows == 7
    assert recipe.steps == load_recipe("gptq-3bit").steps


@pytest.mark.parametrize(
    ("recipe", "method", "fields", "words"),
    [
        ("gptq-4bit", "gptq", {}, "exclude each other"),
        ("gptq-4bit", None, {"bits": "3"}, "--bits belongs to a method; the recipe gptq-4bit says that itself"),
        (None, None, {"bits": "3"}, "--bits belongs to a method; say which, or use --method NAME"),
        (None, "gtpq", {}, "unknown method 'gtpq'; did you mean 'gptq'"),
        ("gtpq-4bit", None, {}, "unknown recipe 'gtpq-4bit'; did you mean 'gptq-4bit'"),
        (None, "gptq", {"bits": "9"}, "bits"),
        (None, "gptq", {"bits": "four"}, "--bits 'four' is no integer"),
        (None, "gptq", {"windows": "0"}, "windows=0"),
        ("gptq-4bit", None, {"windows": "0"}, "windows=0"),
        (None, "round_to_nearest", {"damping": "0.1"}, "unknown flag of the method round_to_nearest 'damping'"),
    ],
)
def test_what_cannot_be_is_refused(recipe: str | None, method: str | None, fields: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        chosen_recipe(recipe, method, {**NOTHING, **fields})


def test_the_embedded_text_is_said_only_where_text_is_read() -> None:
    assert "embedded text" in calibration_note(load_recipe("gptq-4bit"))
    assert calibration_note(load_recipe("round-to-nearest-4bit")) == ""
    assert calibration_note(chosen_recipe("gptq-4bit", None, {**NOTHING, "text": "mine.txt"})) == ""


def test_rotate_goes_with_a_method_a_recipe_and_neither() -> None:
    from fettle.methods.quantize.rotation import Rotation

    turned = {**NOTHING, "rotate": True}
    line = chosen_recipe(None, "gptq", {**turned, "bits": "3", "rotate_seed": "5", "rotate_heads": False})
    assert line.basis == Rotation(seed=5, heads=False)
    assert line.name == "rotation-gptq-3bit"
    for recipe in ("gptq-3bit", None):
        chosen = chosen_recipe(recipe, None, turned)
        assert chosen.basis == Rotation()
        assert chosen.steps == load_recipe(recipe or "default").steps
    assert chosen_recipe("rotated-w4a8-dynamic", None, NOTHING).basis == Rotation()


def test_rotation_flags_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="--rotate-seed belongs to --rotate"):
        chosen_recipe(None, None, {**NOTHING, "rotate_seed": "5"})
    with pytest.raises(UsageError, match="has a step rotation already; leave out --rotate"):
        chosen_recipe("rotated-w4a8-dynamic", None, {**NOTHING, "rotate": True})
    with pytest.raises(UsageError, match=r"rotation is for the whole model.*give --rotate"):
        chosen_recipe(None, "rotation", NOTHING)
    with pytest.raises(UsageError, match="rotate-seed 'x' is no integer"):
        chosen_recipe(None, None, {**NOTHING, "rotate": True, "rotate_seed": "x"})
