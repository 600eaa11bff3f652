"""A small checkpoint of plain tensors, and the tiny models of the parity tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ..parity.tiny_models import write_model


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A folder with config.json and three tensors; no model that transformers could run."""
    folder = tmp_path / "plain"
    folder.mkdir()
    tensors = {
        "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
        "b.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "c.codes": torch.arange(5, dtype=torch.int8),
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama; not to be changed."""
    folder = tmp_path_factory.mktemp("llama")
    write_model("llama", folder)
    return folder


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in several shards with an index; not to be changed."""
    folder = tmp_path_factory.mktemp("sharded")
    write_model("llama", folder, shard_bytes=30_000)
    return folder


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2, whose query, key and value have biases; not to be changed."""
    folder = tmp_path_factory.mktemp("qwen2")
    write_model("qwen2", folder)
    return folder
