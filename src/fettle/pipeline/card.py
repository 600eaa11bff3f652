"""The model card (`README.md`) of a written model: recipe, base, calibration, the measured table, how to load it."""

from __future__ import annotations

from typing import Any

LOAD_STANDARD = """from transformers import {auto}, AutoTokenizer  # with compressed-tensors installed

model = {auto}.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""

LOAD_PLAIN = LOAD_STANDARD.replace("  # with compressed-tensors installed", "")

LOAD_FETTLE = """import fettle

loaded = fettle.load("{folder}")  # loaded.model, loaded.tokenizer"""

ROWS = (
    ("perplexity", "perplexity a token", "reference_perplexity", "{:.4f}"),
    ("bits_per_byte", "bits a byte", "reference_bits_per_byte", "{:.4f}"),
    ("kl_mean", "KL to the original, mean, nats a token", None, "{:.5f}"),
    ("kl_p99", "KL to the original, 99th percentile", None, "{:.4f}"),
    ("top1_agreement", "top-1 agreement with the original", None, "{:.2%}"),
    ("bits_per_weight", "bits per weight, compressed linears", None, "{:.3f}"),
    ("model_bits_per_weight", "bits per weight, whole model", None, "{:.3f}"),
    ("bytes", "bytes of the weights' files", "reference_bytes", "{:,}"),
    ("tokens", "tokens evaluated", None, "{:,}"),
    ("output_relative_error", "relative error of the output", None, "{:.5f}"),
    ("output_cosine", "cosine of the outputs", None, "{:.6f}"),
)


def model_card(marker: dict[str, Any], recipe_yaml: str, folder_name: str, quant_method: str) -> str:
    """Renders the card from `fettle.json`'s content; deterministic. `quant_method`: empty where nothing is in codes."""
    base, calibration, results = marker["base"], marker["calibration"], marker["results"]
    lines = [
        "---",
        "library_name: " + ("fettle" if quant_method == "fettle" else "transformers"),
        f"tags: [fettle, {'quantized' if quant_method else 'pruned'}]",
        "---",
        f"# {base['name']}, compressed with fettle ({marker['recipe']['name']})",
        "",
        "## What was lost",
        "",
        *_quality(results),
        "",
        "## How to load it",
        "",
        "```python",
        {"": LOAD_PLAIN, "compressed-tensors": LOAD_STANDARD}.get(quant_method, LOAD_FETTLE).format(
            folder=folder_name, auto="AutoModelForCausalLM" if marker["causal"] else "AutoModel"
        ),
        "```",
        "",
    ]
    if quant_method == "fettle":
        lines += [
            "The compressed-tensors standard cannot say this scheme, so plain transformers refuses the folder; fettle "
            "loads it.",
            "",
        ]
    lines += ["## How it was made", "", "```yaml", recipe_yaml.rstrip(), "```", ""]
    if calibration is not None:
        lines += [
            f"Calibration: {calibration['windows']} windows of {calibration['length']} tokens from "
            f"`{calibration['source']}` (SHA-256 `{calibration['sha256']}`), seed {calibration['seed']}."
            + (f" {calibration['note']}" if calibration["note"] else ""),
            "",
        ]
    lines += ["Base files:", "", "| file | SHA-256 |", "| --- | --- |"]
    lines += [f"| {name} | `{digest}` |" for name, digest in sorted(base["files"].items())]
    lines += [
        "",
        f"Written by fettle {marker['fettle_version']}; hashes of every file and tensor are in `fettle.json`.",
        "",
    ]
    return "\n".join(lines)


def _quality(results: dict[str, Any] | None) -> list[str]:
    if results is None:
        return ["Not measured. Run `fettle evaluate` on this folder with the original as the reference."]
    table = [
        f"Measured on the written files, reloaded; text: `{results.get('text_source', '')}`.",
        "",
        "| what | original | compressed |",
        "| --- | ---: | ---: |",
    ]
    for key, label, reference_key, form in ROWS:
        value = results.get(key)
        if value is None:
            continue
        reference = results.get(reference_key) if reference_key else None
        table.append(f"| {label} | {'' if reference is None else form.format(reference)} | {form.format(value)} |")
    return table
