"""The README and the docs are run: every shell and Python block, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fettle.pipeline.chain import parse_chain
from fettle.pipeline.recipe import parse_recipe

ROOT = Path(__file__).resolve().parent.parent.parent
SIGNATURES_ONLY = "architecture.md"  # its Python blocks are signatures without bodies
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name != SIGNATURES_ONLY)]
RUNNERS = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks in these languages, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [(language, text) for language, text in found if language in languages]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, *RUNNERS)], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    for language, text in blocks(page, *RUNNERS):
        done = subprocess.run(
            [*RUNNERS[language], text], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{page.name}:\n{text}\n{done.stdout}\n{done.stderr}"


def test_the_readme_has_something_to_run() -> None:
    languages = [language for language, _ in blocks(ROOT / "README.md", *RUNNERS)]
    assert {"sh", "python"} <= set(languages)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_in_a_page_parses(page: Path) -> None:
    for _, text in blocks(page, "yaml"):
        told = yaml.safe_load(text)
        parse = parse_chain if "stages" in told else parse_recipe
        found = parse(told, page.name)
        assert parse(found.to_dict(), page.name) == found
