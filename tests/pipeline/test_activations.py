"""Quantized inputs from the recipe to the written folder: measured, loaded and run by others as they are written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fettle
from fettle.errors import CheckpointError, RecipeError
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.skeleton import Skeleton
from fettle.pipeline.recipe import CalibrationOptions, Recipe, load_recipe, parse_recipe, recipe_from_method

from ..parity.tiny_models import write_model
from .conftest import digests

DYNAMIC = {"bits": 8, "granularity": "channel", "activations": "dynamic"}
STATIC = {"bits": 8, "granularity": "channel", "activations": "static", "activation_asymmetric": True}
CASES = {
    "dynamic": DYNAMIC,
    "dynamic, asymmetric": {**DYNAMIC, "activation_asymmetric": True},
    "dynamic, a tensor": {**DYNAMIC, "activation_granularity": "tensor"},
    "static": STATIC,
    "static, symmetric": {**STATIC, "activation_asymmetric": False, "observer": "minmax"},
    "static by the recipe": {},
    "static, outliers apart": {**STATIC, "activation_outliers": 0.01},
    "4 bits by groups": {"bits": 4, "activations": "dynamic"},
}


def recipe_of(text: Path, fields: dict[str, Any], method: str = "round_to_nearest") -> Recipe:
    return recipe_from_method(method, fields, CalibrationOptions(windows=6, length=32, text=str(text)))


def streamed(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits as the evaluation computes them."""
    checkpoint = Checkpoint.open(folder)
    anatomy = read_anatomy(checkpoint)
    skeleton = Skeleton.build(checkpoint, anatomy)
    hidden = skeleton.embed(ids)
    for index in range(len(anatomy.blocks)):
        skeleton.load_block(index)
        hidden = skeleton.run_block(index, hidden)
        skeleton.free_block(index)
    return skeleton.logits(hidden)


