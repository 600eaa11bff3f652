"""A Hugging Face folder as it lies on disk: its configuration, and where every tensor is.

What: `Checkpoint.open(folder)` reads `config.json` and the header of every shard, nothing else; `read(name)` then
copies one tensor out of its file with `pread` into memory of its own. No memory map: mapped pages count as the
process's memory, so with a map the peak would be the model's size whatever the walk does.

Why so strict: a shard that is cut short or has a flipped bit otherwise loads and answers garbage. Headers are checked
against file lengths before anything is allocated (see `header.py`), index and shards against each other, and, in a
folder that fettle wrote, each tensor against its SHA-256 in `fettle.json` (`verify_hashes`).

Refused, never executed: pickles (`pytorch_model.bin`, `*.pt`, …: unpickling runs code) and `auto_map` (remote code).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fettle.errors import CheckpointError, NonFiniteError
from fettle.models.config_file import read_config, read_json
from fettle.models.header import TensorEntry, read_header
from fettle.models.shared_tensors import factor_names, shared_entries, shared_names

__all__ = ["Checkpoint", "TensorEntry", "check_finite"]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CHUNK_BYTES = 4 << 20
MAX_NAME_BYTES = 255  # of a file, on every file system of today
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_BLOCK_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Checkpoint:
    """The files of one model: `config` as read, and `entries`, every tensor by name. Make it with `open`."""

    folder: Path
    config: dict[str, Any]
    entries: dict[str, TensorEntry]
    shards: tuple[str, ...]
    record: dict[str, Any] | None = field(default=None, repr=False)  # fettle.json, in a folder that fettle wrote
    side_files: Mapping[str, str] = field(default_factory=dict, kw_only=True, repr=False)  # name → text, of views:
    # instead of the folder's file of that name, such as a tokenizer with fewer words
    shared: Mapping[str, str] = field(default_factory=dict, kw_only=True, repr=False)  # see `shared_tensors.py`

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Reads configuration and headers of `folder`; raises `CheckpointError` for anything damaged or unsafe."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} is not a folder. Give a local model folder, a hub id (org/name) or 'demo'."
            )
        config = read_config(folder)
        _refuse_remote_code(folder, config)
        shards = _find_shards(folder)
        entries: dict[str, TensorEntry] = {}
        for shard in shards:
            for name, entry in read_header(folder / shard).items():
                if name in entries:
                    raise CheckpointError(f"tensor {name!r} stands in two shards, {entries[name].shard} and {shard}.")
                entries[name] = entry
        _check_index(folder, entries)
        if not entries:
            raise CheckpointError(f"{folder} holds no tensor at all in {', '.join(shards)}.")
        record_path = folder / "fettle.json"
        record = read_json(record_path) if record_path.exists() else None
        shared = shared_names(config)
        entries |= shared_entries(shared, entries)
        return cls(folder, config, entries, shards, record, shared=shared)

    def read(self, name: str) -> Tensor:
        """A fresh CPU tensor with the bytes of `name`, in its own shape and dtype."""
        if name in self.shared:
            return self._read_shared(name)
        entry = self.entry(name)
        return self._read_bytes(entry, entry.start, entry.nbytes).view(entry.dtype).reshape(entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the first dimension of `name`, without reading the others."""
        entry = self.entry(name)
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise CheckpointError(
                f"rows {start}:{stop} of tensor {name!r} asked, but its shape is {list(entry.shape)}."
            )
        if name in self.shared:
            return self._read_shared(name)[start:stop]
        row = entry.nbytes // max(entry.shape[0], 1)
        raw = self._read_bytes(entry, entry.start + start * row, (stop - start) * row)
        return raw.view(entry.dtype).reshape(stop - start, *entry.shape[1:])

    def _read_shared(self, name: str) -> Tensor:
        """What is stored under another name, with the product of its own factors added where it has any."""
        common, (left, right) = self.read(self.shared[name]), factor_names(name)
        if left not in self.entries:
            return common
        return (common.float() + self.read(left).float() @ self.read(right).float()).to(common.dtype)

    def entry(self, name: str) -> TensorEntry:
        """The entry of `name`; raises `CheckpointError` when there is none."""
        if name not in self.entries:
            raise CheckpointError(
                f"tensor {name!r} is missing: none of {', '.join(self.shards)} in {self.folder} holds it."
            )
        return self.entries[name]

    def _read_bytes(self, entry: TensorEntry, start: int, nbytes: int) -> Tensor:
        raw = torch.empty(nbytes, dtype=torch.uint8)  # torch aligns its memory to 64 bytes
        if nbytes == 0:
            return raw
        view, done = raw.numpy().data, 0
        with (self.folder / entry.shard).open("rb", buffering=0) as file:
            while done < nbytes:
                count = os.preadv(file.fileno(), [view[done:]], start + done)
                if count == 0:  # the file was whole when it was opened
                    raise CheckpointError(f"shard {entry.shard} shrank while tensor {entry.name!r} was read from it.")
                done += count
        return raw

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model was saved in: config's, else that of most floating-point bytes."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        known = getattr(torch, str(named).removeprefix("torch."), None) if named else None
        if isinstance(known, torch.dtype) and known.is_floating_point:
            return known
        total: dict[torch.dtype, int] = {}
        for entry in self.entries.values():
            if entry.dtype.is_floating_point and entry.dtype.itemsize > 1:
                total[entry.dtype] = total.get(entry.dtype, 0) + entry.nbytes
        return max(total, key=lambda dtype: total[dtype]) if total else torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, without headers."""
        return sum(entry.nbytes for entry in self.entries.values())

    def file_hashes(self) -> dict[str, str]:
        """SHA-256 of config.json and of every shard, by file name; streams, so memory stays at 4 MB."""
        return {name: file_sha256(self.folder / name) for name in ("config.json", *self.shards)}

    def tensor_sha256(self, name: str) -> str:
        """SHA-256 of the bytes of one tensor as stored; streams."""
        if name in self.shared:
            return hashlib.sha256(self.read(name).contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
        entry, digest = self.entry(name), hashlib.sha256()
        for start in range(0, entry.nbytes, CHUNK_BYTES):
            chunk = self._read_bytes(entry, entry.start + start, min(CHUNK_BYTES, entry.nbytes - start))
            digest.update(chunk.numpy().data)
        return digest.hexdigest()

    def verify_hashes(self) -> int:
        """Compares every tensor with the SHA-256 that `fettle.json` holds; returns how many there were to compare.

        Raises `CheckpointError` naming shard and tensor of the first difference. A folder without recorded hashes
        gives 0.
        """
        recorded = recorded_hashes(self.record)
        for name, expected in recorded.items():
            entry = self.entry(name)
            if self.tensor_sha256(name) != expected:
                raise CheckpointError(
                    f"tensor {name!r} in shard {entry.shard} is damaged: its SHA-256 is not the one that fettle.json "
                    "recorded when it was written. Copy the folder again, or compress the model again with --fresh. "
                    f"({self.folder})"
                )
        return len(recorded)


def recorded_hashes(record: dict[str, Any] | None) -> dict[str, str]:
    """Tensor name → SHA-256 of its bytes, out of the `tensors` of a `fettle.json`."""
    tensors = (record or {}).get("tensors")
    return {str(name): str(digest) for name, digest in tensors.items()} if isinstance(tensors, dict) else {}


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises `NonFiniteError` naming tensor, block and the first position when `tensor` holds NaN or infinity."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # A sum of squares would overflow on healthy values; the extrema carry NaN and infinity along without a mask in
    # memory.
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()
    low, high = torch.aminmax(wide.detach())
    if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
        return
    bad = ~torch.isfinite(wide)
    first = [int(i) for i in bad.nonzero()[0]]
    number = _BLOCK_NUMBER.search(name)
    where = f"block {number[1]}" if number else "outside the blocks"
    raise NonFiniteError(
        f"tensor {name!r} ({where}) holds {int(bad.sum())} values that are NaN or infinite, the first at {first}. "
        "The file is damaged or the model diverged in training; get a sound copy of it."
    )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; streams."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _refuse_remote_code(folder: Path, config: dict[str, Any]) -> None:
    tables: list[tuple[str, dict[str, Any]]] = [("config.json", config)]
    for name in (
        "tokenizer_config.json",
        "generation_config.json",
        "processor_config.json",
        "preprocessor_config.json",
    ):
        if (folder / name).exists():
            tables.append((name, read_json(folder / name)))
    for name, table in tables:
        if any(part.get("auto_map") for part in _tables(table)):
            raise CheckpointError(
                f"{folder / name} has an auto_map: it asks to run Python code that comes with the model. fettle "
                "never runs "
                "code from a model. Use a version of the model that transformers supports itself, without auto_map."
            )


def _tables(value: Any) -> Iterator[dict[str, Any]]:
    """`value` and every dictionary inside it: sub-configurations may carry an auto_map of their own."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _tables(inner)


