"""Every shipped recipe is short, parses, survives its own round trip, and compresses a tiny model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import fettle
from fettle.methods.prune import SparseGpt
from fettle.pipeline.recipe import CalibrationOptions, Recipe, assign, load_recipe, parse_recipe, shipped_recipes

RECIPES = shipped_recipes()
NAMES = {
    "default", "gptq-4bit", "gptq-3bit", "round-to-nearest-8bit", "round-to-nearest-4bit", "mixed-4-8bit", "awq-4bit",
    "learned-rounding-3bit", "w8a8-dynamic", "drop-2-4bit", "narrow-0.6x", "svd-half", "rotated-w4a8-dynamic",
    "w8a8-static", "w8a8-static-apart", "mxfp4-w4a4", "nvfp4-w4a4", "residual-codebooks-2bit", "wanda-50",
    "sparsegpt-2of4-4bit",
}  # fmt: skip


def test_the_promised_recipes_are_there() -> None:
    assert {path.stem for path in RECIPES} >= NAMES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_bears_its_files_name(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 25
    assert text.startswith("# ")
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_found_by_name_and_equals_what_it_writes(path: Path) -> None:
    recipe = load_recipe(path.stem)
    assert recipe == load_recipe(path)
    assert parse_recipe(recipe.to_dict(), path.stem) == recipe


@pytest.mark.parametrize(
    ("name", "blocks", "linears"), [("drop-2-4bit", 4, 4 * 7), ("narrow-0.6x", 6, 0)]
)  # fmt: skip
def test_a_recipe_reshapes_the_embedded_model(name: str, blocks: int, linears: int, tmp_path: Path) -> None:
    recipe = dataclasses.replace(load_recipe(name), calibration=CalibrationOptions(windows=4, length=64))
    made = fettle.compress("demo", tmp_path / "out", recipe, evaluate=False)
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    assert model.config.num_hidden_layers == blocks
    assert len(made.summary["ledger"]) == linears
    assert made.summary["output"]["bytes"] < 0.8 * made.summary["base"]["bytes"]


def briefly_tuned(recipe: Recipe) -> Recipe:
    """The same with two steps where a method would take its usual number of them."""
    steps = [
        dataclasses.replace(step, method=dataclasses.replace(step.method, tune_steps=2))
        if isinstance(step.method, SparseGpt)
        else step
        for step in recipe.steps
    ]
    return dataclasses.replace(recipe, steps=tuple(steps))


@pytest.mark.parametrize("path", [p for p in RECIPES if not load_recipe(p).reshaping], ids=lambda path: path.stem)
def test_a_recipe_compresses_a_tiny_model(path: Path, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    small = CalibrationOptions(windows=8, length=64, text=str(text_file))
    recipe = dataclasses.replace(briefly_tuned(load_recipe(path)), calibration=small)
    made = fettle.compress(tiny_llama, tmp_path / "out", recipe, evaluate=False)
    ledger = made.summary["ledger"]
    assert {line["linear"] for line in ledger} == {
        f"model.layers.{block}.{part}"
        for block in (0, 1)
        for part in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    }
    assert made.summary["output"]["bytes"] < made.summary["base"]["bytes"]


def test_the_mixed_recipe_keeps_eight_bits_where_it_says(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from fettle.models.anatomy import read_anatomy
    from fettle.models.checkpoint import Checkpoint

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    anatomy = read_anatomy(Checkpoint.open(tmp_path))
    assigned = assign(load_recipe("mixed-4-8bit"), anatomy)
    for linear in anatomy.linears():
        careful = linear.role == "down" or linear.block in (0, 3)
        assert assigned[linear.name].bits == (8 if careful else 4), linear.name
