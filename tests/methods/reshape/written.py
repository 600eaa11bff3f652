"""Views written as ordinary folders, so that what is compared is what plain transformers makes of the files."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tests.parity.tiny_models import reference_output, write_model
from torch import Tensor, nn

from fettle.methods.reshape.subject import Subject
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.view import View
from fettle.models.writer import write_json, write_shard
from fettle.workers import Workers


def subject_of(folder: Path, windows: tuple[Tensor, ...] = ()) -> Subject:
    checkpoint = Checkpoint.open(folder)
    return Subject(checkpoint=checkpoint, anatomy=read_anatomy(checkpoint), windows=windows, workers=Workers(1))


def tiny_subject(name: str, folder: Path, windows: tuple[Tensor, ...] = ()) -> tuple[nn.Module, Subject]:
    """The tiny model `name`, as transformers holds it and as a subject."""
    model = write_model(name, folder)
    return model, subject_of(folder, windows)


def write_view(view: View, folder: Path) -> Path:
    """The folder that loaders see."""
    read_anatomy(view)  # every shape is what the configuration says
    write_shard(folder, "model.safetensors", {name: view.read(name) for name in view.entries}, {"format": "pt"})
    write_json(folder / "config.json", view.config)
    return folder


def output_of_files(folder: Path, ids: Tensor) -> Tensor:
    """What plain transformers answers from a written folder."""
    names = Checkpoint.open(folder).config["architectures"]
    model, info = getattr(transformers, names[0]).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"], info
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return reference_output(model.eval(), ids)
