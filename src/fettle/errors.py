"""Every error that fettle raises on purpose, in one tree.

    FettleError
    ├── UsageError            2   what the user asked cannot be: unknown key, method, role; impossible value
    │   ├── RecipeError           … in a recipe or a method's field
    │   └── ResumeError           … a run is resumed with something that changed
    ├── ResourceError         3   the machine is too small: memory, disk
    │   └── DiskFullError
    ├── ModelError            4   the model cannot be used
    │   ├── CheckpointError       … its files are damaged, missing or unsafe
    │   ├── UnknownFamilyError    … its architecture has no anatomy
    │   └── NonFiniteError        … NaN or infinity in a weight, an activation or a scale
    ├── QualityGateError      5   measured, and worse than the user allowed
    └── InterruptedRunError 130   Ctrl-C or SIGTERM; the run can be resumed

The number is the exit code of the command line. A message says what is wrong, the value, the allowed set and the next
step; it never needs the traceback to be understood.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class FettleError(Exception):
    """Root of every error that fettle raises on purpose; `exit_code` is the command line's."""

    exit_code = 1


class UsageError(FettleError):
    """What the user asked cannot be."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe, or a field of a method, says something impossible."""


class ResumeError(UsageError):
    """A run was resumed with another model, recipe, seed or text."""


class ResourceError(FettleError):
    """The machine has too little memory or disk."""

    exit_code = 3


class DiskFullError(ResourceError):
    """A file could not be written for want of space."""


class ModelError(FettleError):
    """The model cannot be used."""

    exit_code = 4


class CheckpointError(ModelError):
    """The files of a model are damaged, missing or unsafe."""


class UnknownFamilyError(ModelError):
    """No anatomy is known for this architecture."""


class NonFiniteError(ModelError):
    """NaN or infinity in a weight, an activation or a scale."""


class QualityGateError(FettleError):
    """The measured loss of quality exceeds what the user allowed."""

    exit_code = 5


class InterruptedRunError(FettleError):
    """The user stopped the run; it can be resumed."""

    exit_code = 130


def unknown_word(kind: str, word: str, allowed: Iterable[str]) -> str:
    """A sentence for an unknown name: the nearest spelling, if one is near, and the allowed set.

    >>> unknown_word("method", "gtpq", ["gptq", "round_to_nearest"])
    "unknown method 'gtpq'; did you mean 'gptq'? Allowed: gptq, round_to_nearest"
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    return f"unknown {kind} '{word}'{hint} Allowed: {', '.join(names)}"


def require_readable(folder: Path, names: Iterable[str]) -> None:
    """Raises `ModelError` for the first of these files of a model that is there and may not be read: no damage."""
    for path in (folder / name for name in names):
        if path.exists() and not os.access(path, os.R_OK):
            raise ModelError(f"{path} cannot be read (Permission denied). Check the file and its permissions.")
