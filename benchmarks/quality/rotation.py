"""Rotation or not: KL to the original on held-out text, weights alone and with quantized inputs, from written files.

Both sides asymmetric in groups of 32; inputs dynamic, a scale a token. One JSON line a pair.

    python benchmarks/quality/rotation.py demo
    python benchmarks/quality/rotation.py ../shared/assets/models/stories260K \
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


def measure(args: argparse.Namespace, fields: dict[str, Any], rotated: bool, folder: Path) -> Any:
    """Compresses and measures the written folder."""
    calibration = {"windows": args.windows, "length": args.length, "seed": 0}
    if args.calibration:
        calibration["text"] = args.calibration
    steps = [{"method": "rotation", "seed": args.seed}] * rotated + [{**fields, "group_size": 32, "asymmetric": True}]
    fettle.compress(
        args.model, folder, parse_recipe({"steps": steps, "calibration": calibration}, "benchmark"), evaluate=False
    )
    return fettle.evaluate(folder, reference=args.model, text=args.text, max_tokens=args.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--calibration", default=None)
    parser.add_argument("--text", default=None)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=4_096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=["round_to_nearest", "gptq"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--input-bits", type=int, nargs="+", default=[8, 4], help="beside weights of 4 bits")
    args = parser.parse_args()
    cases: list[tuple[int, int | None]] = [*((bits, None) for bits in args.bits), *((4, n) for n in args.input_bits)]
    for method in args.methods:
        for bits, inputs in cases:
            fields: dict[str, Any] = {"method": method, "bits": bits}
            if inputs is not None:
                fields |= {"activations": "dynamic", "activation_bits": inputs, "activation_asymmetric": True}
            with tempfile.TemporaryDirectory() as temporary:
                plain = measure(args, fields, False, Path(temporary) / "plain")
                turned = measure(args, fields, True, Path(temporary) / "rotated")
            found = {
                "benchmark": "rotation", "model": Path(args.model).name, "method": method, "bits": bits,
                "input_bits": inputs, "plain_kl": plain.kl_mean, "rotated_kl": turned.kl_mean,
                "ratio": round((turned.kl_mean or 0.0) / (plain.kl_mean or 1.0), 3),
                "plain_bytes": plain.bytes, "rotated_bytes": turned.bytes, "tokens": plain.tokens,
            }  # fmt: skip
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
