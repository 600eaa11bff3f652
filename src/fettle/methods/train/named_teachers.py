"""Teachers as a recipe names them: a model, or a model with an adapter beside it, as base+adapter.

An adapter that learned a task is then the teacher of a student of its own: adapter distillation. The name of a folder
that is there is taken as it stands, whatever signs are in it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fettle.errors import UsageError
from fettle.methods.train.adapters import load_adapters
from fettle.models.checkpoint import Checkpoint, file_sha256
from fettle.models.loading import LoadedModel, load
from fettle.models.source import resolve


def parts(name: str) -> tuple[str, str | None]:
    """Model and adapter; the latter None where there is none."""
    if Path(name).is_dir() or "+" not in name:
        return name, None
    base, _, adapter = name.rpartition("+")
    return base, adapter


def load_teacher(name: str, *, device: str, generic: bool, causal: bool = True) -> LoadedModel:
    """The teacher in memory.

    Raises:
        ModelError: no such model, or a folder that is no adapter of it.
        UsageError: an encoder where a decoder is needed (`causal`), or the other way round.
    """
    base, adapter = parts(name)
    loaded = load(resolve(base), device=device, generic=generic)
    if loaded.anatomy.causal != causal:
        theirs, ours = ("an encoder", "a decoder") if causal else ("a decoder", "an encoder")
        raise UsageError(f"the teacher {name} is {theirs} and the student {ours}; name a teacher that is one, too")
    if adapter is None:
        return loaded
    return dataclasses.replace(loaded, model=load_adapters(loaded, {"teacher": adapter}).to(device))


def teacher_hashes(name: str) -> dict[str, str]:
    """SHA-256 of its files, which says whether it is the same one as before."""
    base, adapter = parts(name)
    found = Checkpoint.open(resolve(base)).file_hashes()
    if adapter is None:
        return found
    files = sorted(path for path in Path(adapter).glob("adapter_*") if path.is_file())
    return found | {f"+{path.name}": file_sha256(path) for path in files}
