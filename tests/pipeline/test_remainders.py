"""Whole compressions with something beside the codes: planned, written, reloaded, multiplied, and damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fettle
from fettle.errors import CheckpointError
from fettle.evaluate.size import measure_size
from fettle.layers import QuantizedLinear
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import load
from fettle.models.skeleton import Skeleton
from fettle.models.storage import read_quantized, stored_schemes

from .conftest import digests, make_recipe

METHODS: dict[str, dict[str, Any]] = {
    "sparse": {"method": "sparse_outliers", "bits": 3, "outliers": 0.01},
    "factored": {"method": "low_rank_correction", "bits": 3, "rank": 4},
    "bytes": {"method": "sparse_outliers", "bits": 8, "solver": "round_to_nearest", "importance": "magnitude"},
}


@pytest.fixture(scope="module", params=METHODS)
def written(request: Any, tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param) / "out"
    recipe = make_recipe(text_file, **METHODS[request.param])
    plan = fettle.plan(tiny_llama, recipe)
    fettle.compress(tiny_llama, folder, recipe, evaluate=False, threads=2)
    assert plan.shards == {p.name: p.stat().st_size for p in sorted(folder.glob("*.safetensors"))}
    return folder


def test_what_is_loaded_is_what_is_evaluated(written: Path) -> None:
    """The loaded model multiplies codes and remainders; the evaluation dequantizes block by block."""
    loaded = fettle.load(written)
    swapped = [module for module in loaded.model.modules() if isinstance(module, QuantizedLinear)]
    assert len(swapped) == 2 * 7 and all(layer.scheme.remainder is not None for layer in swapped)
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


def test_sizes_and_config(written: Path) -> None:
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fettle"
    assert "beside its codes" in config["why"]
    checkpoint = Checkpoint.open(written)
    anatomy = read_anatomy(checkpoint)
    stored = stored_schemes(checkpoint, anatomy)
    sizes = [(stored[linear.name].scheme.stored_bytes(linear.shape), linear.parameters) for linear in anatomy.linears()]
    bits = 8 * sum(bytes_ for bytes_, _ in sizes) / sum(weights for _, weights in sizes)
    assert measure_size(checkpoint, anatomy).bits_per_weight == pytest.approx(bits)
    ledger = json.loads((written / "fettle.json").read_text())["ledger"]
    for line in ledger:
        linear = anatomy.find(line["linear"])
        assert line["bits_per_weight"] == stored[linear.name].scheme.bits_per_weight(linear.shape)
        assert read_quantized(checkpoint, linear, stored[linear.name]).remainder is not None


def test_transformers_refuses_it(written: Path) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(Exception, match=r"fettle\.load"):
        AutoModelForCausalLM.from_pretrained(str(written))


def test_threads_change_no_byte(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    for name in ("sparse", "factored"):
        recipe = make_recipe(text_file, **METHODS[name])
        for threads in (1, 2):
            fettle.compress(tiny_llama, tmp_path / str(threads) / name, recipe, evaluate=False, threads=threads)
        assert digests(tmp_path / "1" / name) == digests(tmp_path / "2" / name)


@pytest.mark.parametrize(
    ("kind", "tensor", "match"),
    [
        ("sparse", "weight_sparse_columns", "column 255 of 64"),
        ("sparse", "weight_sparse_offsets", "must ascend"),
        ("sparse", "weight_sparse_values", "NaN"),
        ("factored", "weight_factor_left", "NaN"),
        ("factored", "weight_factor_right", "are missing"),
    ],
)
def test_damage_is_named(tiny_llama: Path, text_file: Path, tmp_path: Path, kind: str, tensor: str, match: str) -> None:
    recipe = make_recipe(text_file, **{**METHODS[kind], "solver": "round_to_nearest"})
    folder = tmp_path / "out"
    fettle.compress(tiny_llama, folder, recipe, evaluate=False)
    shard = next(iter(sorted(folder.glob("*.safetensors"))))
    tensors = load_file(shard)
    name = f"model.layers.0.self_attn.k_proj.{tensor}"
    if "missing" in match:
        del tensors[name]
    elif tensors[name].is_floating_point():
        tensors[name].view(-1)[1] = float("nan")
    else:
        tensors[name][1] = 255
    save_file(tensors, shard, metadata={"format": "pt"})
    if "missing" in match:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        del index["weight_map"][name]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError if "NaN" not in match else fettle.errors.NonFiniteError, match=match):
        load(folder, verify=False)
    with pytest.raises(CheckpointError):
        fettle.load(folder)
    shutil.rmtree(folder)
