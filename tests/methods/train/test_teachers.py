"""Kept answers equal the teacher's, are exactly as large as said, and go on where they stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fettle.data.tokenizer import load_tokenizer
from fettle.errors import UsageError
from fettle.methods.train import teachers
from fettle.methods.train.outputs import Outputs
from fettle.progress import Silent

VOCAB = 11


class Table:
    """A teacher that is a table of logits; counts the windows that it was asked for."""

    def __init__(self, seed: int = 0) -> None:
        self.table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))
        self.asked = 0

    def __call__(self, input_ids: Tensor, window: Tensor | None = None) -> Outputs:
        self.asked += len(input_ids)
        return Outputs(logits=self.table[input_ids])


def windows(count: int = 40) -> Tensor:
    return torch.randint(0, VOCAB, (count, 6), generator=torch.Generator().manual_seed(1))


def keep(teacher: Table, folder: Path, **other: Any) -> None:
    how = {"k": 4, "temperature": 2.0, "identity": {"teacher": "table"}, **other}
    teachers.keep_answers(teacher, windows(), folder=folder, progress=Silent(), **how)


def test_kept_answers_are_the_teachers(tmp_path: Path) -> None:
    teacher = Table()
    keep(teacher, tmp_path)
    found = teachers.read_answers(tmp_path, 40)
    for window in (0, 33, 39):
        logs = torch.log_softmax(teacher.table[windows()[window, :-1]] / 2.0, -1)
        assert torch.equal(found.kept[window], logs.gather(-1, found.indices[window].long()))
        missing = 1 - found.kept[window].exp().sum(-1)
        assert torch.allclose(found.rest[window].exp(), missing, atol=1e-6)
        assert torch.equal(found.indices[window, :, 0], logs.argmax(-1).int())


def test_the_bytes_are_those_that_were_said(tmp_path: Path) -> None:
    keep(Table(), tmp_path)
    found = teachers.read_answers(tmp_path, 40)
    held = sum(t.numel() * t.element_size() for t in (found.indices, found.kept, found.rest))
    assert held == teachers.answer_bytes(40, 6, 4)
    files = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert 0 <= files - held < 1000  # headers


def test_a_killed_run_asks_for_what_is_missing_alone(tmp_path: Path) -> None:
    keep(Table(), tmp_path)
    chunks = sorted(tmp_path.glob("answers-*.safetensors"))
    before = [chunk.read_bytes() for chunk in chunks]
    chunks[1].unlink()
    with pytest.raises(UsageError, match="lacks a part"):
        teachers.read_answers(tmp_path, 40)
    again = Table()
    keep(again, tmp_path)
    assert again.asked == 40 - teachers.CHUNK_WINDOWS
    assert [chunk.read_bytes() for chunk in chunks] == before


def test_a_torn_chunk_is_made_again(tmp_path: Path) -> None:
    keep(Table(), tmp_path)
    chunk = sorted(tmp_path.glob("answers-*.safetensors"))[0]
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: len(whole) // 2])
    keep(Table(), tmp_path)
    assert chunk.read_bytes() == whole


def test_another_teacher_or_temperature_is_refused(tmp_path: Path) -> None:
    keep(Table(), tmp_path)
    with pytest.raises(UsageError, match="another teacher, text or temperature"):
        keep(Table(), tmp_path, identity={"teacher": "other"})
    with pytest.raises(UsageError, match="another teacher, text or temperature"):
        keep(Table(), tmp_path, temperature=1.0)


def test_a_teacher_with_another_tokenizer_is_refused_with_the_reason(tiny_llama: Path) -> None:
    ours, demo = load_tokenizer(tiny_llama), load_tokenizer(_demo())
    with pytest.raises(UsageError, match=r"different tokenizers.*token by token.*hard: 1"):
        teachers.require_same_tokens(ours, demo, ("student", "demo"))
    teachers.require_same_tokens(ours, load_tokenizer(tiny_llama), ("student", "teacher"))


def _demo() -> Path:
    from fettle.models.source import resolve

    return resolve("demo")
