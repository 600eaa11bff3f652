"""One folder of each kind of network, written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.vision.networks import images_file, write


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("classifiers")

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else write(name, root / name)

    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 labelled images as tensors."""
    return images_file(tmp_path_factory.mktemp("images") / "images.safetensors")
