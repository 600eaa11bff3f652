"""Image classifiers on the command line: compress, plan, inspect, evaluate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fettle.cli.main import main


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(list(arguments)) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_the_verbs_of_a_classifier(
    classifier: Callable[[str], Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = str(classifier("resnet")), str(tmp_path / "out")
    flags = ["--method", "prune_filters", "--sparsity", "0.5", "--images", str(pictures)]
    planned = json.loads(said(capsys, "plan", base, *flags, "--json"))
    made: dict[str, Any] = json.loads(said(capsys, "compress", base, "-o", out, *flags, "--json"))
    assert made["report"] is None and made["summary"]["output"] == planned["output"]
    assert "was finished already" in said(capsys, "compress", base, "-o", out, *flags)
    assert "multiply-adds" in said(capsys, "plan", base, *flags)
    assert "Conv2d" in said(capsys, "inspect", out)
    assert json.loads(said(capsys, "inspect", out, "--json"))["filters"] == planned["output"]["filters"]
    table = said(capsys, "evaluate", out, "--reference", base, "--images", str(pictures))
    assert "top-1 agreement" in table and "latency" in table
    gate = ["evaluate", out, "--reference", base, "--images", str(pictures), "--max-kl", "0.000001"]
    assert "prune less" in said(capsys, *gate, code=5)
    assert "no page" in said(capsys, "evaluate", out, "--report", str(tmp_path / "r.html"), code=2)
    assert "for language models" in said(capsys, "compress", base, "-o", out, "--bits-per-weight", "4", code=2)
