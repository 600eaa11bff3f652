"""The model card of a pruned image classifier: what was lost, what it costs now, how to load it, how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

PLAIN = """from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("{folder}")"""

WIDTHS = """import fettle

classifier = fettle.load("{folder}")  # classifier.model, classifier.labels, classifier.preprocessing"""

COSTS = (
    ("parameters", "parameters"),
    ("filters", "filters of all convolutions"),
    ("multiply_adds", "multiply-adds an image"),
    ("bytes", "bytes of the weights' file"),
)


def classifier_card(marker: Mapping[str, Any], folder_name: str) -> str:
    """Renders the card from `fettle.json`'s content; deterministic."""
    plain = marker["loads_with"] == "transformers"
    lines = [
        "---",
        f"library_name: {marker['loads_with']}",
        "pipeline_tag: image-classification",
        "tags: [fettle, pruned]",
        "---",
        f"# {marker['base']['name']}, pruned with fettle ({marker['recipe']['name']})",
        "",
        "## What was lost, and what it costs now",
        "",
        *_quality(marker["results"]),
        "",
        "## How to load it",
        "",
        "```python",
        (PLAIN if plain else WIDTHS).format(folder=folder_name),
        "```",
        "",
    ]
    if not plain:
        lines += [
            "The widths of the pruned layers stand in `fettle.json`, since the architecture's configuration has no "
            "words for them: other loaders stop at the first tensor whose shape they do not expect.",
            "",
        ]
    recipe = yaml.safe_dump(dict(marker["recipe"]), sort_keys=False).rstrip()
    lines += ["## How it was made", "", "```yaml", recipe, "```", ""]
    calibration = marker["calibration"]
    if calibration is not None:
        lines += [
            f"Images: {calibration['images']} from `{calibration['source']}` (SHA-256 `{calibration['sha256']}`)"
            + (", labelled." if calibration["labelled"] else ", without labels."),
            "",
        ]
    lines += ["Base files:", "", "| file | SHA-256 |", "| --- | --- |"]
    lines += [f"| {name} | `{digest}` |" for name, digest in sorted(marker["base"]["files"].items())]
    lines += [
        "",
        f"Written by fettle {marker['fettle_version']}; hashes of the file and every tensor are in `fettle.json`.",
        "",
    ]
    return "\n".join(lines)


def _quality(results: Mapping[str, Any] | None) -> list[str]:
    if results is None:
        return ["Not measured. Run `fettle evaluate` on this folder with the original as the reference."]
    table = [
        f"Measured on the written files, reloaded; {results['images']} images: `{results['images_source']}`.",
        "",
        "| what | original | pruned |",
        "| --- | ---: | ---: |",
    ]
    if results["accuracy"] is not None:
        table.append(f"| accuracy | {results['reference_accuracy']:.2%} | {results['accuracy']:.2%} |")
    table.append(f"| top-1 agreement with the original | | {results['top1_agreement']:.2%} |")
    table.append(f"| KL to the original, mean, nats an image | | {results['kl_mean']:.5f} |")
    before, after = results["reference_cost"], results["cost"]
    return table + [f"| {label} | {before[key]:,} | {after[key]:,} |" for key, label in COSTS]
