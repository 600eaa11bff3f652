"""Which folder a user's word for a model means: `demo`, a local folder, or a hub id.

The hub is asked only for a word of the form `org/name` that is no folder here, and only for safetensors, JSON, text and
tokenizer files: what `huggingface_hub` keeps in its cache is used when the machine is offline.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import re
from pathlib import Path

from fettle.errors import ModelError

DEMO = "demo"
HUB_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


def resolve(model: str | Path) -> Path:
    """The folder of `model`: "demo", a local folder, or a hub id such as "org/name" (downloaded once).

    Raises `ModelError` that says what was looked for and what to do.
    """
    if str(model) == DEMO:
        return demo_folder()
    path = Path(model)
    with contextlib.suppress(RuntimeError):  # ~somebody, whom there is not, is no folder either
        path = path.expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(
            f"{model} is a file; a model is a folder with config.json and *.safetensors. Give {path.parent}."
        )
    if isinstance(model, str) and _HUB_ID.match(model) and not model.startswith("."):
        return _download(model)
    raise ModelError(f"there is no folder {str(model)!r}. Give a local model folder, a hub id (org/name), or 'demo'.")


def demo_folder() -> Path:
    """The folder of the small language model that the package ships."""
    folder = Path(str(importlib.resources.files("fettle.models"))) / "reference"
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"the embedded model is missing in {folder}. Install fettle-llm again; a clone has it in the repository."
        )
    return folder


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_PATTERNS)))
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no folder {hub_id!r} here, and the hub has no model {hub_id!r} that you may read. Check the "
            "spelling; "
            "for a gated model, accept its terms and log in with 'hf auth login'."
        ) from error
    except HFValidationError as error:
        raise ModelError(
            f"there is no folder {hub_id!r} here, and the hub has no names of that form. Check the path."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"there is no folder {hub_id!r} here, and the hub could not be reached for a model of that name "
            f"({type(error).__name__}). Check the path, or go online, or give a folder that is downloaded already."
        ) from error
