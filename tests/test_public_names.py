"""What `import fettle` offers, and that the names stay what they are whatever was imported before."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fettle

from .apart import run_apart


@pytest.mark.parametrize(
    "name", ["compress", "diagnose", "evaluate", "generate", "inspect", "load", "open_engine", "plan", "train"]
)
def test_every_call_is_a_documented_function(name: str) -> None:
    call = getattr(fettle, name)
    assert callable(call)
    assert call.__doc__


def test_importing_fettle_imports_nothing_heavy() -> None:
    code = (
        "import sys, fettle; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


NATIVE = "fettle._native"  # compiled: it is loaded once a process


def evaluate_is_the_call_after(first: str) -> None:
    """In a process that has not looked at the package's names yet: whatever comes `first` binds the room's name."""
    for name in [name for name in sys.modules if name.split(".")[0] == "fettle" and name != NATIVE]:
        del sys.modules[name]
    module = importlib.import_module("fettle")
    exec(first, {"fettle": module})
    assert callable(module.evaluate)
    bound: dict[str, Any] = {}
    exec("from fettle import evaluate", bound)
    assert callable(bound["evaluate"])


@pytest.mark.parametrize("first", ["import fettle.evaluate.result", "import fettle.api", "fettle.compress", "pass"])
def test_evaluate_is_the_call_although_a_room_has_its_name(first: str, tmp_path: Path) -> None:
    ended = run_apart(evaluate_is_the_call_after, first, folder=tmp_path)
    assert ended.code == 0, ended.said


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = fettle.compres  # type: ignore[attr-defined]
