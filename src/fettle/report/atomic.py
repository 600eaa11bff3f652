"""Writes a text file whole or not at all: a page that is half there looks like a page."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from pathlib import Path

from fettle.errors import ResourceError, UsageError

MODE = 0o644


def write_atomically(path: Path, text: str) -> None:
    """Writes UTF-8 text to `path`, or to the file that it links to, through a temporary file beside it.

    Raises:
        UsageError, ResourceError: it cannot be written; names `path` as the user did.
    """
    try:
        _write(Path(os.path.realpath(path)), text)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"no room for the page {path}: {error.strerror}; make room and run it again") from error
        raise cannot_be(path, str(error.strerror)) from error


def _write(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".partial", dir=target.parent)
    try:
        with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, MODE)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def require_writable(path: Path) -> None:
    """Raises UsageError where `write_atomically` could not write `path`: to be asked before any work. Leaves nothing.

    A link counts as what it points to; folders that are missing will be made.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
        if not stat.S_ISREG(mode):
            raise cannot_be(path, "it is a folder" if stat.S_ISDIR(mode) else "it is no regular file")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise cannot_be(path, str(error.strerror)) from error
    parent = next(folder for folder in target.parents if os.path.lexists(folder))
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise cannot_be(path, f"{parent}: {error.strerror}") from error


def cannot_be(path: Path, why: str) -> UsageError:
    """The error for a page that cannot be written where the user wants it."""
    return UsageError(f"the page {path} cannot be written ({why}); name a file in a folder that you may write to")
