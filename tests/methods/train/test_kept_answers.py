"""Kept answers equal the teacher's, are as large as said, go on where they stopped, are found by who asks the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fettle.errors import UsageError
from fettle.methods.train import kept_answers
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


IDENTITY = {"teacher": "table", "temperature": 2.0}


def keep(teacher: Table, root: Path, identity: dict[str, Any] = IDENTITY, k: int = 4, progress: Any = None) -> Any:
    return kept_answers.keep_answers(
        teacher, windows(), k=k, temperature=2.0, vocabulary=VOCAB, root=root, identity=identity,
        progress=progress or Silent(),
    )  # fmt: skip


def test_kept_answers_are_the_teachers(tmp_path: Path) -> None:
    teacher = Table()
    keep(teacher, tmp_path)
    found = kept_answers.open_answers(tmp_path, IDENTITY)
    assert found is not None
    asked = torch.tensor([39, 0, 33])
    indices, kept, rest = found.rows(asked)
    logs = torch.log_softmax(teacher.table[windows()[asked, :-1]] / 2.0, -1)
    assert torch.equal(kept, logs.gather(-1, indices.long()))
    assert torch.allclose(rest.exp(), 1 - kept.exp().sum(-1), atol=1e-6)
    assert torch.equal(indices[..., 0], logs.argmax(-1).int())
    assert found.vocabulary == VOCAB


def test_no_more_is_kept_than_there_is(tmp_path: Path) -> None:
    found = keep(Table(), tmp_path, k=99)
    assert found.k == VOCAB
    assert found.rows(torch.tensor([0]))[0].shape == (1, 5, VOCAB)


class Said(Silent):
    """Notes what was announced."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def task(self, description: str, total: int) -> Any:
        self.words.append(description)
        return super().task(description, total)


def test_the_bytes_are_those_that_were_said(tmp_path: Path) -> None:
    said = Said()
    found = keep(Table(), tmp_path, progress=said)
    assert found.bytes == kept_answers.answer_bytes(40, 6, 4) == 40 * 5 * 36
    files = sum(p.stat().st_size for p in found.folder.glob("*.safetensors"))
    assert 0 <= files - found.bytes < 1000  # headers
    assert said.words == ["teacher's 4 largest logits, 0.0 MB"]
    assert json.loads((found.folder / "teacher.json").read_text())["bytes"] == found.bytes


def test_a_killed_run_asks_for_what_is_missing_alone(tmp_path: Path) -> None:
    found = keep(Table(), tmp_path)
    chunks = sorted(found.folder.glob("answers-*.safetensors"))
    before = [chunk.read_bytes() for chunk in chunks]
    chunks[1].unlink()
    assert kept_answers.open_answers(tmp_path, IDENTITY) is None
    with pytest.raises(UsageError, match="lacks a part"):
        found.rows(torch.tensor([39]))
    again = Table()
    keep(again, tmp_path)
    assert again.asked == 40 - kept_answers.CHUNK_WINDOWS
    assert [chunk.read_bytes() for chunk in chunks] == before


def test_a_torn_chunk_or_note_is_made_again(tmp_path: Path) -> None:
    folder = keep(Table(), tmp_path).folder
    for torn in (sorted(folder.glob("answers-*.safetensors"))[0], folder / "teacher.json"):
        whole = torn.read_bytes()
        torn.write_bytes(whole[: len(whole) // 2])
        assert kept_answers.open_answers(tmp_path, IDENTITY) is None
        keep(Table(), tmp_path)
        assert torn.read_bytes() == whole


def test_whoever_asks_something_else_gets_answers_of_its_own(tmp_path: Path) -> None:
    first = keep(Table(), tmp_path)
    assert kept_answers.open_answers(tmp_path, {**IDENTITY, "temperature": 1.0}) is None
    other = keep(Table(seed=1), tmp_path, identity={**IDENTITY, "teacher": "other"})
    assert other.folder != first.folder
    assert kept_answers.open_answers(tmp_path, dict(reversed(IDENTITY.items()))) == first
