"""Numbers for people and JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fettle.cli.output import duration, emit_json, figure, number, size


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (16_240_000, "16.2 MB"), (2.5e9, "2.50 GB")]
)
def test_size(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (125, "2 min 5 s"), (11_520, "3 h 12 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0123456, "0.01235"),
        (4.59712, "4.597"),
        (0.0, "0"),
        (123456.7, "123457"),
        (7, "7"),
        (0.25, "0.25"),
    ],
)
def test_number(value: object, text: str) -> None:
    assert number(value) == text


def test_json_has_its_schema_first_and_no_infinities(capsys: pytest.CaptureFixture[str]) -> None:
    emit_json("plan", {"folder": Path("a/b"), "worst": [float("inf"), 1.5, float("nan")], "text": "é\n"})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {
        "schema": 1,
        "command": "plan",
        "folder": "a/b",
        "worst": [None, 1.5, None],
        "text": "é\n",
    }
    assert list(json.loads(printed))[:2] == ["schema", "command"]
    assert "é" in printed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12345.6, "12,346"),
        (1234567.8, "1,234,568"),
        (999.94, "999.9"),
        (0.01234567, "0.01235"),
        (0.0000123, "0.0000123"),
    ],
)
def test_a_figure_has_no_exponent(value: float, text: str) -> None:
    assert figure(value) == text
