"""Pages that a script writes are what the script writes today; links and names in prose exist."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fettle.cli.main import EXIT_CODES, VERBS

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def generator() -> Any:
    """tools/generate_docs.py as a module."""
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "tools" / "generate_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_follows_from_the_methods_is_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = generator()
    monkeypatch.setattr(sys, "argv", ["generate_docs.py", "--check"])
    assert tool.main() == 0, capsys.readouterr().out
    monkeypatch.setattr(tool, "PAGE", tmp_path / "methods.md")
    assert tool.main() == 1
    assert "methods.md is old; run: make docs" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:docs|src|tests|tools|benchmarks)/[\w/.-]+\.\w+)`", text))
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert not missing


def test_the_readme_tells_every_exit_code_as_the_help_does() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for code, meaning in re.findall(r"^  (\d+)\s+(.+)$", EXIT_CODES, flags=re.MULTILINE):
        assert f"| {code} | {meaning} |" in readme.replace("`", "")


def test_json_keys_of_every_verb_are_documented() -> None:
    page = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    headings = " ".join(re.findall(r"^## (.+)$", page, flags=re.MULTILINE))
    assert all(verb in headings for verb in VERBS)


def test_the_source_map_names_every_room() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rooms = [p.name for p in (ROOT / "src" / "fettle").iterdir() if p.is_dir() and not p.name.startswith("__")]
    assert rooms
    assert all(f"  {room}/" in readme for room in rooms)
