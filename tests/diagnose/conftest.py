"""What the tests of the diagnosis share: the tiny model with a sample, and one diagnosis of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fettle
from fettle.data.tokenizer import load_tokenizer
from fettle.data.windows import evaluation_windows, read_text
from fettle.diagnose.original import Original
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.workers import Workers

FEW = {"windows": 6, "length": 32, "max_tokens": 300}
CANDIDATES = ["round_to_nearest bits=3 asymmetric=true", "gptq bits=2 asymmetric=true", "gptq bits=4 asymmetric=true"]


@pytest.fixture()
def original(tiny_llama: Path, text_file: Path) -> Iterator[Original]:
    checkpoint = Checkpoint.open(tiny_llama)
    sample = evaluation_windows(load_tokenizer(tiny_llama), read_text(text_file), length=24, max_tokens=120)
    with Workers(1) as workers, torch.no_grad():
        yield Original(checkpoint, read_anatomy(checkpoint), sample, device="cpu", workers=workers)


@pytest.fixture(scope="session")
def diagnosis(tiny_llama: Path, text_file: Path) -> dict[str, Any]:
    return fettle.diagnose(tiny_llama, candidates=CANDIDATES, text=text_file, calibration=text_file, **FEW)
