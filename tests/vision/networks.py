"""Folders of small image classifiers, alive from the first layer to the last: random weights, measured batch norms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fettle.methods.filters.healing import recalibrate_
from fettle.methods.filters.scores import ImageBatch
from fettle.vision.shapes import CLASSES, draw_shapes
from fettle.vision.vgg import build_vgg

MEAN, STD = [0.5] * 3, [0.25] * 3
NAMES = ("resnet", "mobilenet_v1", "mobilenet_v2", "regnet", "vgg16", "vgg16_bn")


def images(count: int, seed: int = 5) -> ImageBatch:
    drawn = draw_shapes(count, seed=seed)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return ImageBatch((drawn.images.float() / 255 - mean) / std, drawn.labels)


def images_file(path: Path, count: int = 60, seed: int = 5, labelled: bool = True) -> Path:
    drawn = draw_shapes(count, seed=seed)
    save_file({"images": drawn.images, **({"labels": drawn.labels} if labelled else {})}, path)
    return path


def vgg_config(architecture: str) -> dict[str, Any]:
    return {
        "architecture": architecture, "num_classes": len(CLASSES), "label_names": list(CLASSES),
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": MEAN, "std": STD},
        "model_args": {
            "channels": [8, 8, 12, 12, 16, 16, 16, 16, 16, 16, 16, 16, 16], "head_width": 16, "head_kernel": 1,
        },
    }  # fmt: skip


def network(name: str) -> nn.Module:
    """A network whose every layer says something."""
    import transformers as hf

    torch.manual_seed(0)
    labels = dict(enumerate(CLASSES))
    made: Any
    if name.startswith("vgg"):
        made = build_vgg(vgg_config(name))
    elif name == "resnet":
        made = hf.ResNetForImageClassification(
            hf.ResNetConfig(
                embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type="bottleneck", id2label=labels
            )
        )
    elif name == "regnet":
        made = hf.RegNetForImageClassification(
            hf.RegNetConfig(
                embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8, layer_type="y", id2label=labels
            )
        )
    elif name == "mobilenet_v1":
        made = hf.MobileNetV1ForImageClassification(
            hf.MobileNetV1Config(depth_multiplier=0.125, min_depth=4, image_size=32, id2label=labels)
        )
    else:
        made = hf.MobileNetV2ForImageClassification(
            hf.MobileNetV2Config(
                depth_multiplier=0.25, depth_divisible_by=4, min_depth=4, image_size=32, finegrained_output=False,
                id2label=labels,
            )
        )  # fmt: skip
    for layer in made.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=0.1)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
    recalibrate_(made, images(32))
    return made


def write(name: str, folder: Path) -> Path:
    """The folder of that network, as its library writes it."""
    made = network(name)
    folder.mkdir(parents=True)
    if name.startswith("vgg"):
        (folder / "config.json").write_text(json.dumps(vgg_config(name)), encoding="utf-8")
        save_file(made.state_dict(), folder / "model.safetensors", {"format": "pt"})
        return folder
    made.save_pretrained(folder)
    said = {"size": {"height": 32, "width": 32}, "do_normalize": True, "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(said), encoding="utf-8")
    return folder
