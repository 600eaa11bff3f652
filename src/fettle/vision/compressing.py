"""From an image classifier and a recipe to a written, measured, documented folder.

    open and check → images → rounds of pruning and healing → batch norms measured again → model.safetensors, config,
    side files → reload and measure → card → fettle.json, last

The written folder is the original's kind: safetensors and config.json. Where the family's own words can say the new
widths (`plain_config.py`), plain transformers loads it; where not, `fettle.load` does, from the widths in
`fettle.json`, and other loaders stop at the first tensor of another shape. The same command gives the same bytes, since
pruning and healing run on one thread (or the GPU). A run that was stopped starts again; nothing is written before the
last round. A folder that holds files which no such run wrote is refused, --fresh or not; `pruning.json` in the run
folder marks one that is being written.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fettle
from fettle.errors import CheckpointError, ResumeError, UsageError
from fettle.evaluate.memory import peak_memory_bytes, restart_peak
from fettle.methods.filters.healing import recalibrate_
from fettle.methods.filters.prune_filters import PruneFilters, described
from fettle.models.checkpoint import SINGLE, Checkpoint, file_sha256
from fettle.models.config_file import read_json
from fettle.models.writer import copy_side_files, write_json, write_shard, write_text
from fettle.pipeline.journal import locked, run_folder
from fettle.pipeline.recipe import Recipe
from fettle.pipeline.run import MARKER, check_device, display_name, monotonic_seconds, refuse_inside, versions
from fettle.progress import Progress
from fettle.vision.card import classifier_card
from fettle.vision.classifier import KIND, ImageClassifier, named_tensors, open_classifier
from fettle.vision.evaluation import ClassifierEvaluation, evaluate_classifier, measure_cost
from fettle.vision.images import SHAPES, ImageSet, read_images
from fettle.vision.plain_config import plain_config
from fettle.vision.widths import changed_widths, widths_of
from fettle.workers import Workers

BEGUN = "pruning.json"  # in the run folder, from before the first byte is written until the folder is whole


@dataclass(frozen=True, kw_only=True)
class ClassifierCompression:
    """What `compress` did to a classifier: the folder, its measurement (None where left out), and the summary."""

    folder: Path
    evaluation: ClassifierEvaluation | None
    summary: dict[str, Any]
    resumed_whole: bool = False


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A base with the recipe's method and images, all of it read and checked."""

    base: ImageClassifier
    method: PruneFilters
    recipe: Recipe
    asked: str
    images: ImageSet | None
    held_out: ImageSet
    device: str

    def identity(self) -> dict[str, Any]:
        """What the written bytes depend on."""
        recipe = self.recipe.to_dict()
        recipe["calibration"] = {}
        return {
            "base": {"name": display_name(self.asked), "files": self.base.checkpoint.file_hashes()},
            "recipe": recipe,
            "calibration": None if self.images is None else {
                "source": self.images.source, "sha256": self.images.sha256, "images": len(self.images.data.images),
                "labelled": self.images.data.labels is not None,
            },
            "device": torch.device(self.device).type,
        }  # fmt: skip


def method_of(recipe: Recipe, model: str | Path) -> PruneFilters:
    """The one step that a classifier can take.

    Raises:
        UsageError: a recipe for language models.
    """
    steps = [step.method for step in recipe.steps]
    if len(steps) != 1 or not isinstance(steps[0], PruneFilters) or recipe.basis is not None:
        names = ", ".join(method.name for method in steps)
        raise UsageError(
            f"{model} is an image classifier, and the recipe {recipe.name} ({names}) is for language models; use "
            "--method prune_filters, or a recipe of that one step"
        )
    return steps[0]


def compress_classifier(
    model: str | Path,
    output: Path,
    recipe: Recipe,
    *,
    device: str,
    fresh: bool,
    evaluate: bool | None,
    progress: Progress,
    command: str,
) -> ClassifierCompression:
    """Prunes an image classifier into a folder, and measures what was written.

    Raises:
        UsageError, ModelError: see `fettle.errors`.
    """
    started = time.monotonic()
    restart_peak()
    job = _prepared(model, recipe, device)
    refuse_inside(job.base.folder, output)
    _refuse_foreign(output)
    identity = job.identity()
    with locked(run_folder(output)):
        before = _finished(output, identity, fresh)
        if before is not None:
            return ClassifierCompression(folder=output, evaluation=None, summary=before, resumed_whole=True)
        with Workers(1):
            pruned, rounds = _pruned(job, progress)
            content = _write(job, pruned, output, {**identity, "reshaped": [_decided(job, rounds)]})
            written = open_classifier(output, device=device, record=content)
            evaluation = None
            if evaluate is not False:
                evaluation = evaluate_classifier(written, job.base, job.held_out, device=device)
        summary = _summary(job, content, written, evaluation)
        summary |= {"seconds": monotonic_seconds(started), "peak_memory_bytes": peak_memory_bytes(), "command": command}
        content["results"] = None if evaluation is None else _stable(evaluation)
        write_text(output / "README.md", classifier_card(content, output.name))
        write_json(output / MARKER, content)
        write_json(run_folder(output) / "summary.json", summary)
        (run_folder(output) / BEGUN).unlink(missing_ok=True)
    return ClassifierCompression(folder=output, evaluation=evaluation, summary=summary)


def _refuse_foreign(output: Path) -> None:
    """Raises UsageError where `output` or its run folder is a file, or it holds what no such run wrote."""
    for path in (output, run_folder(output)):
        if path.exists() and not path.is_dir():
            raise UsageError(f"the output {path} is a file; name a folder that does not exist yet")
    ours = any(_is_ours(path) for path in (output / MARKER, run_folder(output) / BEGUN))
    if not ours and output.is_dir() and any(output.iterdir()):
        raise UsageError(
            f"the output {output} is not empty, and no run that pruned an image classifier made it; --fresh replaces "
            "only what such a run wrote. Name another folder, or empty this one"
        )


