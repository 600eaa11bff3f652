"""Whole compressions that prune: planned, written, reloaded, multiplied; killed, dense, allocated, refused, damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fettle
from fettle.cli.main import main
from fettle.errors import CheckpointError, NonFiniteError, RecipeError
from fettle.evaluate.size import measure_size
from fettle.layers import QuantizedLinear
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import load
from fettle.models.skeleton import Skeleton
from fettle.models.storage import stored_schemes
from fettle.pipeline.recipe import Recipe, parse_recipe
from fettle.tensors import MaskedScheme

from .conftest import digests

METHODS: dict[str, dict[str, Any]] = {
    "plain": {"method": "wanda"},
    "codes": {"method": "sparsegpt", "pattern": "2:4", "bits": 4, "asymmetric": True, "tune_steps": 3},
    "blocks": {"method": "magnitude", "pattern": "2x4", "sparsity": 0.3},
    "gradient": {"method": "taylor", "sparsity": 0.4},
}


def recipe_of(text: Path, step: dict[str, Any], **keys: Any) -> Recipe:
    calibration = {"windows": 6, "length": 32, "seed": 0, "text": str(text)}
    return parse_recipe({"name": "small", "steps": [step], "calibration": calibration, **keys}, "test")


@pytest.fixture(scope="module", params=METHODS)
def written(request: Any, tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param) / "out"
    recipe = recipe_of(text_file, METHODS[request.param])
    plan = fettle.plan(tiny_llama, recipe)
    fettle.compress(tiny_llama, folder, recipe, evaluate=False, threads=2)
    assert plan.shards == {p.name: p.stat().st_size for p in sorted(folder.glob("*.safetensors"))}
    return folder


def test_what_is_loaded_is_what_is_evaluated(written: Path) -> None:
    """The loaded model keeps masks and multiplies with them; the evaluation makes each block dense."""
    loaded = fettle.load(written)
    swapped = [module for module in loaded.model.modules() if isinstance(module, QuantizedLinear)]
    assert len(swapped) == 2 * 7 and all(isinstance(layer.scheme, MaskedScheme) for layer in swapped)
    checkpoint = Checkpoint.open(written)
    anatomy = read_anatomy(checkpoint)
    skeleton = Skeleton.build(checkpoint, anatomy)
    ids = torch.arange(40)[None] * 7 % 320
    hidden = skeleton.embed(ids)
    for block in anatomy.blocks:
        skeleton.load_block(block.index)
        hidden = skeleton.run_block(block.index, hidden)
    with torch.no_grad():
        logits = loaded.model(ids).logits
    torch.testing.assert_close(logits, skeleton.logits(hidden), rtol=1e-4, atol=1e-3)


def test_counts_sizes_ledger_and_config(written: Path) -> None:
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fettle" and "is pruned" in config["why"]
    checkpoint = Checkpoint.open(written)
    anatomy = read_anatomy(checkpoint)
    stored = stored_schemes(checkpoint, anatomy)
    sizes = [(stored[linear.name].scheme.stored_bytes(linear.shape), linear.parameters) for linear in anatomy.linears()]
    bits = 8 * sum(bytes_ for bytes_, _ in sizes) / sum(weights for _, weights in sizes)
    assert measure_size(checkpoint, anatomy).bits_per_weight == pytest.approx(bits)
    dense = {name: value for name, value in fettle.load(written).model.named_modules()}
    for line in json.loads((written / "fettle.json").read_text())["ledger"]:
        linear, scheme = anatomy.find(line["linear"]), stored[line["linear"]].scheme
        assert isinstance(scheme, MaskedScheme)
        assert line["bits_per_weight"] == scheme.bits_per_weight(linear.shape)
        layer = dense[linear.name]
        assert isinstance(layer, QuantizedLinear)
        assert int((layer.dequantize() != 0).sum()) <= scheme.kept_count(linear.shape)
    assert "pruned" in fettle.inspect(written)["blocks"][0]["linears"][0]["scheme"]


def test_transformers_refuses_it(written: Path) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(Exception, match=r"fettle\.load"):
        AutoModelForCausalLM.from_pretrained(str(written))


@pytest.mark.parametrize("name", ["codes", "gradient"])
def test_threads_change_no_byte(tiny_llama: Path, text_file: Path, tmp_path: Path, name: str) -> None:
    for threads in (1, 2):
        recipe = recipe_of(text_file, METHODS[name])
        fettle.compress(tiny_llama, tmp_path / str(threads) / "out", recipe, evaluate=False, threads=threads)
    assert digests(tmp_path / "1" / "out") == digests(tmp_path / "2" / "out")


def test_a_stopped_run_goes_on_to_the_same_bytes(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fettle.pipeline import walk

    recipe = recipe_of(text_file, {**METHODS["gradient"], "heal": "least_squares", "rounds": 2})
    fettle.compress(tiny_llama, tmp_path / "whole" / "out", recipe, evaluate=False)
    write, done = walk.write_shard, []

    def stopping(*args: Any) -> str:
        if done:
            raise KeyboardInterrupt
        done.append(args)
        return write(*args)

    monkeypatch.setattr(walk, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        fettle.compress(tiny_llama, tmp_path / "stopped" / "out", recipe, evaluate=False)
    monkeypatch.setattr(walk, "write_shard", write)
    fettle.compress(tiny_llama, tmp_path / "stopped" / "out", recipe, evaluate=False)
    assert digests(tmp_path / "stopped" / "out") == digests(tmp_path / "whole" / "out")


def test_dense_is_the_same_model_for_any_loader(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    step = {"method": "sparsegpt", "pattern": "2:4", "tune_steps": 3}
    recipe = recipe_of(text_file, step, storage="dense")
    plan = fettle.plan(tiny_llama, recipe)
    fettle.compress(tiny_llama, tmp_path / "dense", recipe, evaluate=False)
    fettle.compress(tiny_llama, tmp_path / "masked", recipe_of(text_file, step), evaluate=False)
    assert plan.output_bytes == sum(p.stat().st_size for p in (tmp_path / "dense").glob("*.safetensors"))
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(str(tmp_path / "dense"), dtype=torch.float32)
    masked = fettle.load(tmp_path / "masked").model
    ids = torch.arange(30)[None] * 7 % 320
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, masked(ids).logits, rtol=1e-4, atol=1e-3)
    weight = plain.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert bool(((weight != 0).view(172, 16, 4).sum(-1) <= 2).all())


@pytest.mark.parametrize(
    ("method", "allocation"),
    [
        ("magnitude", "global"),
        ("magnitude", "outliers"),
        ("magnitude", "sensitivity"),
        ("wanda", "global"),
        ("taylor", "global"),
    ],
)
def test_an_allocation_loses_exactly_as_many_weights(
    tiny_llama: Path, text_file: Path, tmp_path: Path, method: str, allocation: str
) -> None:
    recipe = recipe_of(text_file, {"method": method, "pattern": "layer", "sparsity": 0.45}, allocation=allocation)
    made = fettle.compress(tiny_llama, tmp_path / "out", recipe, evaluate=False)
    checkpoint = Checkpoint.open(tmp_path / "out")
    anatomy = read_anatomy(checkpoint)
    stored = stored_schemes(checkpoint, anatomy)
    shares, pruned = set(), 0
    for linear in anatomy.linears():
        scheme = stored[linear.name].scheme
        assert isinstance(scheme, MaskedScheme)
        pruned += linear.parameters - scheme.kept_count(linear.shape)
        shares.add(round(scheme.sparsity, 6))
    assert pruned == round(0.45 * sum(linear.parameters for linear in anatomy.linears()))
    assert len(shares) > 1
    assert "allocation" not in made.summary["recipe"]


def test_the_command_line_says_it_all(tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: Any) -> None:
    flags = ["--calibration", str(text_file), "--windows", "4", "--length", "32", "--no-evaluate", "--json"]
    sparse = ["--method", "sparsegpt", "--pattern", "2:4", "--bits", "4", "--tune-steps", "2"]
    assert main(["compress", str(tiny_llama), "-o", str(tmp_path / "a"), *sparse, *flags]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["summary"]["recipe"]["name"] == "sparsegpt-2:4-4bit"
    assert "50% pruned, 2:4, int4" in told["summary"]["ledger"][0]["scheme"]
    dense = ["--method", "wanda", "--sparsity", "0.5", "--dense"]
    assert main(["compress", str(tiny_llama), "-o", str(tmp_path / "b"), *dense, *flags]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["recipe"]["storage"] == "dense"


@pytest.mark.parametrize(
    ("step", "keys", "match"),
    [
        ({"method": "wanda", "pattern": "3:7"}, {}, r"q_proj: the pattern 3:7 needs inputs in multiples of 7"),
        ({"method": "gptq"}, {"storage": "dense"}, "gptq gives codes"),
        ({"method": "gptq"}, {"allocation": "outliers"}, "one pruning step"),
        ({"method": "wanda", "pattern": "2:4"}, {"allocation": "global"}, "one pruning step"),
        ({"method": "wanda"}, {"allocation": "owl"}, "unknown allocation 'owl'"),
        ({"method": "taylor", "where": {"role": "head"}}, {}, "stands outside the blocks"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    tiny_llama: Path, text_file: Path, step: dict[str, Any], keys: dict[str, Any], match: str
) -> None:
    with pytest.raises(RecipeError, match=match):
        fettle.plan(tiny_llama, recipe_of(text_file, step, **keys))


@pytest.fixture
def tied(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny model with one matrix for embedding and head."""
    folder = tmp_path / "tied"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("method", "allocation"),
    [("magnitude", "global"), ("wanda", "global"), ("magnitude", "outliers"), ("magnitude", "sensitivity")],
)
@pytest.mark.parametrize("shared", [True, False])
def test_an_allocation_takes_embedding_and_head_along(
    request: pytest.FixtureRequest, text_file: Path, tmp_path: Path, method: str, allocation: str, shared: bool
) -> None:
    model = request.getfixturevalue("tied" if shared else "tiny_llama")
    where = {"role": ["embedding", "head", "query", "down"]}
    step = {"method": method, "pattern": "layer", "sparsity": 0.4, "where": where}
    recipe = recipe_of(text_file, step, allocation=allocation)
    fettle.compress(model, tmp_path / "out", recipe, evaluate=False)
    checkpoint = Checkpoint.open(tmp_path / "out")
    anatomy = read_anatomy(checkpoint)
    assert anatomy.embedding is not None
    assert anatomy.head is not None
    outside = [anatomy.embedding] if shared else [anatomy.embedding, anatomy.head]
    pruned = [linear for linear in (*anatomy.linears(), *outside) if linear.role in where["role"]]
    stored = stored_schemes(checkpoint, anatomy)
    gone, weights = 0, sum(linear.parameters for linear in pruned)
    for linear in pruned:
        scheme = stored[linear.name].scheme
        assert isinstance(scheme, MaskedScheme)
        gone += linear.parameters - scheme.kept_count(linear.shape)
    assert abs(gone - 0.4 * weights) <= len(outside)  # those that nothing is known of are rounded alone
    share = stored[outside[0].name].scheme.sparsity
    known = allocation != "sensitivity" and (shared or (method == "magnitude" and allocation == "global"))
    assert (abs(share - 0.4) > 1e-4) == known


