"""The page's numbers as rows of text: before and after, side by side, by role; and the verdict in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

NONE = "–"
Row = tuple[str, str, str]

LIMITS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # nats, edges of the histogram

# label, key of the evaluation, key of the original's value, form
MEASURES: tuple[tuple[str, str, str | None, str], ...] = (
    ("Bits per weight, compressed linears", "bits_per_weight", None, "{:.3f}"),
    ("Bits per weight, whole model", "model_bits_per_weight", "reference_model_bits_per_weight", "{:.3f}"),
    ("Perplexity a token", "perplexity", "reference_perplexity", "{:.4f}"),
    ("  standard error", "perplexity_standard_error", "reference_perplexity_standard_error", "{:.3f}"),
    ("Bits a byte", "bits_per_byte", "reference_bits_per_byte", "{:.4f}"),
    ("KL to the original, mean", "kl_mean", None, "{:.5f} nats"),
    ("  median", "kl_median", None, "{:.5f} nats"),
    ("  99th percentile", "kl_p99", None, "{:.4f} nats"),
    ("  largest", "kl_max", None, "{:.3f} nats"),
    ("Top-1 agreement with the original", "top1_agreement", None, "{:.2%}"),
    ("RMS change of the right token's probability", "probability_rms_change", None, "{:.4f}"),
    ("Relative error of the last block's output", "output_relative_error", None, "{:.4f}"),
    ("Cosine of the last block's outputs", "output_cosine", None, "{:.6f}"),
    ("Tokens measured", "tokens", None, "{:,}"),
)


LEAST_SHARE = 0.001  # a smaller share of the tokens is not worth a line
SIZES = ("bits_per_weight", "model_bits_per_weight")


def figures(document: Mapping[str, Any]) -> dict[str, list[Row]]:
    """(what, before, after) for everything that the document holds, under the headings size, quality and cost."""
    found = document.get("evaluation") or {}
    base, output = document.get("base") or {}, document.get("output") or {}
    rows: dict[str, list[Row]] = {"Size": [], "Quality": [], "Cost": []}
    before, after = base.get("bytes", found.get("reference_bytes")), output.get("bytes", found.get("bytes"))
    if after is not None:
        adapter = output.get("adapter")
        label = "Size of the adapter's file" if adapter else "Size of the weights' files"
        rows["Size"].append((label, NONE if adapter else size(before), size(after)))
    for label, key, reference, form in MEASURES:
        if found.get(key) is not None:
            original = found.get(reference) if reference else None
            row = (label, NONE if original is None else form.format(original), form.format(found[key]))
            rows["Size" if key in SIZES else "Quality"].append(row)
    rows["Quality"] += [row for line in document.get("stages") or [] for row in stage_figures(line)]
    rows |= {"Budget": budget_figures(document["budget"])} if document.get("budget") else {}
    what = {"compression": "compress", "training": "train"}.get(str(document.get("kind")))
    if what is not None:
        rows["Cost"].append((f"Time to {what}", NONE, f"{document['seconds']:.1f} s"))
        rows["Cost"].append((f"Peak memory to {what}", NONE, size(document["peak_memory_bytes"])))
    if found.get("seconds"):
        rows["Cost"].append(("Time to measure", NONE, f"{found['seconds']:.1f} s"))
        rows["Cost"].append(("Peak memory to measure", NONE, size(found.get("peak_memory_bytes"))))
    return {heading: lines for heading, lines in rows.items() if lines}


def budget_figures(budget: Mapping[str, Any]) -> list[Row]:
    """What was asked, predicted and measured on the calibration text, and what one scheme in all linears would cost."""
    asked = budget["asked"]
    told = f"{asked['bits_per_weight']:g} bits per weight" if asked["bits_per_weight"] else size(asked["size_bytes"])
    table = [
        ("Asked", NONE, told),
        ("Bits per weight of the chosen mix", NONE, f"{budget['bits_per_weight']:.3f}"),
        ("KL on calibration text, predicted", NONE, f"{budget['predicted_kl']:.5f} nats"),
        ("  the mix, measured before writing", NONE, f"{budget['measured_kl']:.5f} nats"),
    ]
    if budget.get("written_kl") is not None:
        table.append(("  the written files, measured", NONE, f"{budget['written_kl']:.5f} nats"))
    if budget.get("estimate_error") is not None:
        table.append(("Error of the first estimate", NONE, f"{budget['estimate_error']:+.1%}"))
    if budget.get("uniform"):
        uniform = budget["uniform"]
        table.append(
            (f"The same with {uniform['candidate']} in all linears", NONE, f"{uniform['measured_kl']:.5f} nats")
        )
    shares = ", ".join(f"{label} {share:.0%}" for label, share in budget["shares"].items())
    return [*table, ("Weights by scheme", NONE, shares)]


def stage_figures(line: Mapping[str, Any]) -> list[Row]:
    """What a stage that compressed a trained model lost against that."""
    found = line.get("against_input")
    if not found:
        return []
    pair = [found.get(f"{prefix}bits_per_byte") for prefix in ("reference_", "")]
    table: list[Row] = []
    if found.get("kl_mean") is not None:
        table.append((f"{line['name']}: KL to what it read, mean", NONE, f"{found['kl_mean']:.5f} nats"))
    if None not in pair:
        table.append((f"{line['name']}: bits a byte, before and behind", NONE, " → ".join(f"{x:.4f}" for x in pair)))
    return table


def comparison(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several documents side by side: {"names": […], "groups": {heading: [(what, [value, …])]}}."""
    tables = [figures(document) for document in documents]
    groups = {}
    for heading in dict.fromkeys(heading for table in tables for heading in table):
        columns = [{label: after for label, _, after in table.get(heading, [])} for table in tables]
        labels = dict.fromkeys(label for column in columns for label in column)
        groups[heading] = [(label, [column.get(label, NONE) for column in columns]) for label in labels]
    return {"names": names(documents), "groups": groups}


