"""A checkpoint seen in rotated coordinates: the same function, other weights, read tensor by tensor.

With the residual stream x → x·R (R orthogonal), a norm n that is followed by a weight g, and W [out, in]:

    embedding, position tables   E → E·R
    reads the stream             W → W·diag(g)·R        since W·diag(g)·n(x)ᵀ = (W·diag(g)·R)·n(x·R)ᵀ
    norm                         g → 1, and its bias  b → (b/g)·R
    writes to the stream         W → Rᵀ·W, and its bias  b → b·R
    head                         W → W·diag(g)·R, with g of the final norm

and with the values v → v·R_b of each head: rows of the value matrix and its bias times R_bᵀ, columns of the output
projection times R_b, head by head; attention mixes tokens and not channels, so heads that share values need nothing
else.

Why a view: the walk, the second copy of a block, statistics, a budget's search and what is copied unchanged all read
the base through `Checkpoint`. Seen through this, the base *is* the rotated model, and nobody else needs to know. What
is rotated may itself be a view of another shape (`view.py`). Every tensor is a pure function of the files and of R, so
a resumed run reads the same bytes; memory stays one tensor above what the walk needs anyway.

What is kept is written in the type of its tensor, so a bfloat16 model's embedding, head and routers are rounded once
more; what is compressed is read in float32 (`in_float32`). A tied head gets a tensor of its own, as the final norm goes
into it alone, and `tie_word_embeddings` becomes false. Refused with a reason: families whose norms weigh the stream
itself (BERT) or what is added to it (Gemma 2), models without a head, whose output is the stream, and those without a
table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from fettle.errors import RecipeError
from fettle.models.checkpoint import Checkpoint, check_finite
from fettle.models.parts import Anatomy, Block, Linear


class Turn(Protocol):
    """An orthogonal matrix R: `tensors.orthogonal.Orthogonal`, or one that is written out."""

    def apply(self, rows: Tensor, scale: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """`rows` [..., k · width] · diag(scale) → each run of `width` columns times R, in `dtype` or the rows' own."""
        ...


class Basis(Protocol):
    """What chooses the coordinates."""

    def residual_map(self, width: int, *, centred: bool) -> Turn | None:
        """R of a residual stream of this width, which leaves the ones where they are if `centred`; None: it stays."""
        ...

    def head_map(self, head_dim: int, block: int) -> Turn | None:
        """R of the values of each head of a block; None: they stay."""
        ...


#: the key of config.json under which a rotated model says so
BASIS_KEY = "fettle_basis"


@dataclass(frozen=True)
class _Change:
    """How one tensor is made: `source`, as a matrix, · diag(norm) · columns, and rowsᵀ · that."""

    source: str
    norm: str | None = None  # the tensor whose values multiply the columns
    divided: bool = False  # … or divide them, for a norm's own bias
    columns: Turn | None = None
    rows: Turn | None = None
    chosen: tuple[int, ...] | None = None  # the rows that `rows` is for; None for all
    ones: bool = False  # a norm whose weight went elsewhere
    transposed: bool = False  # [in, out] on disk


@dataclass(frozen=True)
class RotatedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are read rotated; see the module docstring. Make it with `rotate`."""

    base: Checkpoint = field(kw_only=True, repr=False)  # as it lies on disk, or a view of another shape
    changes: dict[str, _Change] = field(default_factory=dict, repr=False)
    exact: frozenset[str] = frozenset()  # read in float32

    def in_float32(self, names: Iterable[str]) -> RotatedCheckpoint:
        """The same, with these tensors not rounded to their own type."""
        return replace(self, exact=frozenset(names))

    def read(self, name: str) -> Tensor:
        """The rotated tensor, in its own type, or float32 where that was asked for."""
        change = self.changes.get(name)
        if change is None:
            return self.base.read(name)
        return self._changed(name, change, self.base.read(change.source))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`; where rows are mixed, or it is a vector, all are read first."""
        change = self.changes.get(name)
        if change is None:
            return self.base.read_rows(name, start, stop)
        if change.rows is not None or change.transposed or len(self.entry(name).shape) == 1:
            return self.read(name)[start:stop]
        return self._changed(name, change, self.base.read_rows(change.source, start, stop))

    def file_hashes(self) -> dict[str, str]:
        """The base's: what a run was started from."""
        return self.base.file_hashes()

    def _changed(self, name: str, change: _Change, stored: Tensor) -> Tensor:
        dtype = torch.float32 if name in self.exact else stored.dtype
        if change.ones:
            return torch.ones_like(stored)
        check_finite(change.source, stored)
        matrix = stored.T if change.transposed else stored
        scale = None if change.norm is None else self._scale(change.norm, change.divided)
        wide = dtype if change.rows is None else torch.float32
        if change.columns is not None:
            matrix = change.columns.apply(matrix, scale, wide)
        if change.rows is not None:
            matrix = _rows_rotated(matrix, change.rows, change.chosen)
        return (matrix.T if change.transposed else matrix).to(dtype).contiguous()

    def _scale(self, name: str, divided: bool) -> Tensor:
        norm = self.base.read(name)
        check_finite(name, norm)
        if not divided:
            return norm
        if bool((norm == 0).any()):
            raise RecipeError(
                f"rotation: {name} holds a zero, so the bias behind it cannot move in front of it; use residual: false "
                "(--no-rotate-residual), or leave the rotation out"
            )
        return 1 / norm.double()


