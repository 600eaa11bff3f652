"""Whether llama.cpp's converter takes a reshaped folder: it is written, converted, and the file's tensors are compared.

    python benchmarks/reshape/converter.py MODEL "narrow parameters=0.6x" … --converter PATH/convert_hf_to_gguf.py

The converter belongs to llama.cpp's sources (llama-cpp-python's source archive holds them under vendor/llama.cpp, with
the library `gguf` beside it). Converted to float32; compared are the number of tensors, every shape and the sums of all
values with those of the written folder. Query and key rows may be in another order, which is llama.cpp's own. One JSON
line a step; `converted` is false, with the last line of what the converter said, where it refused.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fettle
from fettle.models.checkpoint import Checkpoint
from fettle.pipeline.recipe import parse_recipe


def recipe_of(words: str, args: argparse.Namespace) -> Any:
    name, *fields = words.split()
    values: dict[str, Any] = {}
    for field in fields:
        key, value = field.split("=", 1)
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    calibration = {"windows": args.windows} | ({"text": args.calibration} if args.calibration else {})
    return parse_recipe({"name": "x", "calibration": calibration, "steps": [{"method": name} | values]}, "arguments")


def converted(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What the converter made of a folder."""
    target = folder / "model.gguf"
    command = [sys.executable, str(args.converter), str(folder), "--outfile", str(target), "--outtype", "f32"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        return {"converted": False, "said": ran.stderr.strip().splitlines()[-1:]}
    sys.path.insert(0, str(Path(args.converter).parent / "gguf-py"))
    from gguf import GGUFReader

    found = [t for t in GGUFReader(target).tensors if not t.name.startswith("rope")]
    checkpoint = Checkpoint.open(folder)
    sums = sum(float(checkpoint.read(name).double().sum()) for name in checkpoint.entries)
    shapes = sorted(tuple(int(n) for n in reversed(t.shape)) for t in found)
    return {
        "converted": True, "tensors": len(found), "of": len(checkpoint.entries),
        "same_shapes": shapes == sorted(entry.shape for entry in checkpoint.entries.values()),
        "same_sum": math.isclose(sum(float(t.data.astype("float64").sum()) for t in found), sums, rel_tol=1e-6),
        "bytes": target.stat().st_size,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("steps", nargs="+")
    parser.add_argument("--converter", type=Path, required=True)
    parser.add_argument("--calibration", default=None)
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    for words in args.steps:
        with tempfile.TemporaryDirectory() as temporary:
            made = fettle.compress(args.model, Path(temporary) / "out", recipe_of(words, args), evaluate=False)
            line = {"benchmark": "converter", "model": Path(args.model).name, "step": words}
            print(json.dumps(line | converted(made.folder, args)), flush=True)


if __name__ == "__main__":
    main()