def names(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each document; those of the same model and recipe get a number."""
    found = [_name(document, number) for number, document in enumerate(documents, start=1)]
    return [f"{name} ({number})" if found.count(name) > 1 else name for number, name in enumerate(found, start=1)]


def _name(document: Mapping[str, Any], number: int) -> str:
    model, recipe = document.get("model") or f"result {number}", document.get("recipe")
    return f"{model}, {recipe['name']}" if recipe else str(model)


USABLE_AGREEMENT = 0.6  # of the next tokens; below it a model writes another text than its original
COARSE_GRIDS = {"power_of_two": "powers of two", "ternary": "ternary levels", "binary": "binary levels"}


def verdict(document: Mapping[str, Any]) -> str:
    """What came of it, in one sentence."""
    found = document.get("evaluation") or {}
    before = (document.get("base") or {}).get("bytes", found.get("reference_bytes"))
    after = (document.get("output") or {}).get("bytes", found.get("bytes"))
    name = document.get("model") or "The model"
    if (document.get("output") or {}).get("adapter"):
        name, before = f"The adapter of {name}", None
    smaller = f"{name} takes {size(after)}" + (
        f" instead of {size(before)}, {before / after:.2f} times less" if before and after else ""
    )
    if not found:
        return f"{smaller}; what was lost has not been measured."
    if found.get("kl_mean") is not None:
        change = found["perplexity"] / found["reference_perplexity"] - 1
        return (
            f"{smaller}; it makes the same first choice as the original on {found['top1_agreement']:.1%} of "
            f"{found['tokens']:,} tokens, and perplexity {'rises' if change >= 0 else 'falls'} by {abs(change):.2%}, "
            f"from {found['reference_perplexity']:.3f} to {found['perplexity']:.3f}."
        )
    if found.get("output_cosine") is not None:
        return f"{smaller}; its outputs keep a cosine of {found['output_cosine']:.5f} to the original's."
    if found.get("perplexity") is not None:
        told = f"its perplexity is {found['perplexity']:.3f} on {found['tokens']:,} tokens"
        return f"{smaller}; {told}, with no original to compare."
    return f"{smaller}."


def warning(document: Mapping[str, Any]) -> str:
    """What a reader must not miss: a model that lost too much, and why that was to be expected; else nothing."""
    found = document.get("evaluation") or {}
    agreement = found.get("top1_agreement")
    if agreement is None or agreement >= USABLE_AGREEMENT:
        return ""
    lost = (
        f"Its first choice differs from the original's on {1 - agreement:.0%} of the tokens: as it is, it is of no use."
    )
    schemes = " ".join(str(line.get("scheme", "")) for line in document.get("ledger") or [])
    coarse = [word for name, word in COARSE_GRIDS.items() if name in schemes]
    if coarse:
        return f"{lost} {' and '.join(coarse).capitalize()} are too coarse for a model that was not trained with them."
    return f"{lost} Give it more bits, smaller groups, or a method that looks at text."


def role_errors(ledger: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean relative squared error of the linears of each role, in percent."""
    by_role: dict[str, list[float]] = {}
    for line in ledger:
        by_role.setdefault(str(line["role"]), []).append(float(line["error"]))
    return {role: 100 * sum(errors) / len(errors) for role, errors in by_role.items()}


def kl_shares(histogram: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The histogram in words: (KL below, share of the tokens), for the limits where that says something."""
    edges, counts = histogram.get("edges") or [], histogram.get("counts") or []
    total = sum(counts)
    found: list[tuple[str, str]] = []
    for limit in LIMITS:
        place = next((i for i, edge in enumerate(edges) if edge > 0 and math.isclose(edge, limit, rel_tol=1e-9)), None)
        below = sum(counts[:place]) if place is not None else 0
        if total and below / total >= LEAST_SHARE:
            found.append((f"{limit:g}", "all" if below == total else f"{min(below / total, 0.999):.1%}"))
        if total and below == total:
            break
    return found


def size(count: Any) -> str:
    """Bytes for people: 10.4 MB, with the exact number behind it where that is short."""
    if count is None:
        return NONE
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return (
                f"{int(count):,} bytes"
                if unit == "bytes"
                else f"{value:,.3g} {unit}"
                if value < 1000
                else f"{value:,.0f} {unit}"
            )
        value /= 1000
    return NONE
