"""The reshaping steps of a recipe, before the walk: base → view → view → …, each on text through the one before it.

Nothing is written here. What a step decides is a function of the base, the recipe and the text, so a resumed run
decides the same again, by making the same passes again; what comes behind reads the last view as if it were a folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fettle.data.tokenizer import load_tokenizer
from fettle.data.windows import Windows
from fettle.engine.step_seconds import step_seconds
from fettle.errors import RecipeError
from fettle.methods.reshape.subject import ModelMethod, Subject
from fettle.models.anatomy import Anatomy, read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.reshaped_config import require_known
from fettle.models.view import parameter_count
from fettle.models.writer import write_text
from fettle.workers import Workers

CutWindows = Callable[[Any], Windows]  # a tokenizer → the calibration windows


@dataclass(frozen=True, kw_only=True)
class Reshaping:
    """What the reshaping steps made of the base.

    Attributes:
        checkpoint: the last view; the base itself where there is no step.
        anatomy: of it.
        decided: what each step removed, with its scores and the number of parameters: plain data.
    """

    checkpoint: Checkpoint
    anatomy: Anatomy
    decided: tuple[dict[str, Any], ...] = ()


def reshape(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    methods: tuple[ModelMethod, ...],
    cut: CutWindows,
    text: Callable[[], str],
    *,
    device: str,
    workers: Workers,
) -> Reshaping:
    """Applies the steps in order.

    Args:
        cut: cuts the calibration text with the tokenizer of the model as it then is; called where a step looks at text.
        text: the whole calibration text.

    Raises:
        RecipeError: a shape that this model cannot have.
    """
    decided = []
    for method in methods:
        require_unshared(checkpoint)
        windows = cut(_require_tokenizer(checkpoint)).ids if method.needs() else ()
        subject = Subject(
            checkpoint=checkpoint, anatomy=anatomy, windows=windows, workers=workers, device=device,
            used_tokens=partial(_used_tokens, checkpoint, text), measure=partial(step_seconds, threads=workers.threads),
        )  # fmt: skip
        with workers, torch.no_grad():
            found = method.reshape(subject)
        before, checkpoint = parameter_count(checkpoint), found.view
        require_known(checkpoint.config)
        anatomy = read_anatomy(checkpoint)  # compares every shape with the new configuration
        decided.append({**found.decided, "parameters_before": before, "parameters": parameter_count(checkpoint)})
    return Reshaping(checkpoint=checkpoint, anatomy=anatomy, decided=tuple(decided))


def require_unshared(checkpoint: Checkpoint) -> None:
    """Raises RecipeError for a step behind one that stores matrices of several blocks once."""
    if checkpoint.shared:
        raise RecipeError(
            "share_blocks stores the matrices of several blocks once, and a step behind it would give each block its "
            "own again; let it come last, or store a copy for every block with written_out: true"
        )


def _used_tokens(checkpoint: Checkpoint, text: Callable[[], str]) -> list[int]:
    ids = _require_tokenizer(checkpoint)(text(), add_special_tokens=False, verbose=False)["input_ids"]
    return sorted(set(ids))


def tokenizer_of(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a folder or of a view of it; None where there is none."""
    replaced = checkpoint.side_files
    if not replaced:
        return load_tokenizer(checkpoint.folder)
    with tempfile.TemporaryDirectory(prefix="fettle-tokenizer-") as temporary:
        for path in checkpoint.folder.iterdir():
            if path.suffix == ".json" and path.name not in replaced:
                write_text(Path(temporary) / path.name, path.read_text(encoding="utf-8"))
        for name, text in replaced.items():
            write_text(Path(temporary) / name, text)
        return load_tokenizer(temporary)


def _require_tokenizer(checkpoint: Checkpoint) -> Any:
    found = tokenizer_of(checkpoint)
    if found is None:
        raise RecipeError(f"a step looks at text, but {checkpoint.folder.name} has no tokenizer files; add them to it")
    return found


def replace_side_files(checkpoint: Checkpoint, output: Path) -> None:
    """Writes what a view says instead of the base's files beside the weights."""
    for name, text in checkpoint.side_files.items():
        write_text(output / name, text)
