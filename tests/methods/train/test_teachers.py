"""Teachers whose tokens mean something else are refused; the same tokens have the same hash."""

from __future__ import annotations

from pathlib import Path

import pytest

from fettle.data.tokenizer import load_tokenizer
from fettle.errors import UsageError
from fettle.methods.train import teachers
from fettle.models.source import resolve


def test_a_teacher_with_another_tokenizer_is_refused_with_the_reason(tiny_llama: Path) -> None:
    ours, demo = load_tokenizer(tiny_llama), load_tokenizer(resolve("demo"))
    with pytest.raises(UsageError, match=r"different tokenizers.*token by token.*hard: 1"):
        teachers.require_same_tokens(ours, demo, ("student", "demo"))
    teachers.require_same_tokens(ours, load_tokenizer(tiny_llama), ("student", "teacher"))
    assert teachers.tokens_hash(ours) == teachers.tokens_hash(load_tokenizer(tiny_llama))
    assert teachers.tokens_hash(ours) != teachers.tokens_hash(demo)
