"""Masks by each method: KL to the original on held-out text, from written and reloaded files. One JSON line a case.

    python benchmarks/quality/masks.py demo
    python benchmarks/quality/masks.py ../shared/assets/models/stories260K \
        --calibration ../shared/assets/corpora/tinystories/train_a.txt \
        --text ../shared/assets/corpora/tinystories/valid.txt

"after" are two runs: a dense pruned folder is written first, then its values are made codes, the mask kept (zeros have
the least score, so they go again); both are measured against the original.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import fettle
from fettle.pipeline.recipe import parse_recipe

SCORES = ("magnitude", "wanda", "sparsegpt", "taylor", "activation_sparsity")
SPREADS = ("global", "outliers", "sensitivity")
CODES = {"bits": 4, "group_size": 32, "asymmetric": True}
CASES: dict[str, dict[str, Any]] = {
    **{f"{name} 50%": {"method": name} for name in SCORES},
    "wanda 50%, by row": {"method": "wanda", "pattern": "row"},
    "sparsegpt 50%, as in the paper": {"method": "sparsegpt", "heal": "none", "correction": 0.0},
    "wanda 50%, healed in 8 rounds": {"method": "wanda", "heal": "least_squares", "rounds": 8},
    **{f"{name} 2:4": {"method": name, "pattern": "2:4"} for name in SCORES[:3]},
    **{
        f"sparsegpt {name}, tuned {steps} steps": {"method": "sparsegpt", "tune_steps": steps, **pattern}
        for name, pattern in (("50%", {}), ("2:4", {"pattern": "2:4"})) for steps in (0, 50, 100, 200)
    },
    **{f"magnitude 50%, {how}": {"method": "magnitude", "allocation": how} for how in SPREADS},
    "sparsegpt 50%, sensitivity": {"method": "sparsegpt", "allocation": "sensitivity"},
    "sparsegpt 2:4 and 4 bits": {"method": "sparsegpt", "pattern": "2:4", **CODES},
    "sparsegpt 50% and 4 bits": {"method": "sparsegpt", **CODES},
    "sparsegpt 2:4, after it nearest 4 bits": {
        "method": "sparsegpt", "pattern": "2:4", "after": {"method": "magnitude", "pattern": "2:4", **CODES},
    },
    "sparsegpt 2:4, after it 4 bits by its sweep": {
        "method": "sparsegpt", "pattern": "2:4", "after": {"method": "sparsegpt", "pattern": "2:4", **CODES},
    },
}  # fmt: skip


def compress(args: argparse.Namespace, model: Any, out: Path, step: dict[str, Any], **keys: Any) -> None:
    calibration: dict[str, Any] = {"windows": args.windows, "length": args.length, "seed": 0}
    if args.calibration:
        calibration["text"] = args.calibration
    recipe = {"name": "benchmark", "steps": [step], "calibration": calibration, **keys}
    fettle.compress(model, out, parse_recipe(recipe, "benchmark"), evaluate=False)


def measure(args: argparse.Namespace, step: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Writes one case and measures the folder."""
    fields, started, began = dict(step), time.monotonic(), time.process_time()
    after, allocation = fields.pop("after", None), fields.pop("allocation", "uniform")
    out = folder / "out"
    if after is None:
        compress(args, args.model, out, fields, allocation=allocation)
    else:
        compress(args, args.model, folder / "pruned", fields, storage="dense")
        compress(args, folder / "pruned", out, after)
    seconds, used = time.monotonic() - started, time.process_time() - began
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the process so far: give it one case alone
    found = fettle.evaluate(out, reference=args.model, text=args.text, max_tokens=args.tokens)
    return {
        "kl": found.kl_mean, "perplexity": found.perplexity, "reference_perplexity": found.reference_perplexity,
        "bits_per_weight": found.bits_per_weight, "tokens": found.tokens, "seconds": round(seconds, 1),
        "processor_seconds": round(used, 1), "peak_memory_bytes": peak,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", default=None)
    parser.add_argument("--text", default=None)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    args = parser.parse_args()
    for case in args.cases:
        with tempfile.TemporaryDirectory() as temporary:
            line = {"benchmark": "masks", "model": Path(args.model).name, "case": case, "windows": args.windows}
            print(json.dumps(line | measure(args, CASES[case], Path(temporary))), flush=True)


if __name__ == "__main__":
    main()
