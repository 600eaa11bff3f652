"""Recipes: what they mean, what they refuse, and that they survive a round trip."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fettle.errors import RecipeError
from fettle.pipeline.recipe import load_recipe, parse_recipe, shipped_recipes
from fettle.pipeline.where import Where, parse_blocks

GPTQ = {"method": "gptq", "bits": 4, "group_size": 32}


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda p: p.stem)
def test_shipped_recipes_are_short_and_survive_yaml(path):
    recipe = load_recipe(path)
    assert len(path.read_text().splitlines()) <= 25
    assert parse_recipe(yaml.safe_load(recipe.to_yaml()), "again") == recipe
    assert load_recipe(path.stem) == recipe


def test_unknown_words_offer_the_nearest_spelling():
    with pytest.raises(RecipeError, match="did you mean 'steps'"):
        parse_recipe({"step": [GPTQ]}, "r.yaml")
    with pytest.raises(RecipeError, match="did you mean 'gptq'"):
        parse_recipe({"steps": [{"method": "gtpq"}]}, "r.yaml")
    with pytest.raises(RecipeError, match="did you mean 'group_size'"):
        parse_recipe({"steps": [{"method": "gptq", "groupsize": 32}]}, "r.yaml")
    with pytest.raises(RecipeError, match="did you mean 'role'"):
        parse_recipe({"steps": [GPTQ | {"where": {"roles": "query"}}]}, "r.yaml")
    with pytest.raises(RecipeError, match="did you mean 'windows'"):
        parse_recipe({"steps": [GPTQ], "calibration": {"window": 3}}, "r.yaml")
    with pytest.raises(RecipeError, match="did you mean 'gptq-4bit'"):
        load_recipe("gptq-4bits")


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("text", "a recipe is a mapping"),
        ({"steps": []}, "at least one step"),
        ({"steps": [GPTQ | {"bits": 9}]}, "bits"),
        ({"steps": [GPTQ | {"bits": "four"}]}, "bits"),
        ({"steps": [GPTQ | {"group_size": 0}]}, "group_size"),
        ({"steps": [GPTQ], "calibration": {"windows": 0}}, "at least 1"),
        ({"steps": [GPTQ], "calibration": {"length": True}}, "integer"),
        ({"steps": [GPTQ], "calibration": {"order": "sideways"}}, "together"),
        ({"steps": [GPTQ], "storage": "zip"}, "pack-quantized"),
        ({"steps": [GPTQ], "storage": "int-quantized"}, "8 bits"),
        ({"steps": [GPTQ | {"where": {"blocks": "one"}}]}, "no list of blocks"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(recipe, told):
    with pytest.raises(RecipeError, match=told):
        parse_recipe(recipe, "r.yaml")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("name: 2024-99-01", "month must be in 1..12"),
        ("steps: " + "[" * 500, "r.yaml"),
        ("steps: " + "[" * 5000, "r.yaml"),
        ("[*500", "r.yaml"),
        ("seed: " + "9" * 5000, "r.yaml"),
        ("steps: [{method: gptq, bits: 0x" + "f" * 5000 + "}]", "r.yaml"),
        ('name: "\\ud800"', "surrogates not allowed"),
        ("steps: [{method: gptq, bits: 4, bits: 3}]", "the key 'bits' stands twice"),
        ("name: a\nname: b", "the key 'name' stands twice"),
        ("? [1]\n: 2", "r.yaml"),
        ("? {a: 1}\n: 2", "r.yaml"),
        (b"name: \xff", "no YAML"),
        ("steps: &a [*a]", "a step is a mapping"),
    ],
)
def test_what_is_no_yaml_or_means_two_things_is_refused(tmp_path, content, told):
    path = tmp_path / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError, match=told):
        load_recipe(path)


def test_anchors_and_merges_mean_what_yaml_says(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("steps:\n- &a {method: gptq, bits: 4}\n- {<<: *a, bits: 3, where: {role: down}}\n")
    assert [step.method.bits for step in load_recipe(path).steps] == [4, 3]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"where": {"role": 5}}, "'role' is a name or a list of names, got 5"),
        ({"where": {"role": {"a": 1}}}, "'role' is a name or a list of names"),
    ],
)
def test_a_role_is_a_word(changes, told):
    with pytest.raises(RecipeError, match=told):
        parse_recipe({"steps": [GPTQ | changes]}, "r.yaml")


@pytest.mark.parametrize("seed", [2**63, 2**80, -1])
def test_a_seed_is_what_a_generator_takes(seed):
    with pytest.raises(RecipeError, match=f"seed={seed}"):
        parse_recipe({"steps": [GPTQ], "calibration": {"seed": seed}}, "r.yaml")
    parse_recipe({"steps": [GPTQ], "calibration": {"seed": 2**63 - 1}}, "r.yaml")


def test_none_is_spelled_in_yaml_as_in_the_help(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("steps:\n- {method: gptq, bits: 4, group_size: none}\n")
    (step,) = load_recipe(path).steps
    assert step.method.group_size is None


@given(st.sets(st.integers(0, 11), min_size=1))
def test_blocks_name_exactly_what_they_list(chosen):
    assert parse_blocks(",".join(str(c) for c in chosen), 12) == chosen
    assert parse_blocks(",".join(str(c - 12) for c in chosen), 12) == chosen


def test_block_ranges_and_their_limits():
    assert parse_blocks("0-2, 5,-1", 8) == {0, 1, 2, 5, 7}
    with pytest.raises(RecipeError, match="outside 0 to 7"):
        parse_blocks("6-8", 8)
    with pytest.raises(RecipeError, match="outside"):
        parse_blocks("-9", 8)


def test_routers_embeddings_and_head_are_touched_only_by_name(tiny_anatomy):
    everything = Where()
    touched = {linear.role for linear in tiny_anatomy.linears() if everything.matches(linear, 2)}
    assert touched == {"query", "key", "value", "output", "gate", "up", "down"}
    assert not everything.matches(tiny_anatomy.embedding, 2)
    assert Where(role=("embedding",)).matches(tiny_anatomy.embedding, 2)
    assert Where(name=tiny_anatomy.embedding.name).matches(tiny_anatomy.embedding, 2)
    assert not Where(blocks="0").matches(tiny_anatomy.embedding, 2)