def _find_shards(folder: Path) -> tuple[str, ...]:
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(v, str) for v in weight_map.values())
        ):
            raise CheckpointError(f"{folder / INDEX} is damaged: it has no weight_map of tensor names to shards.")
        names = sorted(set(weight_map.values()))
        _check_shard_names(folder, names)
        return tuple(names)
    if (folder / SINGLE).exists():
        return (SINGLE,)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as a pickle ({', '.join(pickles[:3])}), which can run any code when it is "
            "opened. "
            "fettle refuses pickles. Use the model's safetensors version, or convert it on a machine you can lose."
        )
    raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}. Check that the download is complete.")


def _check_shard_names(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if not _is_file_name(name) or not name.endswith(".safetensors"):  # "../x" must not leave the folder
            raise CheckpointError(
                f"{folder / INDEX} names the shard {name[:100]!r}, which is not a safetensors file in the folder."
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"shard {name} is missing in {folder}, but {INDEX} names it. Download it again.")


def _is_file_name(name: str) -> bool:
    """Whether a file of this name could lie in a folder."""
    length = len(name.encode("utf-8", errors="replace"))
    return Path(name).name == name and length <= MAX_NAME_BYTES and name.isprintable()


def _check_index(folder: Path, entries: dict[str, TensorEntry]) -> None:
    if not (folder / INDEX).exists():
        return
    for name, shard in read_json(folder / INDEX)["weight_map"].items():
        if name not in entries:
            raise CheckpointError(f"{INDEX} says that shard {shard} holds tensor {name!r}, but it does not. ({folder})")
        if entries[name].shard != shard:
            raise CheckpointError(
                f"{INDEX} puts tensor {name!r} in shard {shard}, but it lies in {entries[name].shard}."
            )
