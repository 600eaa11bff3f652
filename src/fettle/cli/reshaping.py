"""What a reshaping step decided, as a table: parameters before and after, and the candidates that were tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from fettle.cli.output import table


def reshaping_table(step: Mapping[str, Any]) -> Table:
    """One step of a summary's `reshaped`."""
    before, after = step["parameters_before"], step["parameters"]
    rows = [(step["method"], _shape(step), f"{after:,}", f"{after / before:.3f}", "", _time(step))]
    for one in step.get("candidates", ()):
        share, loss = f"{one['parameters'] / before:.3f}", f"{one['perplexity']:.3f}"
        rows.append(("  tried", _shape(one), f"{one['parameters']:,}", share, loss, _time(one)))
    names = ["step", "shape", "parameters", "share", "perplexity, calibration", "ms a step, predicted"]
    shown = [column for column in range(len(names)) if any(row[column] for row in rows)]  # no column without a figure
    right = [place for place, column in enumerate(shown) if column > 1]
    return table("", [names[i] for i in shown], [[row[i] for i in shown] for row in rows], right=right)


def _time(step: Mapping[str, Any]) -> str:
    """The predicted time of a step, of the original's where that is known."""
    if "predicted_ms" not in step:
        return ""
    before = f" of {step['original_ms']:.3f}" if "original_ms" in step else ""
    return f"{step['predicted_ms']:.3f}{before}"


def _shape(step: Mapping[str, Any]) -> str:
    """What went and what stayed, in words."""
    words = []
    if step.get("dropped"):
        words.append("without blocks " + ", ".join(map(str, step["dropped"])))
    if step.get("shared"):
        words.append("one set of matrices for blocks " + ", ".join("+".join(map(str, x)) for x in step["shared"]))
    kept = step.get("kept")
    if isinstance(kept, Mapping) and isinstance(kept.get("neurons"), list):
        neurons, heads = (", ".join(map(str, kept[name])) for name in ("neurons", "kv_heads"))
        words.append(
            f"by block {neurons} neurons and {heads} key-value heads: fettle.load and the torch engine run it, the "
            "native engine where heads are alike, plain transformers and other loaders do not"
        )
    elif isinstance(kept, Mapping) and "neurons" in kept:
        neurons = ", ".join(str(width) for width in kept["neurons"].values())
        words.append(f"{neurons} neurons, {kept['heads']} heads ({kept['kv_heads']} key-value), width {kept['hidden']}")
    elif isinstance(kept, Mapping):
        words.append(f"{len(next(iter(kept.values())))} experts")
    elif isinstance(kept, int):
        words.append(f"{kept:,} of {step['of']:,} tokens")
    return "; ".join(words) or "as it was"
