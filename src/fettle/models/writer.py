"""Writing a model folder so that a file is either whole or not there.

What: every file is written under a temporary name in its own folder, synced, renamed, and the folder is synced. A
machine that loses power leaves the old file or the new one, never half of one.

Disk: `shard_bytes` knows the exact size of a shard before it is written (the header's JSON is reproduced byte for
byte), so a disk that is too small is found first, with the number of missing bytes; a disk that fills meanwhile gives
the same error, and the temporary file is removed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fettle.errors import DiskFullError
from fettle.models.checkpoint import INDEX
from fettle.models.header import DTYPES

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

SIDE_SUFFIXES = (".json", ".model", ".jinja", ".tiktoken")
SIDE_NAMES = ("merges.txt", "vocab.txt", "LICENSE", "NOTICE", "USE_POLICY.md", "LICENSE.md", "LICENSE.txt")
_OWN_FILES = ("config.json", "fettle.json", INDEX)
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: the order in which the safetensors library lays out dtypes: widest first, so that data stays aligned
_DTYPE_RANK = {
    name: rank
    for rank, name in enumerate(
        (
            "BOOL",
            "U8",
            "I8",
            "F8_E5M2",
            "F8_E4M3",
            "F8_E8M0",
            "I16",
            "U16",
            "F16",
            "BF16",
            "I32",
            "U32",
            "F32",
            "F64",
            "I64",
            "U64",
        )
    )
}
TEMPORARY_SUFFIX = ".partial"


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor: what `shard_bytes` needs."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def shard_bytes(layout: Layout, metadata: Mapping[str, str] | None = None) -> int:
    """The exact size in bytes of the safetensors file with these tensors, before it is written."""
    header, _ = _header(layout, metadata)
    return len(header) + sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())


def _header(layout: Layout, metadata: Mapping[str, str] | None) -> tuple[bytes, list[str]]:
    """Length word and JSON, padded to 8 bytes as the safetensors library does it; and the order of the tensors."""
    fields: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    order = sorted(layout, key=lambda name: (-_DTYPE_RANK[_DTYPE_NAMES[layout[name][0]]], name))
    end = 0
    for name in order:
        dtype, shape = layout[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        fields[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def stored_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The order in which `write_shard` reads and writes them."""
    return _header(layout_of(tensors), None)[1]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def write_shard(
    folder: Path, filename: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None,
    *, read: Callable[[Tensor], Tensor] = _as_it_is,
) -> str:  # fmt: skip
    """Writes `tensors` as the safetensors file `filename`, atomically; returns the SHA-256 of the file.

    The bytes are those of `safetensors.torch.save_file` (a test compares them), which would first make a second copy
    of every tensor in memory; here the largest is copied at most. Raises `DiskFullError` naming the file and the bytes
    missing; then nothing of it is left behind. `read` gives the values of a tensor that lies elsewhere, one at a time.
    """
    layout = layout_of(tensors)
    header, order = _header(layout, metadata)
    digest = hashlib.sha256(header)
    with _replacing(folder, filename, shard_bytes(layout, metadata)) as temporary, temporary.open("wb") as file:
        file.write(header)
        for name in order:
            dense = read(tensors[name].detach()).cpu().contiguous().reshape(-1)
            raw = dense.view(torch.uint8).numpy().data if dense.numel() else memoryview(b"")
            digest.update(raw)
            file.write(raw)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8), atomically."""
    data = text.encode("utf-8")
    with _replacing(path.parent, path.name, len(data)) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON with an indent of two and a final newline, atomically; non-finite numbers are refused."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_index(folder: Path, shard_of: Mapping[str, str], total_bytes: int) -> None:
    """Writes `model.safetensors.index.json`: tensor name → shard."""
    ordered = {name: shard_of[name] for name in sorted(shard_of)}
    write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": ordered})


def is_side_file(path: Path) -> bool:
    """Whether `copy_side_files` would take a file of this name."""
    wanted = path.suffix in SIDE_SUFFIXES or path.name in SIDE_NAMES
    return wanted and path.name not in _OWN_FILES and not path.name.endswith(".index.json")


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copies what belongs to a model beside its weights (tokenizer, generation config, license); returns the names.

    Never weights, never pickles, never Python.
    """
    copied = []
    for path in sorted(source.iterdir()):
        if not is_side_file(path) or not path.is_file():
            continue
        data = path.read_bytes()
        with _replacing(target, path.name, len(data)) as temporary:
            temporary.write_bytes(data)
        copied.append(path.name)
    return copied


def free_bytes(folder: Path) -> int:
    """Bytes that this user can still write into `folder`."""
    return shutil.disk_usage(folder).free


@contextlib.contextmanager
def _replacing(folder: Path, filename: str, nbytes: int) -> Iterator[Path]:
    """Yields a temporary path in `folder`; afterwards it is synced and takes the place of `filename`."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary, final = folder / f".{filename}{TEMPORARY_SUFFIX}", folder / filename
    temporary.unlink(missing_ok=True)  # what a killed run left behind must not count as used space
    free = free_bytes(folder)
    if free < nbytes:
        raise _disk_full(final, nbytes, free)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(final)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            temporary.unlink(missing_ok=True)
            raise _disk_full(final, nbytes, free_bytes(folder)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_full(path: Path, needed: int, free: int) -> DiskFullError:
    missing = max(needed - free, 0)
    what = f"{missing} bytes are missing" if missing else "a limit or quota on the size of files was reached"
    return DiskFullError(
        f"no room for {path}: it needs {needed} bytes and {free} are free, so {what}. "
        "Make room or choose another folder; then run the same command again."
    )