def test_an_allocation_by_gradients_refuses_what_has_none(tied: Path, text_file: Path, tmp_path: Path) -> None:
    step = {"method": "taylor", "pattern": "layer", "where": {"role": ["embedding", "head"]}}
    with pytest.raises(RecipeError, match="outside the blocks"):
        fettle.compress(tied, tmp_path / "out", recipe_of(text_file, step, allocation="global"))


def test_a_tied_matrix_is_pruned_on_both_sides_or_not_at_all(tied: Path, text_file: Path, tmp_path: Path) -> None:
    one = recipe_of(text_file, {"method": "magnitude", "where": {"role": "head"}})
    with pytest.raises(RecipeError, match="are one matrix, and the recipe prunes one side"):
        fettle.plan(tied, one)
    both = recipe_of(text_file, {"method": "magnitude", "where": {"role": ["embedding", "head"]}})
    fettle.compress(tied, tmp_path / "out", both, evaluate=False)
    assert bool((fettle.load(tmp_path / "out").model.lm_head.weight == 0).float().mean() >= 0.5)


@pytest.mark.parametrize(
    ("tensor", "match"),
    [("weight_values", "NaN"), ("weight_mask", "the mask keeps"), ("weight_shape", "weight_shape says")],
)
def test_damage_is_named(tiny_llama: Path, text_file: Path, tmp_path: Path, tensor: str, match: str) -> None:
    folder = tmp_path / "out"
    fettle.compress(tiny_llama, folder, recipe_of(text_file, {"method": "magnitude"}), evaluate=False)
    shard = next(iter(sorted(folder.glob("*.safetensors"))))
    tensors = load_file(shard)
    name = f"model.layers.0.self_attn.k_proj.{tensor}"
    tensors[name].view(-1)[0] = float("nan") if tensor == "weight_values" else 1 if tensor == "weight_mask" else -1
    if tensor == "weight_mask":
        tensors[name].fill_(255)
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError if match == "NaN" else CheckpointError, match=match):
        load(folder, verify=False)
    with pytest.raises(CheckpointError):
        fettle.load(folder)


def test_a_budget_may_choose_between_masks_and_codes(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    budget = fettle.Budget(bits_per_weight=6.5, candidates=("wanda pattern=2:4 bits=4", "gptq bits=8", "gptq bits=4"))
    chosen = recipe_of(text_file, {"method": "gptq"})
    made = fettle.compress(tiny_llama, tmp_path / "out", chosen, evaluate=False, budget=budget)
    assert fettle.load(tmp_path / "out").model is not None
    assert made.summary["output"]["bytes"] > 0


def test_a_pattern_in_a_file_is_no_number_to_the_base_of_sixty(tmp_path: Path) -> None:
    from fettle.pipeline.recipe import load_recipe

    (tmp_path / "r.yaml").write_text("steps:\n  - {method: wanda, pattern: 2:4, bits: 4, group_size: 64}\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.to_dict()["steps"][0]["pattern"] == "2:4"
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml").steps == recipe.steps
