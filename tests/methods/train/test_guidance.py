"""Kept answers take the teacher's place: nobody loads it again, and nobody keeps it in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fettle
from fettle.errors import InterruptedRunError, RecipeError
from fettle.methods.train import Distill, guidance, training
from fettle.methods.train.job import TrainJob
from fettle.pipeline.chain import parse_chain

SMALL: dict[str, Any] = {
    "steps": 2, "windows": 8, "length": 32, "batch_windows": 4, "look_every": 2, "checkpoint_every": 1000,
    "held_back": 2,
}  # fmt: skip


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The teachers that were loaded, one after the other."""
    found: list[str] = []
    load = guidance.load_teacher

    def counted(name: str, **how: Any) -> Any:
        found.append(Path(name).name)
        return load(name, **how)

    monkeypatch.setattr(guidance, "load_teacher", counted)
    return found


def test_stages_of_a_chain_that_ask_the_same_load_the_teacher_once(
    tiny_llama: Path, text_file: Path, tmp_path: Path, loads: list[str]
) -> None:
    stage = {"train": "distill", **SMALL, "text": str(text_file), "teacher_top_k": 4}
    stages = [stage, {**stage, "learning_rate": 1e-4, "hard": 0.5}, {**stage, "seed": 1}]
    made = fettle.train(tiny_llama, tmp_path / "out", parse_chain({"stages": stages}, "test"), evaluate=False)
    assert loads == ["tiny-llama"] * 2  # the third stage draws other windows
    assert len(list((tmp_path / "out.run" / "stages" / "answers").iterdir())) == 2
    size = 10 * 31 * (8 * 4 + 4)
    assert [line["curve"]["answer_bytes"] for line in made.summary["stages"]] == [size] * 3
    curve = tmp_path / "out.run" / "stages" / "02-distill.run" / "curve.json"
    assert json.loads(curve.read_text())["answer_bytes"] == size
    assert "the teacher&#39;s answers take 11.2 kB on disk" in made.report_path.read_text()


def test_a_resumed_training_reads_the_answers_without_a_teacher(
    tiny_llama: Path, text_file: Path, tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    objectives: list[Any] = []

    def stop(objective: Any, *rest: Any) -> Any:
        objectives.append(objective)
        raise InterruptedRunError("stopped here")

    monkeypatch.setattr(training, "run", stop)
    job = TrainJob(model=tiny_llama, original=tiny_llama, output=tmp_path / "out", folder=tmp_path / "run")
    for _ in range(2):
        with pytest.raises(InterruptedRunError):
            training.train(Distill(**SMALL, text=str(text_file), teacher_top_k=4), job)
    assert loads == ["tiny-llama"]
    assert [objective._teacher for objective in objectives] == [(None,), (None,)]


def test_answers_of_another_vocabulary_are_refused(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = TrainJob(model=tiny_llama, original=tiny_llama, output=tmp_path / "out", folder=tmp_path / "run")
    training.train(Distill(**SMALL, text=str(text_file), teacher_top_k=4), job)
    (told,) = (tmp_path / "run" / "answers").glob("*/teacher.json")
    told.write_text(json.dumps({**json.loads(told.read_text()), "vocabulary": 319}), encoding="utf-8")
    with pytest.raises(RecipeError, match="student knows 320 tokens and the teacher 319"):
        training.train(Distill(**SMALL, text=str(text_file), teacher_top_k=4), job)