def _rows_rotated(matrix: Tensor, rows: Turn, chosen: tuple[int, ...] | None) -> Tensor:
    """Rᵀ · matrix [out, in], or of a vector [out], over the chosen rows; float32."""
    columns = matrix.float().reshape(matrix.shape[0], -1).T  # [in, out]
    if chosen is None:
        return rows.apply(columns).T.reshape(matrix.shape)
    places = torch.tensor(chosen)
    result = columns.clone()
    result[:, places] = rows.apply(columns[:, places])
    return result.T.reshape(matrix.shape)


def rotate(checkpoint: Checkpoint, anatomy: Anatomy, basis: Basis) -> RotatedCheckpoint:
    """`checkpoint` in the coordinates that `basis` chooses; reads no tensor. Read its anatomy anew: it is untied.

    Raises:
        RecipeError: a model whose residual stream cannot be rotated, with the reason.
    """
    changes: dict[str, _Change] = {}
    entries, config = dict(checkpoint.entries), dict(checkpoint.config)
    residual = _residual_map(checkpoint, anatomy, basis)
    if residual is not None:
        _rotate_outside(checkpoint, anatomy, residual, changes)
        head, embedding = anatomy.head, anatomy.embedding
        assert head is not None and embedding is not None
        if anatomy.tied:
            entries[f"{head.name}.weight"] = replace(entries[embedding.weight_name], name=f"{head.name}.weight")
            config["tie_word_embeddings"] = False
    for block in anatomy.blocks:
        _rotate_block(checkpoint, block, residual, changes)
        _rotate_heads(checkpoint, block, basis, changes)
    return RotatedCheckpoint(
        folder=checkpoint.folder, config=config, entries=entries, shards=checkpoint.shards, record=checkpoint.record,
        side_files=checkpoint.side_files, base=checkpoint, changes=changes,
    )  # fmt: skip


def _residual_map(checkpoint: Checkpoint, anatomy: Anatomy, basis: Basis) -> Turn | None:
    width = anatomy.embedding.shape[1] if anatomy.embedding is not None else 0
    stream = anatomy.residual
    found = basis.residual_map(width, centred=stream is not None and stream.centred) if width else None
    reason = ""
    if stream is None:
        reason = f"nothing is known of the residual stream of this {anatomy.family} model"
    elif found is not None and (stream.refused or anatomy.head is None):
        reason = stream.refused or "without a head, the residual stream is what the model gives out"
    if not reason:
        return found
    advice = "use residual: false (--no-rotate-residual) to rotate the heads alone" if stream else "leave rotation out"
    raise RecipeError(f"rotation: {checkpoint.folder.name} ({anatomy.family}) cannot be rotated: {reason}; {advice}")


def _rotate_outside(checkpoint: Checkpoint, anatomy: Anatomy, residual: Turn, changes: dict[str, _Change]) -> None:
    """Embedding, position tables, final norm and head."""
    stream, head, embedding = anatomy.residual, anatomy.head, anatomy.embedding
    assert stream is not None and head is not None and embedding is not None
    for name in (embedding.weight_name, *stream.tables):
        changes[name] = _Change(source=name, columns=residual)
    _rotate_norm(checkpoint, stream.final, residual, changes)
    changes[f"{head.name}.weight"] = _Change(source=head.weight_name, norm=f"{stream.final}.weight", columns=residual)


def _rotate_norm(checkpoint: Checkpoint, norm: str, residual: Turn, changes: dict[str, _Change]) -> None:
    weight, bias = f"{norm}.weight", f"{norm}.bias"
    changes[weight] = _Change(source=weight, ones=True)
    if bias in checkpoint.entries:
        changes[bias] = _Change(source=bias, norm=weight, divided=True, columns=residual)


def _rotate_block(checkpoint: Checkpoint, block: Block, residual: Turn | None, changes: dict[str, _Change]) -> None:
    """What the residual stream's rotation does to a block; without one the change is none yet."""
    for linear in block.linears:
        bias = f"{linear.name}.bias"
        if residual is None:
            changes[linear.weight_name] = _Change(source=linear.weight_name, transposed=linear.slot.transposed)
        elif linear.norm is not None:
            changes[linear.weight_name] = _Change(
                source=linear.weight_name, norm=f"{linear.norm}.weight", columns=residual,
                transposed=linear.slot.transposed,
            )  # fmt: skip
            _rotate_norm(checkpoint, linear.norm, residual, changes)
        else:
            changes[linear.weight_name] = _Change(
                source=linear.weight_name, rows=residual, transposed=linear.slot.transposed
            )
            if bias in checkpoint.entries:
                changes[bias] = _Change(source=bias, rows=residual)


def _rotate_heads(checkpoint: Checkpoint, block: Block, basis: Basis, changes: dict[str, _Change]) -> None:
    """The values of each head of a block, and what reads them."""
    for feed in block.feeds:
        if feed.linear is None or feed.repeats[0] == 1:
            continue
        turned = basis.head_map(feed.repeats[0], block.index)
        if turned is None:
            continue
        rows = tuple(feed.source_rows(feed.linear.shape[0]))
        values = feed.linear.weight_name
        changes[values] = replace(changes[values], rows=turned, chosen=rows)
        if feed.bias_name is not None:
            changes[feed.bias_name] = _Change(source=feed.bias_name, rows=turned, chosen=rows)
        for reader in _readers(block, feed.input_group):
            changes[reader.weight_name] = replace(changes[reader.weight_name], columns=turned)


def _readers(block: Block, group: str) -> list[Linear]:
    return [linear for linear in block.linears if linear.input_group == group]
