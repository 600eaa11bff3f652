"""Reshaping steps in a recipe: what comes behind sees the new shape, and the folder is an ordinary one."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch
import transformers

import fettle
from fettle.api import compressing
from fettle.errors import RecipeError, UsageError
from fettle.models.checkpoint import Checkpoint
from fettle.pipeline.recipe import Recipe, parse_recipe, recipe_from_method
from fettle.pipeline.run import prepare
from fettle.search.allocation import allocated

from ..apart import run_apart, signal_at_sync
from .conftest import digests

GPTQ = {"method": "gptq", "bits": 4, "group_size": 16}
ROTATION = {"method": "rotation", "seed": 3}


def recipe_of(text: Path, *steps: dict[str, object]) -> Recipe:
    calibration = {"windows": 6, "length": 32, "text": str(text)}
    return parse_recipe({"name": "shaped", "calibration": calibration, "steps": list(steps)}, "test")


STEPS: dict[str, list[dict[str, object]]] = {
    "drop": [{"method": "drop_layers", "drop": 1}],
    "narrow": [{"method": "narrow", "parameters": "0.8x", "multiple": 4}],
    "all": [{"method": "drop_layers", "drop": 1}, {"method": "narrow", "hidden": 0.5, "neurons": 0.95}, GPTQ],
}


@pytest.fixture(scope="module", params=STEPS)
def made(request, tiny_llama, text_file, tmp_path_factory):
    recipe = recipe_of(text_file, *STEPS[request.param])
    return request.param, fettle.compress(tiny_llama, tmp_path_factory.mktemp("made") / "out", recipe), recipe


def test_plain_transformers_loads_it_and_says_what_fettle_measured(made):
    kind, found, _ = made
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        found.folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    assert model.config.num_hidden_layers == {"drop": 1, "narrow": 2, "all": 1}[kind]
    assert model.config.hidden_size == {"all": 32}.get(kind, 64)
    loaded = fettle.load(found.folder)
    ids = loaded.tokenizer("def quick_1(brown, fox):", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, loaded.model(ids).logits, atol=2e-4, rtol=2e-3)
    assert isinstance(fettle.generate(found.folder, "def quick", max_new_tokens=4), str)


def test_it_is_measured_against_the_original(made, tiny_llama):
    kind, found, _ = made
    evaluation = found.evaluation
    assert evaluation.kl_mean > 0 and evaluation.reference_perplexity != evaluation.perplexity
    assert (len(evaluation.error_by_block) == 2) == (kind == "narrow")
    assert (evaluation.output_relative_error is None) == (kind == "all")
    again = fettle.evaluate(
        found.folder, reference=tiny_llama, max_tokens=compressing.EVALUATION_TOKENS
    )  # the folder says it was reshaped
    assert again.kl_mean == evaluation.kl_mean


def test_the_folder_says_what_was_decided(made, tiny_llama):
    _, found, recipe = made
    marker = json.loads((found.folder / "fettle.json").read_text())
    steps = marker["reshaped"]
    assert [step["method"] for step in steps] == [method.name for method in recipe.reshaping]
    assert steps[0]["parameters_before"] == fettle.evaluate(tiny_llama, max_tokens=64).parameters
    assert steps[-1]["parameters"] == found.evaluation.parameters < steps[0]["parameters_before"]
    assert Checkpoint.open(found.folder).verify_hashes() == len(marker["tensors"])
    text = (found.folder / "README.md").read_text()
    assert "AutoModelForCausalLM" in text and recipe.steps[0].method.name in text


def test_the_plan_knows_the_bytes(made, tiny_llama):
    _, found, recipe = made
    plan = fettle.plan(tiny_llama, recipe)
    assert plan.output_bytes == sum(path.stat().st_size for path in found.folder.glob("*.safetensors"))


def compress_until(model: Path, out: Path, text: Path, at: int) -> None:
    """Compresses; the durable write `at` kills the process."""
    signal_at_sync(at, signal.SIGKILL)
    fettle.compress(model, out, recipe_of(text, *STEPS["all"]), evaluate=False, threads=1)


def test_a_killed_run_resumes_to_the_same_bytes_on_other_threads(tiny_llama, text_file, tmp_path):
    recipe = recipe_of(text_file, *STEPS["all"])
    fettle.compress(tiny_llama, tmp_path / "whole" / "model", recipe, evaluate=False, threads=2)
    out = tmp_path / "killed" / "model"
    run = run_apart(compress_until, tiny_llama, out, text_file, 6, folder=tmp_path)
    assert run.code == -signal.SIGKILL, run.said
    assert list(out.glob("model-*.safetensors")) and not (out / "config.json").exists()
    fettle.compress(tiny_llama, out, recipe, evaluate=False)
    assert digests(out) == digests(tmp_path / "whole" / "model")


def test_another_shape_is_another_run(tiny_llama, text_file, tmp_path):
    fettle.compress(tiny_llama, tmp_path / "out", recipe_of(text_file, *STEPS["drop"]), evaluate=False)
    with pytest.raises(UsageError, match="was started with something else"):
        fettle.compress(tiny_llama, tmp_path / "out", recipe_of(text_file, *STEPS["narrow"]), evaluate=False)


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([GPTQ, {"method": "drop_layers", "drop": 1}], "comes before gptq"),
        ([{"method": "drop_layers", "drop": 1, "where": {"role": "up"}}], "leave 'where' out"),
        ([ROTATION, *STEPS["drop"], GPTQ], "drop_layers gives the model another shape, so it comes before rotation"),
        ([*STEPS["drop"], GPTQ, ROTATION], "step 3: rotation is for the whole model"),
        ([*STEPS["drop"], ROTATION], "rotation alone makes nothing smaller"),
    ],
)
def test_steps_in_an_order_that_cannot_be_are_refused(steps, why, text_file):
    with pytest.raises(RecipeError, match=why):
        recipe_of(text_file, *steps)


def test_a_family_without_a_table_is_refused(tiny_llama, text_file):
    with pytest.raises(RecipeError, match="without a table"):
        prepare(tiny_llama, recipe_of(text_file, *STEPS["drop"]), generic=True)


def test_a_rank_is_settled_for_each_linear_before_bytes_are_counted(tiny_llama, text_file, tmp_path):
    recipe = recipe_of(text_file, {"method": "svd_llm", "energy": 0.8}, {**GPTQ, "where": {"role": "down"}})
    made = fettle.compress(tiny_llama, tmp_path / "out", recipe, evaluate=False)
    plan = fettle.plan(tiny_llama, recipe)
    assert plan.output_bytes == sum(path.stat().st_size for path in made.folder.glob("*.safetensors"))
    ranks = {line["scheme"] for line in made.summary["ledger"] if line["method"] == "svd_llm"}
    assert len(ranks) > 1 and all(scheme.startswith("rank ") for scheme in ranks)
    loaded = fettle.load(made.folder)
    assert loaded.model.model.layers[0].self_attn.q_proj.scheme.grid.is_nothing
    assert fettle.evaluate(made.folder, reference=tiny_llama, max_tokens=600).kl_mean > 0


def test_the_new_shape_is_rotated(tiny_llama, text_file, tmp_path):
    """Reshape, then rotate: of one shape the rotated files are another description of the same function."""
    shape, eight = {"method": "narrow", "hidden": 0.5, "neurons": 0.75}, {"method": "round_to_nearest", "bits": 8}
    recipe = recipe_of(text_file, shape, ROTATION, eight)
    assert [step["method"] for step in recipe.to_dict()["steps"]] == ["narrow", "rotation", "round_to_nearest"]
    assert parse_recipe(recipe.to_dict(), "again") == recipe
    plain = fettle.compress(tiny_llama, tmp_path / "plain", recipe_of(text_file, shape), evaluate=False)
    made = fettle.compress(tiny_llama, tmp_path / "out", recipe, evaluate=False)
    assert made.summary["output"]["bytes"] == fettle.plan(tiny_llama, recipe).output_bytes
    fettle.compress(tiny_llama, tmp_path / "straight", recipe_of(text_file, shape, eight), evaluate=False)
    rotated, straight = (
        fettle.evaluate(tmp_path / name, reference=plain.folder, text=text_file, length=32, max_tokens=512)
        for name in ("out", "straight")
    )  # 8 bits lose as little in either coordinates
    assert max(rotated.error_by_block) < 2 * max(straight.error_by_block) < 0.1
    assert rotated.kl_mean < 2 * straight.kl_mean
    assert set(Checkpoint.open(made.folder).read("model.norm.weight").tolist()) == {1.0}
    assert fettle.evaluate(made.folder, reference=tiny_llama, max_tokens=600).error_by_block == []


def test_a_trimmed_vocabulary_stays_with_a_rotated_model(tiny_llama, tmp_path):
    text = tmp_path / "few.txt"
    text.write_text("a b a b")
    recipe = recipe_of(text, {"method": "trim_vocabulary"}, ROTATION, {"method": "round_to_nearest", "bits": 8})
    made = fettle.compress(tiny_llama, tmp_path / "out", recipe, evaluate=False)
    loaded = fettle.load(made.folder)
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size < Checkpoint.open(tiny_llama).config["vocab_size"]


def test_an_allocation_spreads_over_the_linears_that_are_left(tiny_llama, text_file):
    recipe = recipe_of(text_file, *STEPS["drop"], {"method": "wanda", "pattern": "layer", "sparsity": 0.45})
    spread = allocated(tiny_llama, dataclasses.replace(recipe, allocation="global"))
    assert spread.reshaping == recipe.reshaping and len(spread.compressing) == 7
    assert len({method.sparsity for _, method, _ in spread.compressing}) > 1
    assert len(prepare(tiny_llama, spread).layout.compressions) == 7


def test_one_line_has_a_name():
    assert recipe_from_method("drop_layers", {"drop": 2}).name == "drop-2"
    assert recipe_from_method("narrow", {"parameters": "0.6x"}).name == "narrow-0.6x"
    assert recipe_from_method("svd_llm", {"share": 0.4, "bits": 3}).name == "svd_llm-0.4x-3bit"
