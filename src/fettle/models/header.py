"""The header of one safetensors file, parsed here and believed only as far as the file's own length.

A safetensors file is

    ┌───────────┬──────────────────────────┬───────────────────────────────┐
    │ 8 bytes   │ that many bytes of JSON  │ the tensors, one after another │
    │ length    │ name → dtype shape span  │ no gaps, no overlap            │
    └───────────┴──────────────────────────┴───────────────────────────────┘

(https://github.com/huggingface/safetensors#format). fettle reads models that a user downloaded, and its promise is
that a damaged file is found before any work. So every number in the header is checked against the length of the file
*before* anything is allocated: the length word, the dtype, every shape (product of the dimensions times the item size
must be the span), and the spans together (ordered by start they tile the data exactly, and the last one ends where the
file ends).

Ours differs from the safetensors library in naming what is wrong (file and tensor) and in never mapping the file into
memory: a mapped file counts as resident memory, which would make every memory figure a guess. Cost: one read of the
header.
"""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fettle.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


_BUFFERS = ("masked_bias", "inv_freq")
_MASK_DIMENSIONS = 4  # GPT-2 and its kin store a mask [1, 1, context, context] under the name of a bias


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes of the file `shard`, from its byte `start` on."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str
    start: int
    nbytes: int

    @property
    def is_mask(self) -> bool:
        """Whether this is a causal mask that old checkpoints carry under the name of a bias."""
        return self.name.rpartition(".")[2] == "bias" and len(self.shape) == _MASK_DIMENSIONS

    @property
    def is_buffer(self) -> bool:
        """Whether old checkpoints carry this beside the parameters: causal masks, rotary frequencies, position ids."""
        last = self.name.rpartition(".")[2]
        return self.is_mask or last in _BUFFERS or not self.dtype.is_floating_point


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Returns every tensor of the safetensors file `path`, in the order of their bytes.

    Raises `CheckpointError`, naming file and tensor, where header and file do not agree.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
            raise _damaged(path, "it is no regular file")
        size = found.st_size
        with path.open("rb") as file:
            header = _parse_json(path, file.read(8), size, file.fileno())
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}). Check the file and its permissions."
        ) from error
    header.pop("__metadata__", None)
    data_start = header.pop(_DATA_START)
    entries = [_entry(path, name, fields, data_start, size) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    _check_extents(path, entries, data_start, size)
    return {entry.name: entry for entry in entries}


_DATA_START = "\0data start"  # cannot collide with a tensor: names with NUL are refused


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"shard {path.name} is damaged: {what}. Copy or download it again; nothing was read from it. (folder: "
        f"{path.parent})"
    )


def _parse_json(path: Path, prefix: bytes, size: int, descriptor: int) -> dict[str, Any]:
    if len(prefix) < 8:
        raise _damaged(path, f"it has {size} bytes, too few for the 8-byte header length")
    length = int.from_bytes(prefix, "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise _damaged(path, f"its header claims {length} bytes, but the file has {size - 8} after the length word")
    raw = os.pread(descriptor, length, 8)
    if len(raw) != length:
        raise _damaged(path, f"its header ends after {len(raw)} of {length} bytes")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict) or any("\0" in name for name in header):
        raise _damaged(path, "its header is not a table of tensors")
    header[_DATA_START] = 8 + length
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice")
    return table


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, name: str, fields: Any, data_start: int, size: int) -> TensorEntry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor {name!r} lacks dtype, shape or data_offsets, or has more")
    dtype, shape, span = DTYPES.get(str(fields["dtype"])), fields["shape"], fields["data_offsets"]
    if dtype is None:
        allowed = ", ".join(sorted(DTYPES))
        raise _damaged(path, f"tensor {name!r} has the unknown dtype {fields['dtype']!r} (known: {allowed})")
    if not isinstance(shape, list) or not all(map(_is_count, shape)) or len(shape) > 16:
        raise _damaged(path, f"tensor {name!r} has the impossible shape {shape!r}")
    if not isinstance(span, list) or len(span) != 2 or not all(map(_is_count, span)) or span[0] > span[1]:
        raise _damaged(path, f"tensor {name!r} has the impossible data_offsets {span!r}")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != span[1] - span[0]:
        raise _damaged(
            path,
            f"tensor {name!r} of shape {shape} needs {nbytes} bytes, but its data_offsets span {span[1] - span[0]}",
        )
    if data_start + span[1] > size:
        missing = data_start + span[1] - size
        raise _damaged(
            path, f"it is truncated: tensor {name!r} ends {missing} bytes after the end of the file ({size} bytes)"
        )
    return TensorEntry(name, dtype, tuple(shape), path.name, data_start + span[0], nbytes)


def _check_extents(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    """Ordered by start, the spans must tile the data exactly: no gap, no overlap, nothing behind the last."""
    end, previous = data_start, "the header"
    for entry in entries:
        if entry.start != end:
            kind = "overlaps" if entry.start < end else "leaves a gap after"
            raise _damaged(path, f"tensor {entry.name!r} {kind} {previous!r} (starts at byte {entry.start}, not {end})")
        end, previous = entry.start + entry.nbytes, entry.name
    if end != size:
        raise _damaged(path, f"{size - end} bytes follow its last tensor {previous!r}")
