"""A whole compression with vector codes: planned, written, reloaded, multiplied, damaged, and refused elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fettle
from fettle.errors import CheckpointError, NonFiniteError, RecipeError
from fettle.evaluate.size import measure_size
from fettle.layers import QuantizedLinear
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import load
from fettle.models.skeleton import Skeleton
from fettle.models.storage import stored_schemes
from fettle.pipeline.recipe import parse_recipe
from fettle.search.budget import Budget
from fettle.tensors.vectors import VectorScheme

from .conftest import digests, make_recipe

# one bit, whose table is short, and two linears with the long one
STEP = {"method": "residual_codebooks", "bits": 1, "steps": 4, "batch_windows": 2, "refine_passes": 1}


@pytest.fixture(scope="module")
def written(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors") / "two" / "out"
    recipe = parse_recipe(
        {
            "name": "vectors",
            "steps": [
                STEP,
                {**STEP, "bits": 3, "refine_passes": 0, "where": {"name": "*.layers.0.*k_proj"}},
                {**STEP, "scale_dtype": "float8_e4m3fn", "where": {"role": "embedding"}},
            ],
            "calibration": {"windows": 4, "length": 32, "seed": 0, "text": str(text_file)},
        },
        "test",
    )
    plan = fettle.plan(tiny_llama, recipe)
    fettle.compress(tiny_llama, folder, recipe, evaluate=False, threads=2)
    assert plan.shards == {p.name: p.stat().st_size for p in sorted(folder.glob("*.safetensors"))}
    fettle.compress(tiny_llama, folder.parent.parent / "one" / "out", recipe, evaluate=False, threads=1)
    assert digests(folder) == digests(folder.parent.parent / "one" / "out")
    return folder


def test_what_is_loaded_is_what_is_evaluated(written: Path) -> None:
    """The loaded model multiplies codes; the evaluation dequantizes block by block."""
    loaded = fettle.load(written)
    swapped = [module for module in loaded.model.modules() if isinstance(module, QuantizedLinear)]
    assert sum(isinstance(layer.scheme, VectorScheme) for layer in swapped) == 2 * 7
    checkpoint = Checkpoint.open(written)
    skeleton = Skeleton.build(checkpoint, read_anatomy(checkpoint))
    ids = torch.arange(40)[None] * 7 % 320
    hidden = skeleton.embed(ids)
    for block in read_anatomy(checkpoint).blocks:
        skeleton.load_block(block.index)
        hidden = skeleton.run_block(block.index, hidden)
    with torch.no_grad():
        logits = loaded.model(ids).logits
    torch.testing.assert_close(logits, skeleton.logits(hidden), rtol=1e-4, atol=1e-3)


def test_sizes_and_config(written: Path) -> None:
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fettle"
    assert "eight weights at once" in config["why"]
    checkpoint = Checkpoint.open(written)
    anatomy = read_anatomy(checkpoint)
    stored = stored_schemes(checkpoint, anatomy)
    ledger = json.loads((written / "fettle.json").read_text())["ledger"]
    assert len(ledger) == 2 * 7 + 1  # a tied embedding is one matrix
    for line in ledger:
        linear = anatomy.find(line["linear"])
        assert line["bits_per_weight"] == stored[linear.name].scheme.bits_per_weight(linear.shape)
        assert line["scheme"].startswith("E8 codes")
    linears = list(anatomy.linears())
    coded = [*linears, anatomy.embedding]
    sizes = [(stored[x.name].scheme.stored_bytes(x.shape), x.parameters) for x in coded if x is not None]
    bits = 8 * sum(size for size, _ in sizes) / sum(weights for _, weights in sizes)
    assert measure_size(checkpoint, anatomy).bits_per_weight == pytest.approx(bits)
    assert {stored[x.name].scheme.bits for x in linears} == {1, 3}


def test_transformers_refuses_it(written: Path) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(Exception, match=r"fettle\.load"):
        AutoModelForCausalLM.from_pretrained(str(written))


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(RecipeError, match="holds no vector codes"):
        parse_recipe({"name": "x", "storage": "int-quantized", "steps": [STEP]}, "test")
    with pytest.raises(RecipeError, match="multiples of 8"):
        parse_recipe({"name": "x", "steps": [{**STEP, "group_size": 20}]}, "test")


@pytest.mark.parametrize("tensor", ["weight_packed", "weight_scale"])
def test_damage_is_named(written: Path, tmp_path: Path, tensor: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(written, folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = f"model.layers.0.self_attn.k_proj.{tensor}"
    if tensor == "weight_scale":
        tensors[name].view(-1)[0] = float("nan")
    else:
        tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError if tensor == "weight_scale" else CheckpointError, match="k_proj"):
        load(folder, verify=False)
    with pytest.raises(CheckpointError):
        fettle.load(folder)


@pytest.mark.exhaustive
def test_a_budget_may_choose_among_them(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    made = fettle.compress(
        tiny_llama,
        tmp_path / "mix",
        make_recipe(text_file),
        budget=Budget(
            bits_per_weight=2.3, candidates=("residual_codebooks bits=1 steps=0 refine_passes=0", "gptq bits=2")
        ),
        evaluate=False,
    )
    used = {line["scheme"] for line in made.summary["ledger"]}
    assert any(scheme.startswith("E8 codes") for scheme in used)