def _is_ours(path: Path) -> bool:
    """Whether this file says that a pruned classifier is, or was to be, written."""
    try:
        return read_json(path).get("kind") == KIND
    except CheckpointError:  # missing or damaged
        return False


def _prepared(model: str | Path, recipe: Recipe, device: str) -> _Job:
    method = method_of(recipe, model)
    check_device(device)
    base = open_classifier(model, device=device)
    if "quantization_config" in base.checkpoint.config:
        raise UsageError(f"{model} is compressed already; prune the model that it was made from")
    images, held = images_for(base, method, recipe)
    return _Job(base=base, method=method, recipe=recipe, asked=str(model), images=images, held_out=held, device=device)


def images_for(base: ImageClassifier, method: PruneFilters, recipe: Recipe) -> tuple[ImageSet | None, ImageSet]:
    """What scores and healing look at, or None, and what is held back to measure on.

    Raises:
        UsageError: the method looks at images and there are none, or they do not fit.
    """
    source = recipe.calibration.images
    if source is None:
        if method.needs():
            steps = method.heal_steps + method.last_steps
            raise UsageError(
                f"{method.name} with the score {method.score} and {steps} healing steps looks at images, and there are "
                f"none; give --images FOLDER|FILE, or --images {SHAPES}"
            )
        return None, read_images(SHAPES, base.preprocessing, base.labels, held_out=True)
    images = read_images(source, base.preprocessing, base.labels)
    if source == SHAPES:
        return images, read_images(SHAPES, base.preprocessing, base.labels, held_out=True)
    return images.halves()


def _pruned(job: _Job, progress: Progress) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A pruned and healed copy, and what the rounds did."""
    network = copy.deepcopy(job.base.model)
    data = None if job.images is None else job.images.on(job.device).data
    network.requires_grad_(True)
    with progress.task("pruning rounds", job.method.rounds) as task:
        rounds = job.method.prune_network(
            network, job.base.preprocessing.example().to(job.device), data, told=task.advance
        )
    if data is not None:
        recalibrate_(network, data)
    return network.requires_grad_(False), described(rounds)


def _decided(job: _Job, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    method = job.method
    measured = job.images is not None and len(job.images.data.images) > 1  # one image has no variance
    return {
        "method": method.name, "score": method.score, "scope": method.scope, "rounds": rounds,
        "batch_norms": "measured again" if measured else "as they were",
    }  # fmt: skip


def _write(job: _Job, network: nn.Module, output: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Writes weights, config and side files; returns what fettle.json will say, not measured yet."""
    base = job.base.checkpoint
    original, widths = widths_of(job.base.model), widths_of(network)
    write_json(run_folder(output) / BEGUN, {"kind": KIND, **identity})
    (run_folder(output) / "summary.json").unlink(missing_ok=True)
    for stale in (MARKER, "config.json"):  # without these a folder is not finished
        (output / stale).unlink(missing_ok=True)
    tensors = {name: _as_stored(name, tensor, base) for name, tensor in named_tensors(network)}
    write_shard(output, SINGLE, tensors, {"format": "pt"})
    copy_side_files(base.folder, output)
    plain = plain_config(base.config, widths, base.folder)
    write_json(output / "config.json", plain or base.config)
    # a base that was pruned itself: its widths are already others than its configuration's
    told = {} if plain else changed_widths({} if "widths" in (base.record or {}) else original, widths)
    written = Checkpoint.open(output)
    return {
        "schema": 1,
        "kind": KIND,
        "fettle_version": fettle.__version__,
        **identity,
        "widths": told,
        "loads_with": "transformers" if plain else "fettle",
        "files": {SINGLE: file_sha256(output / SINGLE)},
        "tensors": {name: written.tensor_sha256(name) for name in written.entries},
    }


def _as_stored(name: str, tensor: Tensor, base: Checkpoint) -> Tensor:
    """The tensor in the type that the original has it in."""
    entry = base.entries.get(name)
    return tensor.detach().to("cpu", tensor.dtype if entry is None else entry.dtype)


def _finished(output: Path, identity: Mapping[str, Any], fresh: bool) -> dict[str, Any] | None:
    """The summary of a run that wrote this folder with the same base, recipe and images; None where there is none.

    Raises:
        ResumeError: the folder holds something else.
    """
    summary = run_folder(output) / "summary.json"
    if fresh or not (output / MARKER).exists():
        return None
    held = read_json(output / MARKER)
    if any(held.get(key) != value for key, value in identity.items()):
        raise ResumeError(
            f"{output} holds a model that another base, recipe or set of images made; use --fresh to replace it, or "
            "another folder"
        )
    return read_json(summary) if summary.exists() else None


def _summary(
    job: _Job, content: Mapping[str, Any], written: ImageClassifier, evaluation: ClassifierEvaluation | None
) -> dict[str, Any]:
    found = None if evaluation is None else {**evaluation.to_json(), "versions": versions()}
    return {
        "schema": 1, "kind": KIND, "asked": job.asked, "model": content["base"]["name"], "recipe": content["recipe"],
        "base": vars(measure_cost(job.base)), "output": vars(measure_cost(written)),
        "rounds": content["reshaped"][0]["rounds"], "loads_with": content["loads_with"],
        "calibration": content["calibration"], "evaluation": found,
    }  # fmt: skip


def _stable(evaluation: ClassifierEvaluation) -> dict[str, Any]:
    """The figures that are the same in every run."""
    unstable = ("latency_ms", "reference_latency_ms", "seconds", "peak_memory_bytes", "versions")
    return {key: value for key, value in evaluation.to_json().items() if key not in unstable}
