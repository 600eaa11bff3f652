"""What the parts of `training.py` share: one model, its texts, a folder of what was made, and one way to measure."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fettle
from fettle.api.completing import complete
from fettle.data.windows import evaluation_windows, read_text
from fettle.methods.train.training import TrainJob, train
from fettle.models.checkpoint import Checkpoint
from fettle.pipeline.recipe import parse_recipe

ROUNDS, READ = 15, 256  # of a latency: interleaved repeats, tokens of a window


class Bench:
    """One model, its texts and a folder for what is written; what is there already is not made again."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder

    def fields(self, *, domain: bool = False, steps: int | None = None, **more: Any) -> dict[str, Any]:
        """The loop's fields, the same for every contender; `more` are a contender's own."""
        a = self.arguments
        steps = a.steps if steps is None else steps
        found = {
            "steps": steps, "batch_windows": a.batch, "windows": min(steps * a.batch, 20_000), "length": a.length,
            "look_every": max(1, steps // 5), "patience": 100, "held_back": 16, "checkpoint_every": 50,
            "text": a.domain if domain else a.text,
        }  # fmt: skip
        return {**found, **more}

    def tell(self, name: str, model: str | Path, **more: Any) -> None:
        """Measures a written folder on the judging text against the original and prints one line."""
        a = self.arguments
        found = fettle.evaluate(model, reference=a.model, text=a.judge, length=a.length, max_tokens=a.judge_tokens)
        figures = {"kl": found.kl_mean, "perplexity": found.perplexity, "same_first_choice": found.top1_agreement}
        say(name=name, **figures, bits=found.model_bits_per_weight, **more)

    def compressed(self, name: str, *steps: Mapping[str, Any], model: str | Path | None = None) -> Path:
        """The model after some steps of compression, calibrated on the training text."""
        output = self.folder / name
        if not (output / "fettle.json").is_file():
            calibration = {"windows": 128, "length": min(256, self.arguments.length * 2), "text": self.arguments.text}
            recipe = parse_recipe(
                {"name": name, "steps": [dict(s) for s in steps], "calibration": calibration}, "bench"
            )
            fettle.compress(self.arguments.model if model is None else model, output, recipe, evaluate=False)
        return output

    def trained(self, name: str, method: Any, model: str | Path) -> tuple[Path, dict[str, Any]]:
        """The trained folder; steps, seconds and the held-back losses, the start's first."""
        name = name.replace(", ", "-").replace(" ", "-")
        output = self.folder / name
        job = TrainJob(
            model=model, original=self.arguments.model, output=output, folder=self.folder / f"{name}.run",
            complete=complete,
        )  # fmt: skip
        told = self.folder / f"{name}.told.json"
        if not told.is_file():
            curve = train(method, job)
            losses = [round(loss, 4) for _, loss in curve.held_back]
            found = {"steps": len(curve.losses), "seconds": round(curve.seconds), "held_back": losses}
            told.write_text(json.dumps(found), encoding="utf-8")
        return output, json.loads(told.read_text(encoding="utf-8"))

    def windows(self, text: str | None) -> list[Tensor]:
        """Windows int64 [1, length] of a judging text (None: the held-out one)."""
        a = self.arguments
        tokenizer = fettle.load(a.model).tokenizer
        found = evaluation_windows(
            tokenizer, read_text(text, variant="heldout"), length=a.length, max_tokens=a.judge_tokens
        )
        return [ids.unsqueeze(0) for ids in found.ids]


def say(**line: Any) -> None:
    """One line of JSON, without what is None."""
    shown = {k: round(v, 5) if isinstance(v, float) else v for k, v in line.items() if v is not None}
    print(json.dumps(shown), flush=True)


def next_tokens(model: Any, windows: list[Tensor]) -> tuple[float, float]:
    """Mean loss in nats, and the share of tokens that are the model's first choice."""
    loss, right, count = 0.0, 0, 0
    with torch.no_grad():
        for ids in windows:
            logits = model(input_ids=ids, use_cache=False).logits[0, -ids.shape[1] :][:-1].float()
            targets = ids[0, 1:]
            loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            right += int((logits.argmax(-1) == targets).sum())
            count += len(targets)
    return loss / count, right / count


def parameters(folder: str | Path) -> int:
    """Stored parameters, a tied head once."""
    checkpoint = Checkpoint.open(Path(folder))
    return sum(math.prod(entry.shape) for entry in checkpoint.entries.values() if not entry.is_buffer)


def times_slower(models: Mapping[str, Callable[[Tensor], Any]], vocabulary: int) -> dict[str, float]:
    """Seconds to read one window over those of the first model: median of ratios, taken in turn."""
    ids = torch.randint(3, vocabulary, (1, READ), generator=torch.Generator().manual_seed(0))
    ratios: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for _ in range(ROUNDS):
            first = 0.0
            for name, model in models.items():
                started = time.perf_counter()
                model(ids)
                seconds = time.perf_counter() - started
                first = first or seconds
                ratios[name].append(seconds / first)
    return {name: round(statistics.median(values), 3) for name, values in ratios.items()}
