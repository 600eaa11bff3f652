"""Where a page may go is known before any work, and a page is whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fettle.errors import ResourceError, UsageError
from fettle.report import atomic
from fettle.report.atomic import require_writable, write_atomically


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("folder", "it is a folder"), ("", "it is a folder"), ("pipe", "it is no regular file"),
        ("/dev/full", "it is no regular file"), ("to-folder", "it is a folder"), ("to-pipe", "it is no regular file"),
        ("file/page.html", "Not a directory"), ("x" * 300, "File name too long"), ("/proc/nowhere/page.html", "/proc"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_told_by_the_users_own_name(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-folder").symlink_to("folder")
    (tmp_path / "to-pipe").symlink_to("pipe")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=why) as caught:
        require_writable(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_can_be_written_is_written_and_asking_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "old.html").write_text("old")
    for name in ("new.html", "deep/er/new.html", "old.html", "y" * 250):
        before = sorted(tmp_path.rglob("*"))
        require_writable(tmp_path / name)
        assert sorted(tmp_path.rglob("*")) == before
        write_atomically(tmp_path / name, "new \ud800")
        assert (tmp_path / name).read_text() == "new ?"


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "real.html").write_text("old")
    for name, target in (("link.html", "real.html"), ("dangling.html", "other.html")):
        (tmp_path / name).symlink_to(target)
        require_writable(tmp_path / name)
        write_atomically(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / target).read_text() == "new"


@pytest.mark.parametrize(("number", "kind"), [(28, ResourceError), (5, UsageError)])
def test_a_disk_that_fails_is_told_by_the_users_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.os, "fsync", failing)
    with pytest.raises(kind, match=r"page\.html"):
        write_atomically(tmp_path / "page.html", "x")
    assert not list(tmp_path.iterdir())
