"""Filters pruned from small image classifiers that are trained here, on the task that fettle draws itself.

    python benchmarks/vision/filters.py --network vgg --sparsity 0.8 --rounds 5

Trains a VGG-16-, ResNet- or MobileNet-shaped network (once; the folder stays in --work), prunes it in rounds with
healing, and prints one JSON line: accuracy, parameters, multiply-adds and latency before and after, measured on the
written files with held-out images, and the latency that the plan predicted.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import fettle
from fettle.methods.filters.healing import FineTuning, fine_tune_
from fettle.pipeline.recipe import Recipe, parse_recipe
from fettle.vision.classifier import open_classifier
from fettle.vision.images import SHAPES, read_images
from fettle.vision.shapes import CLASSES
from fettle.vision.vgg import build_vgg

MEAN, STD = [0.5] * 3, [0.25] * 3
VGG = {
    "architecture": "vgg16_bn",
    "num_classes": len(CLASSES),
    "label_names": list(CLASSES),
    "pretrained_cfg": {"input_size": [3, 32, 32], "mean": MEAN, "std": STD},
    "model_args": {
        "channels": [16, 16, 32, 32, 48, 48, 48, 64, 64, 64, 64, 64, 64],
        "head_width": 64,
        "head_kernel": 1,
    },
}


def write_untrained(network: str, folder: Path) -> None:
    """A folder with config.json, random weights and what images go through."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    if network == "vgg":
        (folder / "config.json").write_text(json.dumps(VGG), encoding="utf-8")
        model: nn.Module = build_vgg(VGG)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
        return
    import transformers

    labels = dict(enumerate(CLASSES))
    if network == "resnet":
        config = transformers.ResNetConfig(
            embedding_size=16, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic", id2label=labels
        )
    else:
        config = transformers.MobileNetV2Config(depth_multiplier=0.35, image_size=32, id2label=labels, tf_padding=False)
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    processor = {"size": {"height": 32, "width": 32}, "do_normalize": True, "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")


def train(folder: Path, steps: int) -> None:
    """Trains the folder's network on the drawn task, in place."""
    found = open_classifier(folder)
    images = read_images(SHAPES, found.preprocessing, found.labels)
    found.model.requires_grad_(True)
    fine_tune_(found.model, images.data, FineTuning(steps=steps, rate=3e-3))
    names = found.checkpoint.entries
    state = {name: tensor.contiguous() for name, tensor in found.model.state_dict().items() if name in names}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the flags mean."""
    step = {
        "method": "prune_filters", "sparsity": arguments.sparsity, "rounds": arguments.rounds,
        "score": arguments.score, "scope": arguments.scope, "heal_steps": arguments.heal_steps,
        "last_steps": arguments.last_steps, "heal_rate": 2e-3,
    }  # fmt: skip
    return parse_recipe({"name": "filters", "calibration": {"images": SHAPES}, "steps": [step]}, "filters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("vgg", "resnet", "mobilenet"), default="vgg")
    parser.add_argument("--work", type=Path, default=Path("build/vision"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--score", default="taylor")
    parser.add_argument("--scope", default="global")
    parser.add_argument("--heal-steps", type=int, default=50)
    parser.add_argument("--last-steps", type=int, default=800)
    arguments = parser.parse_args()
    base = arguments.work / f"{arguments.network}-{arguments.steps}"
    if not (base / "trained").exists():
        write_untrained(arguments.network, base)
        started = time.monotonic()
        train(base, arguments.steps)
        (base / "trained").write_text(str(round(time.monotonic() - started, 1)))
    recipe = recipe_of(arguments)
    plan = fettle.plan(base, recipe)
    made = fettle.compress(base, arguments.work / f"{arguments.network}-pruned", recipe, fresh=True, evaluate=True)
    found = made.summary["evaluation"]
    line = {
        "network": arguments.network, "sparsity": arguments.sparsity, "rounds": arguments.rounds,
        "score": arguments.score, "scope": arguments.scope, "accuracy_before": found["reference_accuracy"],
        "accuracy": found["accuracy"], "kl_mean": found["kl_mean"], "before": found["reference_cost"],
        "after": found["cost"], "latency_ms_before": found["reference_latency_ms"], "latency_ms": found["latency_ms"],
        "latency_ratio": found["latency_ms"] / found["reference_latency_ms"],
        "latency_ratio_predicted": plan.latency_ratio, "seconds": made.summary["seconds"],
        "training_seconds": float((base / "trained").read_text()),
    }  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    main()
