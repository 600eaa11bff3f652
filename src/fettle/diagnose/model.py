"""A diagnosis from a folder: opens and checks the model, cuts both texts, and says what it was made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fettle.data.tokenizer import load_tokenizer
from fettle.data.windows import calibration_windows, evaluation_windows, read_text
from fettle.diagnose.candidates import as_candidates, default_methods
from fettle.diagnose.diagnosis import diagnose
from fettle.diagnose.original import Original
from fettle.diagnose.words import in_words
from fettle.errors import UsageError
from fettle.methods.protocols import MatrixMethod
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.config_file import context_length
from fettle.models.storage import stored_schemes
from fettle.progress import Progress
from fettle.workers import Workers


@dataclass(frozen=True, kw_only=True)
class DiagnosisOptions:
    """What is diagnosed on which text; `fettle.diagnose` says what each means."""

    candidates: Sequence[MatrixMethod | str | Mapping[str, Any]] | None = None
    sample: int | None = None
    text: str | Path | None = None
    calibration: str | Path | None = None
    windows: int = 32
    length: int = 256
    max_tokens: int = 2048
    draws: int = 1
    seed: int = 0


def diagnose_folder(
    folder: Path,
    options: DiagnosisOptions,
    *,
    device: str = "cpu",
    threads: int | None = None,
    generic: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The diagnosis of the model in `folder` as plain data, with its paragraph of words.

    Raises:
        UsageError: a compressed model, one without tokenizer or head, or a number that cannot be.
    """
    for name, value, least in (("sample", options.sample, 1), ("draws", options.draws, 1), ("seed", options.seed, 0)):
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}; it must be at least {least}")
    checkpoint = Checkpoint.open(folder)
    anatomy = read_anatomy(checkpoint, generic=generic)
    if stored_schemes(checkpoint, anatomy):
        raise UsageError(f"{folder} is compressed already; diagnose the model that it was made from")
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise UsageError(f"{folder} has no tokenizer files, and a text can only be measured as tokens; add them to it")
    chosen = as_candidates(options.candidates or default_methods(), str(checkpoint.dtype).removeprefix("torch."))
    length = min(options.length, context_length(checkpoint.config) or options.length)
    held_out = read_text(options.text, variant="heldout")
    held = evaluation_windows(tokenizer, held_out, length=length, max_tokens=options.max_tokens)
    seen = calibration_windows(
        tokenizer, read_text(options.calibration), windows=options.windows, length=length, seed=options.seed
    )
    with Workers(threads) as workers, torch.no_grad():
        original = Original(
            checkpoint, anatomy, held, device=device, workers=workers, seed=options.seed, draws=options.draws
        )
        found = diagnose(original, seen, chosen, sample=options.sample, seed=options.seed, progress=progress)
        hashes = checkpoint.file_hashes()
    return {
        "words": in_words(found),
        **found.to_json(),
        "text": {"source": held.source, "sha256": held.sha256, "note": held.note, "window_tokens": length},
        "calibration": {"source": seen.source, "sha256": seen.sha256, "note": seen.note, "windows": len(seen.ids)},
        "seed": options.seed,
        "draws": options.draws,
        "hashes": hashes,
    }
