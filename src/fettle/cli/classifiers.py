"""Image classifiers on the command line: the tables of compress, plan, inspect and evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fettle.cli.output import console, duration, number, show, size, table

COSTS = (("parameters", "parameters"), ("filters", "filters"), ("multiply_adds", "multiply-adds an image"))


def show_compression(summary: Mapping[str, Any], folder: Path, finished: bool) -> None:
    """What `fettle compress` says of a classifier."""
    out = console()
    if finished:
        out.print(f"{folder} was finished already; --fresh starts over.")
    evaluation = summary["evaluation"]
    if evaluation is None:
        show(out, table("", ("what", "original", "now"), _costs(summary["base"], summary["output"]), right=(1, 2)))
        out.print(f"Not measured. Next: fettle evaluate {folder} --reference {summary['asked']}")
    else:
        show_evaluation(evaluation)
    before, after = summary["base"]["bytes"], summary["output"]["bytes"]
    loader = "transformers and fettle" if summary["loads_with"] == "transformers" else "fettle.load alone"
    out.print(
        f"{folder}: {size(before)} → {size(after)}, {before / after:.2f} times smaller, in "
        f"{duration(summary['seconds'])} and {size(summary['peak_memory_bytes'])} of memory; loads with {loader}"
    )


def show_evaluation(found: Mapping[str, Any]) -> None:
    """What a classifier is worth, beside its original where there is one."""
    rows = []
    if found["accuracy"] is not None:
        rows.append(("accuracy", _percent(found["reference_accuracy"]), _percent(found["accuracy"])))
    if found["kl_mean"] is not None:
        rows += [
            ("top-1 agreement with the original", "", _percent(found["top1_agreement"])),
            ("KL to the original, mean, nats an image", "", number(found["kl_mean"])),
            ("KL to the original, 99th percentile", "", number(found["kl_p99"])),
        ]
    rows += _costs(found["reference_cost"], found["cost"])
    rows.append(("latency of one image, ms", number(found["reference_latency_ms"]), number(found["latency_ms"])))
    title = f"{found['images']} images: {found['images_source']}"
    show(console(), table(title, ("what", "original", "now"), rows, right=(1, 2)))


def show_plan(plan: Mapping[str, Any]) -> None:
    """What `fettle plan` says of a classifier."""
    out = console()
    widths = "exact" if plan["exact"] else "estimated: filters of all layers are ranked together"
    rows = _costs(plan["base"], plan["output"])
    rows.append(("latency, predicted by multiply-adds", "1", f"{plan['latency_ratio']:.3f}"))
    show(out, table(f"{plan['recipe']} ({widths})", ("what", "original", "then"), rows, right=(1, 2)))
    out.print(
        f"Loads with {'transformers and fettle' if plan['loads_with'] == 'transformers' else 'fettle.load alone'}"
    )


def show_outline(found: Mapping[str, Any]) -> None:
    """What `fettle inspect` says of a classifier."""
    out = console()
    pixels = "any size" if found["size"] is None else " × ".join(map(str, found["size"]))
    out.print(
        f"{found['model']}: {found['architecture']}, {found['classes']} classes, images of {found['channels']} × "
        f"{pixels}, {found['dtype']}, {found['parameters']:,} parameters, {found['multiply_adds']:,} multiply-adds, "
        f"{size(found['bytes'])}; loads with {found['loads_with']}"
    )
    rows = [
        (x["name"], x["kind"], " × ".join(map(str, x["shape"])), str(x["groups"]), f"{x['parameters']:,}")
        for x in found["layers"]
    ]
    show(out, table("", ("layer", "kind", "shape", "groups", "parameters"), rows, right=(3, 4)))


def _costs(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = [(label, "–" if before is None else f"{before[key]:,}", f"{after[key]:,}") for key, label in COSTS]
    return [*rows, ("bytes", "–" if before is None else size(before["bytes"]), size(after["bytes"]))]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"
