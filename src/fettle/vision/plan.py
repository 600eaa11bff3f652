"""What pruning an image classifier will leave, said before any training.

The widths are decided as they would be in one round, on a copy: exact where every layer loses the same share, since
then nothing depends on a score; an estimate where filters of all layers are ranked together and healing moves scores.
The file's bytes follow from the shapes; the time of an image is predicted from its multiply-adds, which leaves out what
does not shrink with them (memory traffic, calls), so small networks gain less.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fettle.models.writer import shard_bytes
from fettle.pipeline.recipe import Recipe
from fettle.pipeline.run import check_device
from fettle.vision.classifier import ImageClassifier, named_tensors, open_classifier
from fettle.vision.compressing import images_for, method_of
from fettle.vision.evaluation import measure_cost, multiply_adds
from fettle.vision.plain_config import plain_config
from fettle.vision.widths import filters, widths_of
from fettle.workers import Workers


@dataclass(frozen=True, kw_only=True)
class ClassifierPlan:
    """What a run will leave."""

    model: str
    recipe: str
    exact: bool  # else filters are ranked across layers, and the widths are an estimate
    base: Mapping[str, int]  # parameters, filters, multiply_adds, bytes
    output: Mapping[str, int]
    latency_ratio: float  # predicted: multiply-adds after over before
    loads_with: str
    widths: Mapping[str, list[int]]

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the schema's version."""
        return {"schema": 1, "kind": "image_classifier", **dataclasses.asdict(self)}


def plan_classifier(model: str | Path, recipe: Recipe, *, device: str) -> ClassifierPlan:
    """Predicts a run; writes nothing and trains nothing.

    Raises:
        UsageError, ModelError: what the run itself would raise.
    """
    method = method_of(recipe, model)
    check_device(device)
    base = open_classifier(model, device=device)
    images, _ = images_for(base, method, recipe)
    once = dataclasses.replace(method, rounds=1, heal_steps=0, last_steps=0)
    network = copy.deepcopy(base.model).requires_grad_(True)
    example = base.preprocessing.example()
    with Workers(1):
        once.prune_network(network, example.to(device), None if images is None else images.on(device).data)
    cost, widths = measure_cost(base), widths_of(network)
    after = {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "filters": filters(widths),
        "multiply_adds": multiply_adds(network, example),
        "bytes": _file_bytes(base, network),
    }
    return ClassifierPlan(
        model=str(model), recipe=recipe.name, exact=method.scope == "layer", base=vars(cost), output=after,
        latency_ratio=after["multiply_adds"] / cost.multiply_adds,
        loads_with="transformers" if plain_config(base.checkpoint.config, widths, base.folder) else "fettle",
        widths=widths,
    )  # fmt: skip


def _file_bytes(base: ImageClassifier, network: Any) -> int:
    """The exact length of the file that would be written."""
    entries = base.checkpoint.entries
    layout = {
        name: (entries[name].dtype if name in entries else tensor.dtype, tuple(tensor.shape))
        for name, tensor in named_tensors(network)
    }
    return shard_bytes(layout, {"format": "pt"})
