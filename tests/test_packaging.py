"""What is written twice must agree: versions, the changelog, the exact versions and the ranges."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

import fettle

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): Version(version) for name, version in pairs}


def test_the_version_is_the_same_everywhere() -> None:
    assert fettle.__version__ == PROJECT["version"]


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == PROJECT["version"]


def test_every_dependency_has_an_exact_version_inside_its_range() -> None:
    exact = constraints()
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, wanted):
        name = requirement.name.lower().replace("_", "-")
        assert name in exact, f"{name} is missing from constraints.txt"
        assert requirement.specifier.contains(exact[name]), f"{name} {exact[name]} is outside {requirement.specifier}"


def test_torch_is_pinned_to_the_version_with_a_cpu_build() -> None:
    assert constraints()["torch"] == Version("2.13.0")


def test_no_file_names_a_package_index() -> None:
    names = ["pyproject.toml", "constraints.txt", "Makefile", ".ci/run"]
    for name in names:
        assert not re.search(
            r"index-url|find-links|https?://\S*(pypi|simple)", (ROOT / name).read_text(encoding="utf-8")
        )
