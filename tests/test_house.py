"""The budgets of the house: sizes, names, and what the top level may hold."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "fettle"
FILES = sorted(SOURCE.rglob("*.py"))
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "base", "core", "shared", "stuff", "tools"}
FILE_LINES, FUNCTION_LINES = 400, 60


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


def test_every_file_is_within_its_budget() -> None:
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text("utf-8").splitlines())) > FILE_LINES}
    assert not long, f"files of more than {FILE_LINES} lines: {long}"


def test_every_function_is_within_its_budget() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{f.lineno} {f.name}": body_lines(f)
        for path in FILES
        for f in functions(path)
        if body_lines(f) > FUNCTION_LINES
    }
    assert not long, f"functions of more than {FUNCTION_LINES} lines without their docstring: {long}"


def test_no_module_has_a_vague_name() -> None:
    named = [str(p.relative_to(ROOT)) for p in SOURCE.rglob("*") if p.stem.lower() in VAGUE]
    assert not named


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in FILES
        if len((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split()) < 3
    ]
    assert not silent, f"modules without a docstring that says anything: {silent}"


def test_no_stub_stands_behind_a_documented_name() -> None:
    found = [
        str(path.relative_to(ROOT))
        for path in FILES
        if re.search(r"NotImplementedError|\bTODO\b|\bFIXME\b|\bXXX\b", path.read_text(encoding="utf-8"))
    ]
    assert not found


@pytest.mark.parametrize(
    "pattern", [r"\bpickle\.load", r"torch\.load\((?![^)]*weights_only=True)", r"trust_remote_code=True"]
)
def test_nothing_runs_code_out_of_a_model(pattern: str) -> None:
    found = [str(p.relative_to(ROOT)) for p in FILES if re.search(pattern, p.read_text(encoding="utf-8"))]
    assert not found
