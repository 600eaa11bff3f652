"""Networks that were trained here, pruned in rounds with healing: accuracy stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.vision.networks import images_file, vgg_config
from tests.vision.test_compressing import pruned
from torch import nn

from fettle.methods.filters.healing import FineTuning, fine_tune_
from fettle.models.writer import write_json
from fettle.vision.classifier import open_classifier
from fettle.vision.images import SHAPES, read_images
from fettle.vision.vgg import build_vgg

WIDE = [16, 16, 32, 32, 48, 48, 48, 64, 64, 64, 64, 64, 64]


def trained(folder: Path, channels: list[int], head_width: int, steps: int) -> Path:
    """A VGG-16-shaped network that knows the drawn task."""
    torch.manual_seed(0)
    config = vgg_config("vgg16_bn")
    config["model_args"] |= {"channels": channels, "head_width": head_width}
    folder.mkdir()
    write_json(folder / "config.json", config)
    made = build_vgg(config)
    for layer in made.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    save_file(made.state_dict(), folder / "model.safetensors", {"format": "pt"})
    found = open_classifier(folder)
    images = read_images(SHAPES, found.preprocessing, found.labels)
    found.model.requires_grad_(True)
    fine_tune_(found.model, images.data, FineTuning(steps=steps, rate=3e-3))
    save_file(found.model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.exhaustive
def test_eighty_percent_of_a_vgg_go_in_rounds_and_its_accuracy_stays(tmp_path: Path) -> None:
    base = trained(tmp_path / "base", WIDE, 64, 300)
    made = pruned(
        base, tmp_path / "out", SHAPES, sparsity=0.8, rounds=4, score="taylor", scope="global", heal_steps=50,
        last_steps=800, heal_rate=2e-3,
    )  # fmt: skip
    found, summary = made.evaluation, made.summary
    assert found is not None and found.accuracy is not None and found.reference_accuracy is not None
    assert found.reference_accuracy > 0.75
    assert found.accuracy > found.reference_accuracy - 0.02
    assert summary["output"]["filters"] <= 0.2 * summary["base"]["filters"]
    assert summary["output"]["parameters"] <= 0.25 * summary["base"]["parameters"]


def test_a_small_network_that_was_trained_a_little_keeps_what_it_knows(tmp_path: Path) -> None:
    """The same in seconds: half of the filters, and the answers stay nearer to the original's than without healing."""
    base = trained(tmp_path / "base", [8, 8, 12, 12, 16, 16, 16, 16, 16, 16, 16, 16, 16], 16, 40)
    pictures = images_file(tmp_path / "images.safetensors", 200)
    bare = pruned(base, tmp_path / "bare", pictures, sparsity=0.5).evaluation
    healed = pruned(base, tmp_path / "healed", pictures, sparsity=0.5, rounds=2, heal_steps=20).evaluation
    assert bare is not None and healed is not None and bare.kl_mean is not None and healed.kl_mean is not None
    assert healed.kl_mean < bare.kl_mean
    assert healed.cost == bare.cost
