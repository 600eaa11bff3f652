"""Smaller students and what heals them: each signal's and each source's part, a narrowed model healed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training_bench import Bench, next_tokens, parameters, times_slower

import fettle
from fettle.methods.train import Distill

SIGNALS: dict[str, dict[str, Any]] = {
    "hard labels": {"hard": 1.0, "soft": 0.0},
    "soft labels": {},
    "soft labels, features": {"features": 0.1},
    "soft labels, features, attention": {"features": 0.1, "attention": 0.1},
    "soft labels, features, attention, relations": {"features": 0.1, "attention": 0.1, "relations": 1.0},
    "soft labels, value relations": {"values": 0.1},
    "soft labels, hard labels": {"hard": 0.5, "soft": 0.5},
    "hard labels, a quarter soft": {"hard": 1.0, "soft": 0.25},
    # what is read in place of a part of the text, or in which order; soft labels
    "a quarter written by the teacher": {"written": 0.25},
    "a quarter written by the student": {"on_policy": 0.25},
    "a quarter where both differ most": {"adversarial": 0.25},
    "easy windows first": {"curriculum": "teacher"},
}
SEVERAL = {"two teachers": "fixed", "two teachers, by loss": "loss", "two teachers, by agreement": "agreement"}


def student(bench: Bench) -> None:
    """Fewer blocks: untrained, then with every choice of signals in `--signals` for the same steps."""
    a = bench.arguments
    untrained = Distill(
        **bench.fields(steps=1, learning_rate=0.0, layers=a.layers, student_map=a.student_map, keep="last")
    )
    made, _ = bench.trained("fewer blocks", untrained, a.model)
    share = parameters(made) / parameters(fettle.load(a.model).folder)
    _told(bench, "untrained", made, parameters=share, times_faster=faster(bench, made))
    for name in a.signals.split("+"):
        fields = SIGNALS[name] if name in SIGNALS else _several(bench, SEVERAL[name])
        method = Distill(**bench.fields(learning_rate=a.student_rate, **fields))
        output, told = bench.trained(f"student {name}", method, made)
        _told(bench, name, output, **told)


def _several(bench: Bench, weighting: str) -> dict[str, Any]:
    """Two teachers: the original, and the original after as many steps on the text alone."""
    a = bench.arguments
    method = Distill(**bench.fields(hard=1.0, soft=0.0, learning_rate=a.student_rate / 4))
    second, told = bench.trained("second teacher", method, a.model)
    _told(bench, "second teacher", second, **told)
    return {"teacher": f"{a.model},{second}", "teacher_weighting": weighting}


def _told(bench: Bench, name: str, folder: Path, **more: Any) -> None:
    windows = bench.windows(bench.arguments.judge)
    teacher, ours = (next_tokens(fettle.load(x).model, windows)[1] for x in (bench.arguments.model, folder))
    bench.tell(name, folder, accuracy=ours, accuracy_kept=ours / teacher, **more)


def faster(bench: Bench, folder: Path) -> float:
    """The original's seconds to read a window of 256 tokens over the student's, dense, in turn."""
    models = {str(x): fettle.load(x).model for x in (folder, bench.arguments.model)}
    vocabulary = int(next(iter(models.values())).config.vocab_size)
    return times_slower(models, vocabulary)[str(bench.arguments.model)]


def narrowed(bench: Bench) -> None:
    """0.6 of the parameters by narrowing alone and by any change of shape, healed by the original."""
    a = bench.arguments
    for shape in a.shapes.split(","):
        made = bench.compressed(shape, {"method": shape, "parameters": "0.6x"})
        share = parameters(made) / parameters(fettle.load(a.model).folder)
        lost = kl(bench, made)
        _told(bench, f"{shape} to 0.6", made, parameters=share, times_faster=faster(bench, made))
        method = Distill(**bench.fields(learning_rate=a.student_rate))
        output, told = bench.trained(f"{shape} healed", method, made)
        won = 1 - kl(bench, output) / lost
        _told(bench, f"{shape} to 0.6, healed", output, won_back=won, **told)


def kl(bench: Bench, folder: Path) -> float:
    """KL to the original on the judging text."""
    a = bench.arguments
    found = fettle.evaluate(folder, reference=a.model, text=a.judge, length=a.length, max_tokens=a.judge_tokens)
    assert found.kl_mean is not None
    return found.kl_mean
