"""What an image classifier is made of, as `fettle inspect` shows it: its layers with widths, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fettle.vision.classifier import KIND, open_classifier
from fettle.vision.evaluation import measure_cost
from fettle.vision.widths import widths_of


def outline_classifier(model: str | Path) -> dict[str, Any]:
    """Architecture, classes, image size, layers, parameters, multiply-adds and bytes; plain data."""
    found = open_classifier(model)
    config, record = found.checkpoint.config, found.checkpoint.record or {}
    named = config.get("architecture") or (config.get("architectures") or ["?"])[0]
    size = found.preprocessing.size
    changed = record.get("widths") or {}
    layers = []
    for name, widths in widths_of(found.model).items():
        layer = found.model.get_submodule(name)
        weight = getattr(layer, "weight", None)
        layers.append({
            "name": name, "kind": type(layer).__name__, "shape": [] if weight is None else list(weight.shape),
            "parameters": sum(parameter.numel() for parameter in layer.parameters()),
            "groups": widths[2] if len(widths) == 3 else 1, "pruned": name in changed,
        })  # fmt: skip
    return {
        "kind": KIND, "model": str(model), "architecture": str(named), "classes": len(found.labels),
        "channels": found.preprocessing.channels, "size": None if size is None else list(size),
        "dtype": str(found.checkpoint.dtype).removeprefix("torch."), **vars(measure_cost(found)),
        "loads_with": record.get("loads_with", "transformers"), "layers": layers,
    }  # fmt: skip
