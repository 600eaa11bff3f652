"""The README and the docs are run: every shell and Python block, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

import fettle
from fettle.cli.main import main
from fettle.pipeline.chain import parse_chain
from fettle.pipeline.recipe import parse_recipe

ROOT = Path(__file__).resolve().parent.parent.parent
SIGNATURES_ONLY = "architecture.md"  # its Python blocks are signatures without bodies
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name != SIGNATURES_ONLY)]
LANGUAGES = ("sh", "python")


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks in these languages, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [(language, text) for language, text in found if language in languages]


def commands(text: str) -> list[list[str]] | None:
    """The words of each line of a shell block that only calls fettle; None of one that needs a shell."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if line.strip()]
    return [words[1:] for words in found] if all(words[0] == "fettle" for words in found) else None


def in_a_shell(text: str) -> str:
    """What a shell prints that runs the text, and stops at the first failure."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    shell = ["bash", "-euo", "pipefail", "-c", text]
    return subprocess.run(shell, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, *LANGUAGES)], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: a new one would import everything again for each command."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    for language, text in blocks(page, *LANGUAGES):
        if language == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as `python -c` shows them and goes on
                exec(compile(text, page.name, "exec"), {"__name__": "__main__"})
            continue
        called = commands(text)
        if called is None:
            in_a_shell(text)
        for words in called or ():
            code = main(words)
            assert code == 0, f"{page.name}: fettle {shlex.join(words)}\n{capsys.readouterr().err}"
    torch.set_num_threads(threads)


def test_the_command_is_installed_under_its_name() -> None:
    assert in_a_shell("fettle --version") == f"fettle {fettle.__version__}\n"


def test_the_readme_has_something_to_run() -> None:
    languages = [language for language, _ in blocks(ROOT / "README.md", *LANGUAGES)]
    assert {"sh", "python"} <= set(languages)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_in_a_page_parses(page: Path) -> None:
    for _, text in blocks(page, "yaml"):
        told = yaml.safe_load(text)
        parse = parse_chain if "stages" in told else parse_recipe
        found = parse(told, page.name)
        assert parse(found.to_dict(), page.name) == found
