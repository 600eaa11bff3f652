"""`fettle train`: what it prints, its JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fettle.cli.main import main

SMALL = [
    "--steps", "2", "--windows", "8", "--length", "32", "--batch-windows", "4", "--held-back", "2", "--no-evaluate",
]  # fmt: skip


def test_one_method_prints_its_stage_and_its_json(
    tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = [
        "train",
        str(tiny_llama),
        "-o",
        str(tmp_path / "out"),
        "--method",
        "distill",
        "--text",
        str(text_file),
        *SMALL,
    ]
    assert main(how) == 0
    shown = capsys.readouterr().out
    assert "01-distill:" in shown
    assert "2 steps, loss" in shown
    assert main([*how, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["command"], found["folder"]) == ("train", str(tmp_path / "out"))
    assert len(found["summary"]["stages"][0]["curve"]["losses"]) == 2


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "give one of --recipe NAME|FILE and --method NAME"),
        (["--method", "distil"], "did you mean 'distill'"),
        (["--method", "distill", "--rank", "3"], "unknown flag of the method distill 'rank'"),
        (["--recipe", "qat-2bit", "--steps", "3"], "--steps belongs to a method"),
        (["--recipe", "gptq-4bit"], "unknown chain 'gptq-4bit'"),
    ],
)
def test_flags_that_cannot_be_are_refused(
    flags: list[str], told: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tiny_llama), "-o", str(tmp_path / "out"), *flags]) == 2
    assert told in capsys.readouterr().err


def test_a_training_that_is_refused_leaves_nothing(
    tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["train", str(tiny_llama), "-o", str(tmp_path / "out"), "--method", "distill", "--text", str(text_file)]
    assert main([*how, *SMALL, "--teacher", "demo"]) == 2  # of another tokenizer
    assert "tokenizer" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main([*how, *SMALL]) == 0
    before = sorted(path.name for path in (tmp_path / "out.run" / "stages").iterdir())
    assert main([*how, *SMALL, "--teacher", "demo"]) == 2  # what was there before stays
    assert sorted(path.name for path in (tmp_path / "out.run" / "stages").iterdir()) == before


def test_the_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "qat"]) == 0
    assert "Quantization-aware training" in capsys.readouterr().out
    assert main(["methods", "--json"]) == 0
    assert {m["name"] for m in json.loads(capsys.readouterr().out)["training"]} == {
        "distill",
        "qat",
        "sparse",
        "adapter",
    }


def test_a_searched_student_is_told_with_its_scores(
    tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["train", str(tiny_llama), "-o", str(tmp_path / "out"), "--method", "distill", "--text", str(text_file)]
    assert main([*how, "--layers", "1", "--student-map", "influence", *SMALL]) == 0
    told = json.loads((tmp_path / "out" / "fettle.json").read_text())["student"]
    assert len(told["scores"]) == told["blocks"] == 2
    assert told["kept"] == [max(range(2), key=lambda block: told["scores"][block])]
    shown = capsys.readouterr().out
    assert f"blocks {told['kept'][0]} of 2, influence {told['scores'][0]:.4f} {told['scores'][1]:.4f}" in shown
