"""What training wins: codes at 2 bits, a shallower student, adapters against full fine-tuning; one JSON line a figure.

python benchmarks/quality/training.py ../shared/assets/models/stories260K \
    --text …/tinystories/train_a.txt --judge …/tinystories/valid.txt --parts student,codes --steps 300
python benchmarks/quality/training.py demo --parts adapters --steps 60 --batch 4 \
    --domain …/tinystories/train_a.txt --domain-judge …/tinystories/valid.txt

Parts: codes, student, adapters (these need --domain). All figures are of written files, on the judging texts. Without
arguments: a few steps on the embedded model, which show that it runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import fettle
from fettle.methods.train import Adapter, Distill, Qat
from fettle.methods.train.training import TrainJob, train
from fettle.pipeline.recipe import parse_recipe

SCHEME = {"bits": 2, "group_size": 32, "asymmetric": True}


class Bench:
    """One model, its texts and a folder for what is written."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.how = {
            "steps": arguments.steps, "batch_windows": arguments.batch, "windows": arguments.steps * arguments.batch,
            "length": arguments.length, "look_every": max(1, arguments.steps // 5), "held_back": 16,
            "checkpoint_every": 10**6,
        }  # fmt: skip

    def tell(self, name: str, model: str | Path, *, domain: bool = False, **more: Any) -> None:
        """Measures a folder on the judging text and prints one line."""
        a = self.arguments
        text = a.domain_judge if domain else a.judge
        found = fettle.evaluate(
            model, reference=None if domain else a.model, text=text, length=a.length, max_tokens=a.judge_tokens
        )
        figures = {"kl": found.kl_mean, "perplexity": found.perplexity, "top1": found.top1_agreement}
        line = {"name": name, **figures, "bits": found.model_bits_per_weight, **more}
        print(json.dumps({k: v for k, v in line.items() if v is not None}), flush=True)

    def compressed(self, method: str) -> Path:
        """The model in 2 bits."""
        steps = [{"method": method, **SCHEME}]
        calibration = {"windows": 128, "length": min(256, self.arguments.length * 2), "text": self.arguments.text}
        recipe = parse_recipe({"name": method, "steps": steps, "calibration": calibration}, "bench")
        fettle.compress(self.arguments.model, self.folder / method, recipe, evaluate=False)
        return self.folder / method

    def trained(self, name: str, method: Any, model: str | Path) -> tuple[Path, float]:
        """The trained folder and the seconds."""
        started = time.monotonic()
        output = self.folder / name
        job = TrainJob(model=model, original=self.arguments.model, output=output, folder=self.folder / f"{name}.run")
        train(method, job)
        return output, round(time.monotonic() - started, 1)

    def codes(self) -> None:
        """2 bits: GPTQ, learned rounding, and both trained on."""
        for method in ("gptq", "learned_rounding"):
            start = self.compressed(method)
            self.tell(f"{method}, 2 bits", start)
            made, seconds = self.trained(
                f"{method}-qat", Qat(**self.how, text=self.arguments.text, learning_rate=self.arguments.rate), start
            )
            self.tell(f"{method}, 2 bits, then qat", made, seconds=seconds, steps=self.arguments.steps)

    def student(self) -> None:
        """Blocks left out: without training, healed by the teacher, and trained on hard labels alone for as long."""
        how = {**self.how, "text": self.arguments.text, "layers": self.arguments.layers, "learning_rate": 1e-3}
        for name, fields in (
            ("untrained", {"learning_rate": 0.0, "steps": 1}),
            ("hard labels", {"hard": 1.0, "soft": 0.0}),
            ("soft labels", {}),
            ("soft labels and features", {"features": 0.1}),
        ):
            made, seconds = self.trained(name.replace(" ", "-"), Distill(**{**how, **fields}), self.arguments.model)
            self.tell(f"{self.arguments.layers} blocks, {name}", made, seconds=seconds)

    def adapters(self) -> None:
        """A new domain: full fine-tuning, and adapters merged for measuring."""
        how = {**self.how, "text": self.arguments.domain}
        self.tell("before", self.arguments.model, domain=True)
        made, seconds = self.trained(
            "full", Distill(**how, hard=1.0, soft=0.0, learning_rate=self.arguments.full_rate), self.arguments.model
        )
        self.tell("full fine-tuning", made, domain=True, seconds=seconds)
        for name, fields in (
            ("lora, rank 2, attention", {"rank": 2, "alpha": 4.0, "targets": "attention"}),
            ("lora, rank 8, all", {"rank": 8}),
        ):
            method = Adapter(**{**how, "learning_rate": 5e-3, **fields}, merge=True)
            made, seconds = self.trained(name.replace(", ", "-").replace(" ", "-"), method, self.arguments.model)
            told = json.loads((self.folder / f"{made.name}.run" / "adapter" / "fettle_adapter.json").read_text())
            self.tell(name, made, domain=True, parameters=told["parameters"], bytes=told["bytes"], seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--text")
    parser.add_argument("--judge")
    parser.add_argument("--domain")
    parser.add_argument("--domain-judge")
    parser.add_argument("--parts", default="student")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1e-3, help="of qat")
    parser.add_argument("--full-rate", type=float, default=1e-3, help="of full fine-tuning")
    parser.add_argument("--judge-tokens", type=int, default=16384)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        for part in arguments.parts.split(","):
            getattr(bench, part)()


if __name__ == "__main__":
    main()
