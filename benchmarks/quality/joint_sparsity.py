"""A mask and codes of 4 bits together against one after the other: KL to the original on held-out text, from written
and reloaded files. One JSON line a case.

    python benchmarks/quality/joint_sparsity.py demo
    python benchmarks/quality/joint_sparsity.py ../shared/assets/models/stories260K \
        --calibration ../shared/assets/corpora/tinystories/train_a.txt \
        --text ../shared/assets/corpora/tinystories/valid.txt

    joint           sparsegpt with bits: mask, healing and codes of a linear before the next linear is looked at
    one sweep       the same as in the paper's section 3.5: no healing, mask and codes in one pass over the columns
    mask first      the whole model is pruned and written; a second run gives what stayed codes by GPTQ's sweep, in the
                    mask
    mask, nearest   the same, and the second run takes the nearest codes
    codes first     the whole model gets GPTQ's codes; a second run prunes their values and codes what stays again
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import fettle
from fettle.methods.prune.selection import KnownMask
from fettle.methods.prune.sparsegpt import SparseGpt, _with_codes
from fettle.methods.quantize.sweep import corrected, factorize, row_slices
from fettle.models.loading import load
from fettle.pipeline.recipe import Recipe, Step, parse_recipe
from fettle.tensors.masked import MaskedTensor
from fettle.tensors.scheme import Scheme

CODES = {"bits": 4, "group_size": 32, "asymmetric": True}


@dataclass(frozen=True, kw_only=True)
class InTheMask(SparseGpt):
    """GPTQ's sweep over a pruned weight: what is zero stays zero."""

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> MaskedTensor:
        scheme, kept = self.scheme(dtype), weight != 0
        assert isinstance(scheme.values, Scheme)
        factor = factorize(statistics["gram"], damping=self.damping, activation_order=False)
        drift = statistics.get("drift")
        target = weight.float() if drift is None else corrected(weight, drift * self.correction, factor, 1.0)
        width = scheme.values.group_width(weight.shape[1])
        tiles = [(rows, KnownMask(kept=kept[rows], width=width)) for rows in row_slices(len(kept))]
        return _with_codes(target, tiles, factor, scheme, scheme.values, self.clip)


def compress(args: argparse.Namespace, model: Any, out: Path, method: Any, storage: str = "pack-quantized") -> None:
    calibration: dict[str, Any] = {"windows": args.windows, "length": args.length, "seed": 0}
    if args.calibration:
        calibration["text"] = args.calibration
    plain = parse_recipe({"name": "x", "steps": [{"method": "magnitude"}], "calibration": calibration}, "benchmark")
    recipe = Recipe(name="x", steps=(Step(method=method),), calibration=plain.calibration, storage=storage)
    fettle.compress(model, out, recipe, evaluate=False)


def write(args: argparse.Namespace, case: str, fields: dict[str, Any], folder: Path) -> Path:
    """Writes the folder of one case."""
    from fettle.methods.prune import Magnitude
    from fettle.methods.quantize.gptq import Gptq

    out, tuned = folder / "out", {**fields, "tune_steps": args.tune_steps}
    if case == "joint":
        compress(args, args.model, out, SparseGpt(**tuned, **CODES))
    elif case == "one sweep":
        compress(args, args.model, out, SparseGpt(**fields, **CODES, heal="none", rounds=1, tune_steps=0))
    elif case == "codes first":
        compress(args, args.model, folder / "coded", Gptq(**CODES))
        loaded = load(folder / "coded", dense=True)
        loaded.model.save_pretrained(folder / "dense")
        loaded.tokenizer.save_pretrained(folder / "dense")
        compress(args, folder / "dense", out, SparseGpt(**tuned, **CODES))
    else:
        compress(args, args.model, folder / "pruned", SparseGpt(**tuned), "dense")
        nearest = case == "mask, nearest"
        second = Magnitude(**fields, **CODES) if nearest else InTheMask(**fields, **CODES, tune_steps=0)
        compress(args, folder / "pruned", out, second)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", default=None)
    parser.add_argument("--text", default=None)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--tune-steps", type=int, default=0, help="of SparseGPT; the run that codes is not tuned")
    parser.add_argument("--patterns", nargs="+", default=["2:4", "layer"])
    cases = ("joint", "one sweep", "mask first", "mask, nearest", "codes first")
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases), metavar="CASE")
    args = parser.parse_args()
    for pattern in args.patterns:
        for case in args.cases:
            with tempfile.TemporaryDirectory() as temporary:
                started = time.monotonic()
                out = write(args, case, {"pattern": pattern}, Path(temporary))
                found = fettle.evaluate(out, reference=args.model, text=args.text, max_tokens=args.tokens)
                line = {
                    "benchmark": "joint_sparsity", "model": Path(args.model).name, "pattern": pattern, "case": case,
                    "kl": found.kl_mean, "perplexity": found.perplexity, "bits_per_weight": found.bits_per_weight,
                    "tokens": found.tokens, "seconds": round(time.monotonic() - started, 1),
                }  # fmt: skip
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
