"""What a new shape costs and saves: predicted from the shapes, measured on the written files. One JSON line a method.

python benchmarks/reshape/shapes.py MODEL "drop_layers drop=2" "narrow parameters=0.6x" … [--calibration FILE]
    [--text FILE] [--windows N]

Predicted: parameters, FLOPs a token (two a weight that is multiplied, the head once, no attention), bytes of tensors.
Measured on the written folder, reloaded with plain transformers: the same from its files, tokens a second reading (one
window of 256) and writing (64 tokens, one at a time), each the best of five, original and result in turn.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fettle
from fettle.engine.step_seconds import step_seconds
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.source import resolve
from fettle.models.view import parameter_count
from fettle.pipeline.recipe import parse_recipe
from fettle.pipeline.run import prepare

ROUNDS, READ, WRITE = 5, 256, 64


def shape_figures(checkpoint: Checkpoint) -> dict[str, float]:
    """Parameters, FLOPs a token and bytes, from headers alone."""
    anatomy = read_anatomy(checkpoint)
    share = checkpoint.config.get("num_experts_per_tok", 1) / max(
        1, checkpoint.config.get("num_local_experts") or checkpoint.config.get("num_experts") or 1
    )
    used = sum(x.parameters * (share if x.expert is not None else 1) for x in anatomy.linears())
    head = anatomy.head.parameters if anatomy.head is not None else 0
    return {
        "parameters": parameter_count(checkpoint),
        "flops_a_token": 2 * (used + head),
        "tensor_bytes": checkpoint.nbytes,
    }


def seconds(model: Any, ids: torch.Tensor, kind: str) -> float:
    """One measurement."""
    started = time.perf_counter()
    with torch.no_grad():
        if kind == "read":
            model(ids)
        else:
            model.generate(ids[:, :8], max_new_tokens=WRITE, min_new_tokens=WRITE, do_sample=False)
    return time.perf_counter() - started


def tokens_a_second(folders: list[Path], vocabulary: int) -> list[dict[str, float]]:
    """Of every folder, in turn, best of `ROUNDS`."""
    import transformers

    models = [transformers.AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in folders]
    ids = torch.randint(3, vocabulary, (1, READ), generator=torch.Generator().manual_seed(0))
    best: list[dict[str, float]] = [{"read": math.inf, "write": math.inf} for _ in models]
    for _ in range(ROUNDS):
        for kind in ("read", "write"):
            for model, found in zip(models, best, strict=True):
                found[kind] = min(found[kind], seconds(model, ids, kind))
    return [{"read": READ / found["read"], "write": WRITE / found["write"]} for found in best]


def step_milliseconds(folders: list[Path], told: dict[str, Any], step: dict[str, Any]) -> dict[str, float]:
    """A step of the original and of the result on the engine that the step measured, in turn, beside its prediction."""
    engine, tokens = step.get("latency_engine", "native"), step.get("latency_tokens", 1)
    best = [math.inf, math.inf]
    for _ in range(ROUNDS):
        for place, folder in enumerate(folders):
            best[place] = min(best[place], 1e3 * step_seconds(Checkpoint.open(folder), engine=engine, tokens=tokens))
    return {
        "predicted": told["predicted_ms"], "predicted_share": told["predicted_ms"] / told["original_ms"],
        "measured": best[1], "measured_share": best[1] / best[0], "original": best[0],
    }  # fmt: skip


def main() -> int:
    """Compresses, measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("steps", nargs="+")
    parser.add_argument("--calibration")
    parser.add_argument("--text")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--no-speed", action="store_true")
    asked = parser.parse_args()
    base = resolve(asked.model)
    before = shape_figures(Checkpoint.open(base))
    for words in asked.steps:
        steps = []
        for one in words.split(" then "):
            name, *fields = one.split()
            values = dict(field.split("=", 1) for field in fields)
            steps.append({"method": name} | {k: parsed(v) for k, v in values.items()})
        calibration = {"windows": asked.windows} | ({"text": asked.calibration} if asked.calibration else {})
        recipe = parse_recipe({"name": "shape", "calibration": calibration, "steps": steps}, "arguments")
        with tempfile.TemporaryDirectory() as temporary:
            planned = shape_figures(prepare(base, recipe).checkpoint)
            made = fettle.compress(base, Path(temporary) / "out", recipe, evaluate=False)
            reference = None if any(step["method"] == "trim_vocabulary" for step in steps) else base
            found = fettle.evaluate(made.folder, reference=reference, text=asked.text, max_tokens=asked.tokens)
            line: dict[str, Any] = {
                "step": words, "reshaped": made.summary["reshaped"],
                "perplexity": found.perplexity, "reference_perplexity": found.reference_perplexity,
                "bits_per_byte": found.bits_per_byte, "kl_mean": found.kl_mean, "bytes": found.bytes,
                "predicted": {key: planned[key] / before[key] for key in before},
            }  # fmt: skip
            config = Checkpoint.open(made.folder).config
            if not asked.no_speed and "quantization_config" not in config:  # plain folders alone are compared
                after = shape_figures(Checkpoint.open(made.folder))
                line["measured"] = {key: after[key] / before[key] for key in before}
                rows = read_anatomy(Checkpoint.open(made.folder)).embedding
                original, ours = tokens_a_second([base, made.folder], rows.shape[0] if rows is not None else 4)
                line["tokens_a_second"] = {"original": original, "result": ours}
                line["times_faster"] = {kind: ours[kind] / original[kind] for kind in ours}
            timed = [step for step in line["reshaped"] if "predicted_ms" in step]
            if timed:
                line["step_ms"] = step_milliseconds([base, made.folder], timed[-1], steps[-1])
            for step in line["reshaped"]:
                step.pop("scores", None)
            print(json.dumps(line), flush=True)
    return 0


def parsed(word: str) -> Any:
    """A field's value out of a word."""
    try:
        return json.loads(word)
    except ValueError:
        return word


if __name__ == "__main__":
    sys.exit(main())
