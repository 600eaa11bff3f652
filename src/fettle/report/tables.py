"""The page's numbers as rows of text: before and after, side by side, by role; and the verdict in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NONE = "–"
Row = tuple[str, str, str]

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


def figures(document: Mapping[str, Any]) -> list[Row]:
    """(what, before, after) for everything that the document holds."""
    found = document.get("evaluation") or {}
    base, output = document.get("base") or {}, document.get("output") or {}
    rows: list[Row] = []
    before, after = base.get("bytes", found.get("reference_bytes")), output.get("bytes", found.get("bytes"))
    if after is not None:
        rows.append(("Size of the weights' files", size(before), size(after)))
    for label, key, reference, form in MEASURES:
        if found.get(key) is not None:
            original = found.get(reference) if reference else None
            rows.append((label, NONE if original is None else form.format(original), form.format(found[key])))
    if document.get("kind") == "compression":
        rows.append(("Time to compress", NONE, f"{document['seconds']:.1f} s"))
        rows.append(("Peak memory to compress", NONE, size(document["peak_memory_bytes"])))
    if found.get("seconds"):
        rows.append(("Time to measure", NONE, f"{found['seconds']:.1f} s"))
        rows.append(("Peak memory to measure", NONE, size(found["peak_memory_bytes"])))
    return rows


def comparison(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several documents side by side: {"names": […], "rows": [(what, [value, …])]}."""
    tables = [{label: after for label, _, after in figures(document)} for document in documents]
    labels = list(dict.fromkeys(label for table in tables for label in table))
    names = [_name(document, number) for number, document in enumerate(documents, start=1)]
    return {"names": names, "rows": [(label, [table.get(label, NONE) for table in tables]) for label in labels]}


def _name(document: Mapping[str, Any], number: int) -> str:
    model, recipe = document.get("model") or f"result {number}", document.get("recipe")
    return f"{model}, {recipe['name']}" if recipe else str(model)


def verdict(document: Mapping[str, Any]) -> str:
    """What came of it, in one sentence."""
    found = document.get("evaluation") or {}
    before = (document.get("base") or {}).get("bytes", found.get("reference_bytes"))
    after = (document.get("output") or {}).get("bytes", found.get("bytes"))
    name = document.get("model") or "The model"
    smaller = f"{name} takes {size(after)}" + (
        f" instead of {size(before)}, {before / after:.2f} times less" if before and after else ""
    )
    if not found:
        return f"{smaller}; what was lost has not been measured."
    if found.get("kl_mean") is not None:
        change = found["perplexity"] / found["reference_perplexity"] - 1
        return (
            f"{smaller}; it makes the same first choice as the original on {found['top1_agreement']:.1%} of {found['tokens']:,} "  # noqa: E501
            f"held-out tokens, and perplexity {'rises' if change >= 0 else 'falls'} by {abs(change):.2%}, from "
            f"{found['reference_perplexity']:.3f} to {found['perplexity']:.3f}."
        )
    if found.get("output_cosine") is not None:
        return f"{smaller}; its outputs keep a cosine of {found['output_cosine']:.5f} to the original's."
    if found.get("perplexity") is not None:
        return f"{smaller}; its perplexity is {found['perplexity']:.3f} on {found['tokens']:,} tokens, with no original to compare."  # noqa: E501
    return f"{smaller}."


def role_errors(ledger: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean relative squared error of the linears of each role, in percent."""
    by_role: dict[str, list[float]] = {}
    for line in ledger:
        by_role.setdefault(str(line["role"]), []).append(float(line["error"]))
    return {role: 100 * sum(errors) / len(errors) for role, errors in by_role.items()}


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
