"""Teachers whose tokens mean something else are refused; the same tokens have the same hash."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import normalizers

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


def test_the_same_words_cut_otherwise_are_other_tokens(tiny_llama: Path) -> None:
    ours, other = load_tokenizer(tiny_llama), load_tokenizer(tiny_llama)
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert ours.get_vocab() == other.get_vocab()
    assert not teachers.share_tokens(ours, other)
    with pytest.raises(UsageError, match="has no tokenizer"):
        teachers.require_same_tokens(ours, None, ("student", "teacher"))