@pytest.mark.parametrize("name", CASES)
def test_evaluation_loaded_model_and_plain_transformers_agree(
    name: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    recipe = recipe_of(text_file, CASES[name])
    if name == "static by the recipe":  # static and dynamic linears side by side, weights rescaled
        recipe = replace(load_recipe("w8a8-static"), calibration=recipe.calibration)
    made = fettle.compress(tiny_llama, out, recipe, evaluate=False)
    ids = torch.arange(3, 43).reshape(1, -1)
    with torch.no_grad():
        loaded = fettle.load(out).model(ids).logits
        assert torch.equal(streamed(out, ids), loaded)
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        plain = fettle.load(tiny_llama).model(ids).logits
        assert float((plain - loaded).abs().max()) > 0
        if name in ("4 bits by groups", "static, outliers apart"):
            assert config["quant_method"] == "fettle"  # 172 inputs are no whole number of groups
            return
        assert config["quant_method"] == "compressed-tensors"
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(theirs, loaded, rtol=1e-4, atol=1e-3)
    measured = fettle.evaluate(out, reference=tiny_llama, text=text_file, length=32, max_tokens=256)
    assert measured.kl_mean is not None
    weights = recipe_of(text_file, {"bits": 8, "granularity": "channel"})
    fettle.compress(tiny_llama, tmp_path / "weights", weights, evaluate=False)
    alone = fettle.evaluate(tmp_path / "weights", reference=tiny_llama, text=text_file, length=32, max_tokens=256)
    assert alone.kl_mean is not None
    assert alone.kl_mean < measured.kl_mean < 0.1  # the inputs' rounding is measured, and small
    ledger = made.summary["ledger"][0]
    assert measured.bits_per_weight == pytest.approx(
        sum(x["bits_per_weight"] * n for x, n in _sizes(made.summary["ledger"])) / _weights(made.summary["ledger"])
    )
    assert "inputs int8" in ledger["scheme"]


def _sizes(ledger: list[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    sizes = {"q_proj": 64 * 64, "k_proj": 32 * 64, "v_proj": 32 * 64, "o_proj": 64 * 64}
    return [(line, sizes.get(line["linear"].rsplit(".", 1)[-1], 64 * 172)) for line in ledger]


def _weights(ledger: list[dict[str, Any]]) -> int:
    return sum(count for _, count in _sizes(ledger))


@pytest.mark.parametrize("method", ["gptq", "learned_rounding"])
def test_methods_that_look_at_data_meet_the_quantized_inputs(
    method: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(text_file, {**STATIC, "bits": 4, "group_size": 4, "granularity": "group"}, method)
    fettle.compress(tiny_llama, tmp_path / "out", recipe, evaluate=False)
    ids = torch.arange(3, 43).reshape(1, -1)
    with torch.no_grad():
        assert torch.equal(streamed(tmp_path / "out", ids), fettle.load(tmp_path / "out").model(ids).logits)


@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_threads_and_a_resumed_run_write_the_same_bytes(
    name: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(text_file, CASES[name], "gptq")
    for threads in (1, 2):
        (tmp_path / str(threads)).mkdir()
        fettle.compress(tiny_llama, tmp_path / str(threads) / "out", recipe, evaluate=False, threads=threads)
    whole = digests(tmp_path / "1" / "out")
    assert digests(tmp_path / "2" / "out") == whole
    (tmp_path / "1" / "out" / "fettle.json").unlink()
    sorted((tmp_path / "1" / "out").glob("model-*"))[-1].unlink()
    fettle.compress(tiny_llama, tmp_path / "1" / "out", recipe, evaluate=False)
    assert digests(tmp_path / "1" / "out") == whole


def test_conv1d_quantizes_its_inputs_too(tmp_path: Path, text_file: Path) -> None:
    write_model("gpt2", tmp_path / "base")
    recipe = recipe_of(text_file, DYNAMIC)
    fettle.compress(tmp_path / "base", tmp_path / "out", recipe, evaluate=False)
    ids = torch.arange(3, 23).reshape(1, -1)
    with torch.no_grad():
        loaded = fettle.load(tmp_path / "out").model(ids).logits
        assert torch.equal(streamed(tmp_path / "out", ids), loaded)


def test_generation_runs(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    fettle.compress(tiny_llama, tmp_path / "out", recipe_of(text_file, DYNAMIC), evaluate=False)
    model = fettle.load(tmp_path / "out").model
    grown = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert grown.shape[1] > 3


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"activations": "static", "activation_granularity": "token"}, "nobody has seen yet"),
        ({"activation_bits": 4}, "activations is none"),
        ({"observer": "minmax"}, "activations is none"),
        ({"activations": "dynamic", "observer": "minmax"}, "found on the spot"),
        ({"activation_outliers": 0.01}, "activations is none"),
        ({"activations": "dynamic", "activation_outliers": 0.01}, "beyond a stored range"),
        ({"activations": "static", "activation_outliers": 0.01, "observer": "minmax"}, "leave one of the two out"),
        (
            {"activations": "dynamic", "activation_granularity": "channel"},
            "allowed: token, tensor, group, tensor_group, none",
        ),
        ({"activations": "weekly"}, "allowed: none, dynamic, static"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        recipe_from_method("round_to_nearest", fields)


def test_heads_experts_and_candidates_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    step = {"method": "round_to_nearest", **DYNAMIC}
    head = parse_recipe({"steps": [{**step, "where": {"role": "head"}}]}, "test")
    with pytest.raises(RecipeError, match="lm_head"):
        fettle.compress(tiny_llama, tmp_path / "out", head, evaluate=False)
    write_model("mixtral", tmp_path / "moe")
    with pytest.raises(RecipeError, match="all experts"):
        fettle.compress(tmp_path / "moe", tmp_path / "out", parse_recipe({"steps": [step]}, "test"), evaluate=False)
    with pytest.raises(RecipeError, match="inputs as they are"):
        fettle.diagnose(tiny_llama, candidates=[step])


def test_inputs_in_other_formats_are_refused(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fettle.compress(tiny_llama, out, recipe_of(text_file, DYNAMIC), evaluate=False)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] |= {"type": "float", "num_bits": 4}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"inputs of .* are quantized as 4-bit float"):
        fettle.load(out)
