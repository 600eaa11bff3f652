"""Tokenizers: what counts as one, and what is said of one that cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fettle.data.tokenizer import has_tokenizer, load_tokenizer
from fettle.errors import ModelError


def test_a_pipe_is_no_tokenizer_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    assert not has_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path) is None


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer in .* cannot be loaded"):
        load_tokenizer(tmp_path)
