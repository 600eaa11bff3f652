"""What a classifier's JSON files cannot say: each is named, and nothing is opened that they point at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tests.vision.networks import vgg_config, write

from fettle.errors import CheckpointError, ModelError
from fettle.vision.classifier import build_network, class_names, open_classifier
from fettle.vision.preprocessing import read_preprocessing


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architecture": "hf-hub:some/model"}, "'hf-hub:some/model'; only a plain name"),
        ({"architecture": "local-dir:weights"}, "'local-dir:weights'; only a plain name"),
        ({"architecture": "../weights"}, "only a plain name"),
        ({"architecture": ["resnet50"]}, "only a plain name"),
        ({"architecture": "resnet50", "model_args": {"checkpoint_path": "weights.pth"}}, "holds checkpoint_path"),
        ({"architecture": "resnet50", "model_args": {"pretrained": True}}, "holds pretrained,"),
        ({"architecture": "resnet50", "model_args": {"pretrained_cfg": {"file": "weights.pth"}}}, "pretrained_cfg"),
        ({"architecture": "resnet50", "model_args": {"cache_dir": "here"}}, "holds cache_dir"),
        ({"architecture": "resnet50", "model_args": ["cache_dir"]}, "must be an object"),
        ({"model_args": {"checkpoint_path": "weights.pth"}, "model_type": "timm_wrapper"}, "holds checkpoint_path"),
    ],
)
def test_timm_is_not_led_to_other_files(
    config: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was built")

    monkeypatch.setattr(transformers.AutoModelForImageClassification, "from_config", built)
    with pytest.raises(ModelError, match=said) as caught:
        build_network(config, tmp_path)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"size": {"shortest_edge": "big"}}, "size.shortest_edge is 'big'"),
        ({"size": {"height": 10}}, "size.width is None"),
        ({"size": {"height": 0, "width": 10}}, "size.height is 0"),
        ({"size": 4097}, "size is 4097, and must be a whole number from 1 to 4096"),
        ({"size": "big"}, "size is 'big'"),
        ({"size": 32, "do_center_crop": True, "crop_size": {"height": 1.5, "width": 2}}, "crop_size.height is 1.5"),
        ({"size": {"shortest_edge": 32}, "crop_pct": "half"}, "crop_pct is 'half'"),
        ({"size": {"shortest_edge": 32}, "crop_pct": 1e-9}, "crop_pct is 1e-09"),
        ({"image_mean": ["a", "b", "c"]}, r"image_mean is \['a', 'b', 'c'\]"),
        ({"image_mean": ["a"]}, r"image_mean is \['a'\]"),
        ({"image_std": [1, 0, 1]}, "image_std .* must be numbers above 0"),
        ({"image_std": [1, float("nan"), 1]}, "image_std"),
    ],
)
def test_damaged_preprocessing_is_named(found: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match=f"preprocessor_config.json is damaged: {said}"):
        read_preprocessing(tmp_path, {})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"pretrained_cfg": "resnet"}, "pretrained_cfg is 'resnet', and must be an object"),
        ({"pretrained_cfg": {"input_size": [3, 32]}}, r"must be \[colours, height, width\]"),
        ({"pretrained_cfg": {"input_size": [3, "a", 32]}}, "input_size is 'a'"),
        ({"pretrained_cfg": {"input_size": 32}}, "input_size is 32"),
        ({"pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": -1}}, "crop_pct is -1"),
        ({"pretrained_cfg": {"mean": [None] * 3}}, "pretrained_cfg.mean"),
        ({"num_channels": "three"}, "num_channels is 'three'"),
        ({"image_size": 10**9}, "image_size is 1000000000"),
    ],
)
def test_damaged_sizes_in_the_configuration_are_named(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^config.json is damaged: .*{said}"):
        read_preprocessing(tmp_path, config)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"id2label": {"first": "cat"}}, r"id2label has the keys \['first'\]"),
        ({"num_classes": "ten"}, "num_classes is 'ten'"),
        ({"num_labels": 10**12}, "num_labels is 1000000000000"),
    ],
)
def test_damaged_classes_are_named(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        class_names(config, tmp_path / "config.json")


def test_a_folder_with_damaged_classes_is_refused(tmp_path: Path) -> None:
    base = write("vgg16", tmp_path / "base")
    (base / "config.json").write_text(json.dumps({**vgg_config("vgg16"), "id2label": {"first": "cat"}}))
    with pytest.raises(CheckpointError, match="whole numbers"):
        open_classifier(base)
