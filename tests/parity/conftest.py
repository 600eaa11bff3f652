"""A tiny random model of every family, written once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .tiny_models import write_model

Written = Callable[[str], tuple[Path, torch.nn.Module]]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Name → (folder, the transformers model that was saved into it); each is made once."""
    made: dict[str, tuple[Path, torch.nn.Module]] = {}

    def write(name: str) -> tuple[Path, torch.nn.Module]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = (folder, write_model(name, folder))
        return made[name]

    return write
