"""Trainings behind other steps: pruned, rescaled, rotated and factored bases, small floats, shapes carried on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fettle
from fettle.errors import RecipeError, UsageError
from fettle.methods.train import Distill, Qat
from fettle.methods.train.curve import Curve
from fettle.methods.train.lineage import moved
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import load
from fettle.pipeline.recipe import parse_recipe

Trained = Callable[..., tuple[Path, Curve]]


def compressed(model: Path, output: Path, text: Path, *steps: dict[str, Any]) -> Path:
    calibration = {"windows": 4, "length": 32, "text": str(text)}
    recipe = parse_recipe({"name": "small", "steps": list(steps), "calibration": calibration}, "test")
    fettle.compress(model, output, recipe, evaluate=False)
    return output


@pytest.mark.parametrize("bits", [8, 4])
def test_small_floats_learn_and_are_read_back(tiny_llama: Path, trained: Trained, bits: int) -> None:
    fields: dict[str, Any] = {"scale_dtype": "float8_e8m0fnu", "group_size": 32} if bits == 4 else {}
    output, _ = trained(Qat, tiny_llama, grid="float", bits=bits, steps=2, **fields)
    loaded = load(output)
    assert torch.isfinite(loaded.model(torch.arange(2, 12)[None]).logits).all()


def test_what_moves_weights_is_told(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    def why(name: str, *steps: dict[str, Any]) -> str | None:
        return moved(Checkpoint.open(compressed(tiny_llama, tmp_path / name, text_file, *steps)))

    nearest = {"method": "round_to_nearest", "bits": 8}
    assert why("plain", nearest) is None
    assert why("rotated", {"method": "rotation"}, nearest) == "it is rotated"
    assert why("rescaled", {"method": "smoothquant"}) == "smoothquant rescaled its columns"
    assert why("shaped", {"method": "drop_layers", "drop": 1}, nearest) == "it has another shape"


def test_a_shape_is_told_by_the_compression_after_it(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    shaped = compressed(tiny_llama, tmp_path / "shaped", text_file, {"method": "drop_layers", "drop": 1})
    small = compressed(shaped, tmp_path / "small", text_file, {"method": "round_to_nearest", "bits": 8})
    assert fettle.evaluate(small, reference=tiny_llama, text=text_file, length=32, max_tokens=256).kl_mean is not None


def test_a_pruned_folder_is_healed_with_its_zeros(
    tiny_llama: Path, text_file: Path, trained: Trained, tmp_path: Path
) -> None:
    pruned = compressed(tiny_llama, tmp_path / "pruned", text_file, {"method": "wanda", "sparsity": 0.5})
    with pytest.raises(UsageError, match="--keep-zeros"):
        trained(Distill, pruned, tiny_llama, steps=1)
    output, _ = trained(Distill, pruned, tiny_llama, teacher=str(tiny_llama), steps=2, keep_zeros=True, keep="last")
    before, healed = load(pruned, dense=True), Checkpoint.open(output)
    assert not any(name.endswith((".weight_values", ".weight_mask")) for name in healed.entries)
    for linear in before.anatomy.linears():
        if linear.block is not None:
            went = before.model.get_submodule(linear.name).weight == 0
            assert bool((healed.read(linear.weight_name)[went] == 0).all()) and bool(went.any())


def test_factors_are_refused_with_a_reason(tiny_llama: Path, text_file: Path, trained: Trained, tmp_path: Path) -> None:
    halves = compressed(tiny_llama, tmp_path / "halves", text_file, {"method": "svd", "share": 0.5})
    with pytest.raises(RecipeError, match="more than that"):
        trained(Qat, halves, tiny_llama, steps=1)
