"""Small trainings of a tiny random Llama."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fettle.methods.train.curve import Curve
from fettle.methods.train.job import TrainJob, TrainMethod
from fettle.methods.train.training import train

SMALL: dict[str, Any] = {
    "steps": 4, "windows": 8, "length": 32, "batch_windows": 4, "look_every": 2, "checkpoint_every": 1000,
    "held_back": 2, "warmup": 0.0,
}  # fmt: skip


@pytest.fixture
def trained(tmp_path: Path, text_file: Path) -> Callable[..., tuple[Path, Curve]]:
    """Trains a model and gives the written folder and the curve."""

    def run(method: type[TrainMethod], model: Path, original: Path | None = None, **fields: Any) -> tuple[Path, Curve]:
        made: Any = method(**{**SMALL, "text": str(text_file), **fields})
        made.validate()
        count = len(list(tmp_path.glob("trained-*.run")))
        output = tmp_path / f"trained-{count}"
        folder = tmp_path / f"trained-{count}.run"
        return output, train(made, TrainJob(model=model, original=original or model, output=output, folder=folder))

    return run
