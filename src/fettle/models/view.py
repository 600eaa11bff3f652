"""The base as a view: a checkpoint whose tensors are functions of another one's, made when they are read.

    view.read(name) = piece(base)          view.config, view.entries: what a folder written from it would say

What: dropping blocks, narrowing widths, trimming a vocabulary, merging experts: each of them is a new configuration
and, for every tensor of the new model, a `Piece`: which tensors of the base it is made of, and how. A `View` is a
`Checkpoint`, so anatomy, layout, walk and skeleton read it as they read a folder, and whatever comes after it
(quantization, another view) works on the new shapes without knowing. Nothing is written in between, and memory stays at
the tensor at hand.

What a view keeps of the folder: `folder`, `shards` and the hashes are the base's. They say what a run was started from,
and what the result is measured against.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fettle.errors import CheckpointError
from fettle.models.checkpoint import Checkpoint
from fettle.models.header import TensorEntry
from fettle.models.shared_tensors import shared_entries

Index = Tensor | None  # int64 positions that are kept, in their new order; None for all


class Piece(Protocol):
    """One tensor of a view, as a function of the base's tensors."""

    def spec(self, base: Checkpoint) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape, from headers alone."""
        ...

    def read(self, base: Checkpoint) -> Tensor:
        """The tensor."""
        ...

    def read_rows(self, base: Checkpoint, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of its first dimension."""
        ...


@dataclass(frozen=True, eq=False)
class Cut:
    """The kept rows and columns of one base tensor; with a factor: (value + offset) · factor - offset, in float32.

    Attributes:
        source: the base's tensor.
        rows: which of its first dimension are kept.
        columns: which of its second.
        factor: a norm over fewer channels needs another one.
        offset: of a norm that multiplies by offset + weight.
    """

    source: str
    rows: Index = None
    columns: Index = None
    factor: float = 1.0
    offset: float = 0.0

    def spec(self, base: Checkpoint) -> tuple[torch.dtype, tuple[int, ...]]:
        """The base's dtype; as long as what is kept."""
        entry = base.entry(self.source)
        kept = (self.rows, self.columns)
        shape = tuple(
            size if place > 1 or kept[place] is None else len(kept[place])  # type: ignore[arg-type]
            for place, size in enumerate(entry.shape)
        )
        return entry.dtype, shape

    def read(self, base: Checkpoint) -> Tensor:
        """What is kept, in memory of its own."""
        whole = base.read(self.source)
        return self._finished(whole if self.rows is None else whole[self.rows])

    def read_rows(self, base: Checkpoint, start: int, stop: int) -> Tensor:
        """Reads only these rows of the base where all are kept, else one by one."""
        if self.rows is None:
            return self._finished(base.read_rows(self.source, start, stop))
        rows = [base.read_rows(self.source, row, row + 1) for row in self.rows[start:stop].tolist()]
        return self._finished(torch.cat(rows))

    def _finished(self, rows: Tensor) -> Tensor:
        kept = rows if self.columns is None else rows[:, self.columns]
        if self.factor == 1.0:
            return kept.contiguous()
        return ((kept.float() + self.offset) * self.factor - self.offset).to(kept.dtype)


@dataclass(frozen=True, eq=False)
class Made:
    """A tensor of a given dtype and shape that a function makes from the base: a mean of experts, a rotated weight."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[Checkpoint], Tensor]

    def spec(self, base: Checkpoint) -> tuple[torch.dtype, tuple[int, ...]]:
        """As promised."""
        return self.dtype, self.shape

    def read(self, base: Checkpoint) -> Tensor:
        """The tensor; CheckpointError where the function made another than was promised."""
        made = self.make(base).to(self.dtype).contiguous()
        if tuple(made.shape) != self.shape:
            raise CheckpointError(f"a tensor of a view came out as {list(made.shape)}, promised was {list(self.shape)}")
        return made

    def read_rows(self, base: Checkpoint, start: int, stop: int) -> Tensor:
        """Makes all of it."""
        return self.read(base)[start:stop]


@dataclass(frozen=True)
class View(Checkpoint):
    """See the module's text; make it with `of`."""

    base: Checkpoint = field(kw_only=True, repr=False)
    pieces: Mapping[str, Piece] = field(kw_only=True, repr=False)

    @classmethod
    def of(
        cls,
        base: Checkpoint,
        config: Mapping[str, Any],
        pieces: Mapping[str, Piece],
        side_files: Mapping[str, str] | None = None,
        shared: Mapping[str, str] | None = None,
    ) -> View:
        """The view of `base` with these tensors and this configuration; `shared`: see `shared_tensors.py`."""
        entries = {}
        for name, piece in pieces.items():
            dtype, shape = piece.spec(base)
            entries[name] = TensorEntry(name, dtype, shape, base.shards[0], 0, dtype.itemsize * math.prod(shape))
        entries |= shared_entries(shared or {}, entries)
        return cls(
            base.folder, dict(config), entries, base.shards, None, base=base, pieces=dict(pieces),
            side_files={**base.side_files, **(side_files or {})}, shared=dict(shared or {}),
        )  # fmt: skip

    def read(self, name: str) -> Tensor:
        """The tensor `name` as its piece makes it, a fresh one."""
        self.entry(name)
        return self._read_shared(name) if name in self.shared else self.pieces[name].read(self.base)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of it; where the piece only cuts, no others are read."""
        entry = self.entry(name)
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise CheckpointError(f"rows {start}:{stop} of tensor {name!r} asked, its shape is {list(entry.shape)}.")
        if name in self.shared:
            return self._read_shared(name)[start:stop]
        return self.pieces[name].read_rows(self.base, start, stop)

    def file_hashes(self) -> dict[str, str]:
        """The base's: what a run was started from."""
        return self.base.file_hashes()

    def tensor_sha256(self, name: str) -> str:
        """SHA-256 of the bytes that `read` gives."""
        tensor = self.read(name)
        raw = tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b""
        return hashlib.sha256(raw).hexdigest()


def parameter_count(checkpoint: Checkpoint) -> int:
    """How many parameters the tensors hold; buffers of old checkpoints are none, and what is shared counts once."""
    stored = (entry for name, entry in checkpoint.entries.items() if name not in checkpoint.shared)
    return sum(math.prod(entry.shape) for entry in stored if not entry.is_buffer)
