"""What the pipeline's tests share: the anatomy of the tiny model, and a run that a subprocess can be killed in."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fettle.models.anatomy import Anatomy, read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.pipeline.recipe import Recipe, parse_recipe


@pytest.fixture(scope="session")
def tiny_anatomy(tiny_llama: Path) -> Anatomy:
    return read_anatomy(Checkpoint.open(tiny_llama))


@pytest.fixture()
def small_recipe(text_file: Path) -> Recipe:
    return make_recipe(text_file)


def make_recipe(text: Path, **changes: object) -> Recipe:
    """A GPTQ recipe of seconds."""
    step = {"method": "gptq", "bits": 4, "group_size": 32, "asymmetric": True} | dict(changes)
    calibration = {"windows": 6, "length": 32, "seed": 0, "text": str(text)}
    return parse_recipe({"name": "small", "steps": [step], "calibration": calibration}, "test")


def digests(folder: Path) -> dict[str, str]:
    """Relative name → SHA-256 of every file."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
