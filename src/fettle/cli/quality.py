"""The tables of before and after: what a compression cost and what was lost, from result data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rich.table import Table

from fettle.cli.output import duration, number, size, table

NONE = "–"


def quality_table(summary: Mapping[str, Any]) -> Table:
    """The one table of a compression: size, bits, perplexity, KL, agreement, seconds, memory; before and after."""
    found = summary["evaluation"] or {}
    what = "train" if summary.get("kind") == "training" else "compress"
    rows = [
        ("size of the weights' files", size(summary["base"]["bytes"]), size(summary["output"]["bytes"])),
        *evaluation_rows(found),
        *_budget_rows(summary.get("budget")),
        (f"seconds to {what}", NONE, number(summary["seconds"])),
        (f"peak memory to {what}", NONE, size(summary["peak_memory_bytes"])),
    ]
    return table("", ("", "before", "after"), rows, right=(1, 2))


def _budget_rows(budget: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """What the budget's search predicted and measured, all on calibration text."""
    if not budget:
        return []
    rows = [
        ("KL on calibration text, predicted", NONE, number(budget["predicted_kl"])),
        ("  the chosen mix, measured before writing", NONE, number(budget["measured_kl"])),
        ("  the written files", NONE, number(budget["written_kl"])),
    ]
    uniform = budget["uniform"]
    if uniform:
        rows.append((f"  with {uniform['candidate']} in all linears", NONE, number(uniform["measured_kl"])))
    return rows


def evaluation_table(found: Mapping[str, Any]) -> Table:
    """The table of one evaluation; the original's column only where there was a reference."""
    rows = evaluation_rows(found)
    if found.get("bytes") is not None:
        before = size(found["reference_bytes"]) if found.get("reference_bytes") else NONE
        rows.insert(0, ("size of the weights' files", before, size(found["bytes"])))
    if found.get("seconds") is not None:
        rows.append(("time to evaluate", NONE, duration(found["seconds"])))
    if found.get("kl_mean") is None and found.get("reference_perplexity") is None:
        return table("", ("", "measured"), [(label, after) for label, _, after in rows], right=(1,))
    return table("", ("", "original", "measured"), rows, right=(1, 2))


def evaluation_rows(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, before, after) for everything of an evaluation that was measured."""
    rows: list[tuple[str, str, str]] = []

    def add(label: str, key: str, before: str | None = None, *, percent: bool = False, digits: int = 4) -> None:
        value = found.get(key)
        if value is None:
            return
        original = found.get(before) if before else None
        show: Callable[[float], str] = _percent if percent else partial(number, digits=digits)
        rows.append((label, NONE if original is None else show(original), show(value)))

    add("bits per weight, compressed linears", "bits_per_weight")
    add("bits per weight, whole model", "model_bits_per_weight", "reference_model_bits_per_weight")
    add("perplexity a token", "perplexity", "reference_perplexity", digits=5)
    add("  its standard error", "perplexity_standard_error", "reference_perplexity_standard_error", digits=2)
    add("bits a byte", "bits_per_byte", "reference_bits_per_byte")
    add("KL to the original, mean, nats a token", "kl_mean")
    add("  median", "kl_median")
    add("  99th percentile", "kl_p99")
    add("  largest", "kl_max")
    add("top-1 agreement with the original", "top1_agreement", percent=True)
    add("RMS change of the right token's probability", "probability_rms_change")
    add("relative error of the output", "output_relative_error")
    add("cosine of the outputs", "output_cosine", digits=6)
    if found.get("tokens") is not None:
        rows.append(("tokens measured", NONE, f"{found['tokens']:,}"))
    return rows


def _percent(value: float) -> str:
    return f"{value:.2%}"
