"""GPTQ against round-to-nearest: the KL ratio on held-out text, from written and reloaded files.

Both asymmetric, group 32, at 4, 3 and 2 bits, calibrated on training text. One JSON line a model and width.

    python benchmarks/quality/gptq_ratio.py demo
    python benchmarks/quality/gptq_ratio.py ../shared/assets/models/stories260K \
        --calibration ../shared/assets/corpora/tinystories/train_a.txt --text
        ../shared/assets/corpora/tinystories/valid.txt
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import fettle
from fettle.pipeline.recipe import parse_recipe


def measure(args: argparse.Namespace, method: str, bits: int, folder: Path) -> fettle.api.Evaluation:  # type: ignore[name-defined]
    """Compresses with one method and measures the written folder."""
    fields: dict[str, Any] = {"method": method, "bits": bits, "group_size": 32, "asymmetric": True}
    calibration = {"windows": args.windows, "length": args.length, "seed": 0}
    if args.calibration:
        calibration["text"] = args.calibration
    recipe = parse_recipe({"name": f"{method}-{bits}", "steps": [fields], "calibration": calibration}, "benchmark")
    fettle.compress(args.model, folder, recipe, evaluate=False)
    return fettle.evaluate(folder, reference=args.model, text=args.text, max_tokens=args.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", default=None)
    parser.add_argument("--text", default=None)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    args = parser.parse_args()
    for bits in args.bits:
        with tempfile.TemporaryDirectory() as temporary:
            nearest = measure(args, "round_to_nearest", bits, Path(temporary) / "nearest")
            gptq = measure(args, "gptq", bits, Path(temporary) / "gptq")
        print(
            json.dumps(
                {
                    "benchmark": "gptq_ratio", "model": Path(args.model).name, "bits": bits, "group_size": 32,
                    "round_to_nearest_kl": nearest.kl_mean, "gptq_kl": gptq.kl_mean,
                    "ratio": round((gptq.kl_mean or 0.0) / (nearest.kl_mean or 1.0), 4),
                    "round_to_nearest_perplexity": nearest.perplexity, "gptq_perplexity": gptq.perplexity,
                    "reference_perplexity": gptq.reference_perplexity, "tokens": gptq.tokens,
                }
            ),
            flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
