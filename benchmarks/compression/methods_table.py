"""What methods cost on one model: seconds and peak memory, each in a process of its own; one JSON line a method.

    python benchmarks/compression/random_llama.py build/llama-1.1b
    python benchmarks/compression/methods_table.py build/llama-1.1b --text CALIBRATION.txt
    python benchmarks/compression/methods_table.py build/llama-2b --only gptq --text CALIBRATION.txt

A method that looks at whole blocks may be kept to the first ones (`blocks` in its line): its seconds are then those of
that many, and `seconds_per_block` is what compares. Peak memory is the largest resident set of that process, importing
torch included. Nothing is evaluated: a random model has no quality.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GROUPS = {"bits": 4, "group_size": 32, "asymmetric": True}
CHANNELS = {"bits": 8, "group_size": None, "activations": "dynamic", "activation_asymmetric": True}
PAPER = {"clip": "none", "refine_passes": 0, "correction": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "round_to_nearest": {"method": "round_to_nearest", **GROUPS},
    "hqq": {"method": "hqq", **GROUPS},
    "awq": {"method": "awq", **GROUPS},
    "smoothquant_w8a8": {"method": "smoothquant", **CHANNELS},
    "gptq_paper": {"method": "gptq", **GROUPS, **PAPER},
    "gptq": {"method": "gptq", **GROUPS},
    "learned_rounding": {"method": "learned_rounding", **GROUPS},
}
SLOW = ("learned_rounding",)  # kept to --blocks blocks unless --short names others


def recipe_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The recipe of a method: all blocks, or the first ones of a slow one."""
    step = dict(METHODS[name])
    if name in args.short:
        step["where"] = {"blocks": f"0-{args.blocks - 1}"}
    calibration = {"windows": args.windows, "length": args.length, "seed": 0}
    if args.text is not None:
        calibration["text"] = str(args.text)
    return {"name": name, "steps": [step], "calibration": calibration}


def work(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Compresses in this process and says what it took."""
    import fettle
    from fettle.pipeline.recipe import parse_recipe

    with tempfile.TemporaryDirectory(dir=args.scratch) as temporary:
        started = time.monotonic()
        made = fettle.compress(
            args.model, Path(temporary) / "out", parse_recipe(recipe_of(name, args), "table"), evaluate=False,
            threads=args.threads,
        )  # fmt: skip
        seconds = time.monotonic() - started
    ledger = made.summary["ledger"]
    blocks = len({line["block"] for line in ledger})
    return {
        "benchmark": "methods_table",
        "method": name,
        "blocks": blocks,
        "linears": len(ledger),
        "seconds": round(seconds, 1),
        "seconds_per_block": round(seconds / blocks, 2),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": args.threads,
        "calibration_tokens": args.windows * args.length,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--text", type=Path, default=None, help="calibration text; the embedded one by default")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--short", nargs="+", choices=tuple(METHODS), default=SLOW, help="kept to the first blocks")
    parser.add_argument("--blocks", type=int, default=2, help="how many blocks those get")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=None, help="folder for what is written")
    parser.add_argument("--inside", choices=tuple(METHODS), default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is not None:
        print(json.dumps(work(args.inside, args)), flush=True)
        return 0
    failed = 0
    for name in args.only:
        done = subprocess.run(
            [sys.executable, *sys.argv, "--inside", name], stdout=subprocess.PIPE, text=True, check=False
        )
        failed += done.returncode != 0
        last = done.stdout.strip().splitlines()[-1:] if done.returncode == 0 else []
        print(
            *last or [json.dumps({"benchmark": "methods_table", "method": name, "failed": done.returncode})], flush=True
        )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
