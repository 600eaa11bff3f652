"""Small trainings of a tiny random Llama."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fettle.methods.train.curve import Curve
from fettle.methods.train.job import TrainJob, TrainMethod
from fettle.methods.train.training import train

SMALL: dict[str, Any] = {
    "steps": 4, "windows": 8, "length": 32, "batch_windows": 4, "look_every": 2, "checkpoint_every": 1000,
    "held_back": 2, "warmup": 0.0,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A random BERT of 4 blocks, as sentence encoders come: no head, the tokenizer with a padding token."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_llama))
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


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
