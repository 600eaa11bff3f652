"""The whole path: prune, write, load, the same logits; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.vision.networks import NAMES, images, images_file, write
from transformers import AutoModelForImageClassification

import fettle
from fettle.api.questions import load
from fettle.errors import CheckpointError, RecipeError, ResumeError, UsageError
from fettle.methods.filters.dependencies import logits_of
from fettle.methods.registry import from_fields
from fettle.pipeline.recipe import Recipe, parse_recipe
from fettle.vision.classifier import ImageClassifier, open_classifier
from fettle.vision.compressing import ClassifierCompression
from fettle.vision.evaluation import ClassifierEvaluation

PLAIN = {"resnet", "mobilenet_v1", "mobilenet_v2", "regnet"}  # whose words can say that every width is half
Folder = Callable[[str], Path]


def recipe(pictures: Path | str | None = None, **fields: Any) -> Recipe:
    calibration = {} if pictures is None else {"images": str(pictures)}
    step = {"method": "prune_filters", **fields}
    return parse_recipe({"name": "filters", "calibration": calibration, "steps": [step]}, "filters")


def pruned(base: Path, out: Path, pictures: Path | str | None, **fields: Any) -> ClassifierCompression:
    made = fettle.compress(base, out, recipe(pictures, **fields))
    assert isinstance(made, ClassifierCompression)
    return made


def answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model, images(6).images)


@pytest.mark.parametrize("name", NAMES)
def test_half_of_the_filters_go_and_the_folder_loads(
    name: str, classifier: Folder, pictures: Path, tmp_path: Path
) -> None:
    base, out = classifier(name), tmp_path / "half"
    plan = fettle.plan(base, recipe(pictures, sparsity=0.5))
    made = pruned(base, out, pictures, sparsity=0.5)
    summary, found = made.summary, made.evaluation
    assert found is not None and found.images == 12 and found.accuracy is not None
    assert summary["output"] == plan.output and plan.exact  # parameters, filters, multiply-adds, bytes: as predicted
    assert summary["output"]["filters"] == summary["base"]["filters"] // 2
    assert summary["output"]["parameters"] < 0.45 * summary["base"]["parameters"]
    assert summary["output"]["multiply_adds"] < 0.55 * summary["base"]["multiply_adds"]
    loaded = load(out)
    assert isinstance(loaded, ImageClassifier)
    held = load_file(out / "model.safetensors")
    assert sum(p.numel() for p in loaded.model.parameters()) == summary["output"]["parameters"]
    assert all(torch.equal(held[key], value) for key, value in loaded.model.state_dict().items())
    assert made.summary["loads_with"] == plan.loads_with == ("transformers" if name in PLAIN else "fettle")
    if name in PLAIN:
        theirs = AutoModelForImageClassification.from_pretrained(out)
        torch.testing.assert_close(answers(theirs.eval()), answers(loaded.model), rtol=1e-5, atol=1e-6)
        assert all(torch.equal(held[key], value) for key, value in theirs.state_dict().items())
        assert json.loads((out / "fettle.json").read_text())["widths"] == {}
    assert "AutoModel" in (out / "README.md").read_text() or name not in PLAIN


def test_uneven_widths_are_loaded_by_fettle_and_refused_by_others(
    classifier: Folder, pictures: Path, tmp_path: Path
) -> None:
    base, out = classifier("resnet"), tmp_path / "uneven"
    made = pruned(base, out, pictures, sparsity=0.4, scope="global", score="taylor", rounds=2)
    record = json.loads((out / "fettle.json").read_text())
    assert made.summary["loads_with"] == "fettle" and record["widths"]
    loaded = open_classifier(out)
    assert answers(loaded.model).shape == (6, 10)
    with pytest.raises((RuntimeError, ValueError), match="mismatch"):
        AutoModelForImageClassification.from_pretrained(out)
    again = pruned(out, tmp_path / "twice", pictures, sparsity=0.2)  # a pruned network is a base like any other
    assert again.summary["output"]["filters"] < made.summary["output"]["filters"]
    assert answers(open_classifier(tmp_path / "twice").model).isfinite().all()


def test_the_same_command_gives_the_same_bytes_and_is_finished_the_second_time(
    classifier: Folder, pictures: Path, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"sparsity": 0.5, "rounds": 2, "score": "hessian", "heal_steps": 3, "heal_batch": 8}
    base = classifier("vgg16_bn")
    first, second = (pruned(base, tmp_path / name, pictures, **fields) for name in ("a", "b"))
    for name in ("model.safetensors", "config.json", "fettle.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not first.resumed_whole
    again = pruned(base, tmp_path / "a", pictures, **fields)
    assert again.resumed_whole and again.summary == first.summary
    with pytest.raises(ResumeError, match="--fresh"):
        pruned(base, tmp_path / "a", pictures, sparsity=0.4)
    assert second.summary["rounds"][-1]["sparsity"] == 0.5


def test_measured_alone_and_against_the_original(classifier: Folder, pictures: Path) -> None:
    base = classifier("resnet")
    found = fettle.evaluate(base, reference=base, images=pictures)
    assert isinstance(found, ClassifierEvaluation)
    assert found.kl_mean == 0 and found.top1_agreement == 1 and found.accuracy == found.reference_accuracy
    network = open_classifier(base).model
    by_hand = 0
    handles = []

    def count(layer: Any, given: Any, made: torch.Tensor) -> None:
        nonlocal by_hand
        by_hand += layer.weight.numel() * (made[0, 0].numel() if made.ndim == 4 else 1)

    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            handles.append(layer.register_forward_hook(count))
    logits_of(network, torch.zeros(1, 3, 32, 32))
    assert found.cost.multiply_adds == by_hand
    alone = fettle.evaluate(base, images=pictures)
    assert alone.kl_mean is None and alone.reference_cost is None and alone.latency_ms > 0


def test_a_damaged_folder_is_refused(classifier: Folder, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pruned(classifier("vgg16"), out, None, sparsity=0.5)
    tensors = load_file(out / "model.safetensors")
    tensors["head.fc.weight"][0, 0] += 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="damaged"):
        load(out)
    record = json.loads((out / "fettle.json").read_text())
    record["tensors"] = {}
    (out / "fettle.json").write_text(json.dumps({**record, "widths": {"features.0": [3, 3]}}))
    with pytest.raises(CheckpointError, match="no such layer"):
        load(out)
    (out / "fettle.json").unlink()
    with pytest.raises(CheckpointError, match="says its widths"):
        load(out)


@pytest.mark.parametrize(
    ("fields", "labelled", "error", "said"),
    [
        ({"sparsity": 0.95}, True, RecipeError, "leaves no filter"),
        ({"score": "taylor"}, False, RecipeError, "no labels"),
    ],
)
def test_what_cannot_be_says_why_and_writes_nothing(
    fields: dict[str, Any], labelled: bool, error: type[Exception], said: str, classifier: Folder, tmp_path: Path
) -> None:
    pictures = images_file(tmp_path / "few.safetensors", labelled=labelled)
    with pytest.raises(error, match=said):
        pruned(classifier("vgg16"), tmp_path / "out", pictures, **fields)
    assert not (tmp_path / "out").exists()


def test_kinds_of_models_and_of_recipes_are_told_apart(
    classifier: Folder, tiny_llama: Path, pictures: Path, tmp_path: Path
) -> None:
    base = classifier("vgg16")
    for name in ("gptq-4bit", "narrow-0.6x"):
        with pytest.raises(UsageError, match="is an image classifier"):
            fettle.compress(base, tmp_path / "out", name)
    with pytest.raises(UsageError, match="filters of image classifiers"):
        fettle.compress(tiny_llama, tmp_path / "out", recipe())
    with pytest.raises(UsageError, match="images are for image classifiers"):
        mapping = {"steps": [{"method": "round_to_nearest"}], "calibration": {"images": "shapes"}}
        fettle.compress(tiny_llama, tmp_path / "out", parse_recipe(mapping, "r"))
    with pytest.raises(UsageError, match="no image classifier"):
        fettle.evaluate(tiny_llama, images=pictures)
    with pytest.raises(UsageError, match="reads no text"):
        fettle.evaluate(base, text=pictures)
    with pytest.raises(UsageError, match="looks at images"):
        fettle.compress(base, tmp_path / "out", recipe(score="activation"))
    with pytest.raises(RecipeError, match="the only step"):
        parse_recipe({"steps": [{"method": "prune_filters"}, {"method": "gptq"}]}, "r")
    with pytest.raises(RecipeError, match="removes nothing"):
        from_fields("prune_filters", {"sparsity": 0})
    with pytest.raises(UsageError, match="own folder"):
        pruned(base, base / "inside", None)


def test_a_half_precision_folder_stays_one(tmp_path: Path) -> None:
    base = write("vgg16", tmp_path / "base")
    tensors = {name: tensor.half() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    made = pruned(base, tmp_path / "out", None, sparsity=0.5)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}
    assert made.summary["calibration"] is None and made.evaluation is not None
    shutil.rmtree(base)
