"""What a training keeps in its run folder, and believes when it goes on only where it is whole.

A file is written at once or not at all (`models/writer.py`), but disks fail, copies are cut short, and folders are put
in each other's place. So a file of tensors carries the SHA-256 of what it holds, and a checkpoint's mark those of its
files. A damaged checkpoint is as good as lost: the run goes on from the one before, or from its start, to the same
bytes. What steps were taken with cannot be made again, and damage there ends with the name of the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fettle.errors import DiskFullError, ResumeError
from fettle.models.checkpoint import file_sha256
from fettle.models.writer import write_shard

DIGEST = "sha256"  # key of a file's metadata
FILES = "files"  # key of a mark
NEXT_STEP = "give --fresh to start over, or another output folder"


def keep(
    folder: Path, filename: str, tensors: Mapping[str, Tensor], read: Callable[[Tensor], Tensor] = torch.detach
) -> None:
    """Writes tensors with their digest, atomically; `read` gives the values of one that lies elsewhere.

    Values are read twice: in the order of their names for the digest, then in that of `stored_order`.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _add(digest, name, read(tensors[name].detach()))
    write_shard(folder, filename, tensors, {DIGEST: digest.hexdigest()}, read=read)


def verify(path: Path, shapes: Mapping[str, torch.Size] | None = None) -> None:
    """Checks a file that `keep` wrote, one tensor in memory at a time.

    Args:
        path: the file.
        shapes: the names and shapes that this run has a place for; None where any will do.

    Raises:
        ResumeError: it is gone, damaged, or another run's.
    """
    if not path.is_file():
        raise ResumeError(f"{path} is gone, which this training wrote and needs to go on; {NEXT_STEP}")
    digest, found = hashlib.sha256(), dict[str, torch.Size]()
    try:
        with safe_open(path, "pt") as file:
            told = (file.metadata() or {}).get(DIGEST)
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                found[name] = tensor.shape
                _add(digest, name, tensor)
    except (OSError, SafetensorError) as error:
        raise ResumeError(f"{path} is damaged ({error}); {NEXT_STEP}") from error
    if told != digest.hexdigest():
        raise ResumeError(f"{path} is damaged: its SHA-256 is not the one that was recorded in it; {NEXT_STEP}")
    if shapes is not None and found != dict(shapes):
        raise ResumeError(f"{path} holds other parameters than this training has, so another run wrote it; {NEXT_STEP}")


def recall(path: Path, shapes: Mapping[str, torch.Size] | None = None) -> dict[str, Tensor]:
    """What `keep` wrote, checked as `verify` does; raises what it raises."""
    verify(path, shapes)
    found: dict[str, Tensor] = load_file(path)
    return found


def recall_json(path: Path) -> Any:
    """The plain data in a file of the run folder.

    Raises:
        ResumeError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ResumeError(f"{path} is damaged ({error}); {NEXT_STEP}") from error


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}


def is_whole(mark: Path) -> bool:
    """Whether every file beside a mark is there with the bytes that the mark tells."""
    try:
        told = dict(json.loads(mark.read_text(encoding="utf-8"))[FILES])
        return bool(told) and all(file_sha256(mark.parent / name) == digest for name, digest in told.items())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


@contextmanager
def room_in(folder: Path) -> Iterator[None]:
    """Around what writes into a folder by other hands than `write_shard`, torch's among them.

    Raises:
        DiskFullError: the volume is full; torch says so in words of its own archive.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        full = error.errno == errno.ENOSPC if isinstance(error, OSError) else "inline_container" in str(error)
        if not full:
            raise
        free = shutil.disk_usage(folder).free
        raise DiskFullError(
            f"no room for a checkpoint in {folder}: {free} bytes are free. Make room, or choose another folder; then "
            "run the same command again."
        ) from error


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    """Name, dtype, shape and bytes."""
    dense = tensor.detach().cpu().contiguous()
    digest.update(f"{name} {dense.dtype} {list(dense.shape)}\n".encode())
    if dense.numel():
        digest.update(dense.reshape(-1).view(torch.uint8).numpy().data)
