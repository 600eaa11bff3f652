"""What the search's tests share: the anatomy of the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from fettle.models.anatomy import Anatomy, read_anatomy
from fettle.models.checkpoint import Checkpoint


@pytest.fixture(scope="session")
def tiny_anatomy(tiny_llama: Path) -> Anatomy:
    return read_anatomy(Checkpoint.open(tiny_llama))
