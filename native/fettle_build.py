"""The build backend: scikit-build-core, except that an editable install is a plain path to src/.

scikit-build-core's own editable installs put an import hook in front of everything, so PYTHONPATH could no longer
choose another checkout. Here the compiled module goes into src/fettle/ (which git ignores), and the wheel holds one
.pth file.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

from scikit_build_core import build as _scikit
from scikit_build_core.build import *  # noqa: F403  the other hooks of PEP 517

SOURCE = Path(__file__).resolve().parent.parent / "src"


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Builds, puts the module into src/fettle/, and leaves a wheel with the path to src/."""
    name = _scikit.build_editable(wheel_directory, config_settings, metadata_directory)
    whole = Path(wheel_directory) / name
    plain = whole.with_suffix(".plain")
    with zipfile.ZipFile(whole) as built, zipfile.ZipFile(plain, "w", zipfile.ZIP_DEFLATED) as wheel:
        rows = []
        for entry in built.namelist():
            if entry.startswith("fettle/"):
                _place(built, entry)
            elif not entry.startswith("_editable_skbc_") and not entry.endswith("/RECORD"):
                rows.append(_add(wheel, entry, built.read(entry)))
        rows.append(_add(wheel, "_fettle_llm.pth", f"{SOURCE}\n".encode()))
        record = next(entry for entry in built.namelist() if entry.endswith(".dist-info/RECORD"))
        wheel.writestr(record, "".join(f"{row}\n" for row in [*rows, f"{record},,"]))
    os.replace(plain, whole)
    return name


def _place(built: zipfile.ZipFile, entry: str) -> None:
    """The compiled module into src/fettle/, in one step: another process may have it open."""
    if not entry.endswith((".so", ".pyd")):
        return
    target = SOURCE / entry
    fresh = target.with_suffix(".new")
    with built.open(entry) as stored, fresh.open("wb") as file:
        shutil.copyfileobj(stored, file)
    os.replace(fresh, target)


def _add(wheel: zipfile.ZipFile, name: str, content: bytes) -> str:
    """Writes one file; returns its line of RECORD."""
    wheel.writestr(name, content)
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}"
