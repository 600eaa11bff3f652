"""A shallower sentence encoder, distilled: STS-B's Spearman kept, bytes, and its speed beside its teacher's.

The student is made of some of the teacher's own blocks and learns from the sentences of the training pairs alone
(those that the judged file holds as well are left out). Both are judged from their written folders by the cosines of
mean vectors (`sentences.py`); seconds are medians of rounds that take turns. One JSON line for the student before
training, one after.

    python benchmarks/quality/encoder_student.py FOLDER ../shared/assets/tasks/stsb/sts-test.csv --steps 200
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from sentences import embed, read_pairs, score

import fettle
from fettle.pipeline.chain import chain_from_method

ROUNDS = 5


def training_sentences(pairs: Path) -> str:
    """Every sentence of the training file once, shuffled, without those of the judged file."""
    judged = read_pairs(pairs)
    first, second, _ = read_pairs(pairs.with_name("sts-train.csv"))
    lines = sorted({line.strip() for line in (*first, *second)} - {line.strip() for line in (*judged[0], *judged[1])})
    random.Random(0).shuffle(lines)
    return "\n".join(line for line in lines if line)


def seconds(folders: list[Path | str], sentences: list[str]) -> list[float]:
    """Median seconds of each model for the same sentences, in turn."""
    loaded = [fettle.load(folder) for folder in folders]
    found: list[list[float]] = [[] for _ in loaded]
    for _ in range(ROUNDS):
        for model, times in zip(loaded, found, strict=True):
            began = time.perf_counter()
            embed(model, sentences)
            times.append(time.perf_counter() - began)
    return [statistics.median(times) for times in found]


def size(folder: Path | str) -> int:
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def tell(name: str, student: Path, model: str, pairs: Any, original: float, steps: int) -> None:
    found, times = score(student, pairs), seconds([model, student], pairs[0][:128])
    line = {"benchmark": "encoder_student", "student": name, "steps": steps, "spearman": round(found, 5)}
    line |= {"original": round(original, 5), "kept": round(found / original, 5), "pairs": len(pairs[2])}
    line |= {"bytes": size(student), "original_bytes": size(model), "speedup": round(times[0] / times[1], 3)}
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--student-map", default="uniform")
    parser.add_argument("--student", type=Path, help="a student that is there: it is judged, nothing is trained")
    args = parser.parse_args()
    pairs = read_pairs(args.pairs)
    original = score(args.model, pairs)
    if args.student is not None:
        tell("given", args.student, args.model, pairs, original, 0)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = folder / "sentences.txt"
        text.write_text(training_sentences(args.pairs), encoding="utf-8")
        fields = {
            "layers": args.layers, "student_map": args.student_map, "trains": "blocks", "text": str(text),
            "windows": 9600, "length": 48, "batch_windows": 24, "held_back": 48, "look_every": 50,
        }  # fmt: skip
        for name, more in (
            ("untrained", {"steps": 1, "learning_rate": 0.0}),
            ("distilled", {"steps": args.steps, "learning_rate": 3e-4}),
        ):
            fettle.train(args.model, folder / name, chain_from_method("distill", {**fields, **more}), evaluate=False)
            tell(name, folder / name, args.model, pairs, original, int(more["steps"]))


if __name__ == "__main__":
    main()
