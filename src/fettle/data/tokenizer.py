"""Loading a model's tokenizer, without running any code that comes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fettle.errors import ModelError, require_readable

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def has_tokenizer(folder: str | Path) -> bool:
    """Whether `folder` holds a tokenizer."""
    return any((Path(folder) / name).is_file() for name in _FILES)


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in `folder`, or None when it has none; raises `ModelError` for one that cannot be read.

    Code that comes with a tokenizer is never run.
    """
    if not has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the libraries underneath raise all kinds, down to a bare Exception for bad JSON
        require_readable(Path(folder), _FILES)
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {error}. Download the model again.") from error
