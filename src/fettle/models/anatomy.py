"""The model as methods see it: blocks, and in each block its matrices by role.

What: `read_anatomy(checkpoint)` combines a family's table (families.py) with `config.json` and the shards' headers. It
builds no module tree and imports no transformers, so `fettle inspect` and `fettle plan` are instant whatever the
model's size.

Each `Linear` says where its matrix is on disk (`weight_name`), where it is in the running transformers module
(`slot`), and which activations it reads (`input_group`). The two places differ: GPT-2 stores matrices transposed,
GPT-NeoX and BERT checkpoints come with other prefixes, and transformers 5 stacks the experts of a block in one 3-D
parameter [experts, out, in], of which each expert's gate is the upper half of the rows and its up the lower.

A matrix stored as codes has no `X.weight` on disk but `X.weight_packed` and its companions; it is the same `Linear`.
Every tensor that the configuration promises is looked up and its shape compared, so a wrong or incomplete download is
found here, by name, before any work.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fettle.errors import CheckpointError
from fettle.models.block_widths import block_dimensions
from fettle.models.checkpoint import Checkpoint
from fettle.models.families import DIMENSIONS, Family, Row, find_family
from fettle.models.generic import read_generic
from fettle.models.parts import Anatomy, Block, Feed, Linear, Slot
from fettle.models.sources import Residual, Source

__all__ = ["Anatomy", "Block", "Feed", "Linear", "Slot", "read_anatomy"]


def read_anatomy(checkpoint: Checkpoint, *, generic: bool = False) -> Anatomy:
    """The anatomy of `checkpoint`, from its config and headers alone.

    `generic` is for families without a table; a folder that was written so says it itself. Raises
    `UnknownFamilyError`, or `CheckpointError` naming the tensors that are missing or have another shape than the config
    says.
    """
    foreign = _foreign_quantization(checkpoint)
    if foreign is not None:
        raise unreadable(checkpoint, foreign)
    if generic or (checkpoint.record or {}).get("generic") is True:
        return read_generic(checkpoint)
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'} has no model_type; it says which architecture this is."
        )
    return _Reader(checkpoint, find_family(model_type)).read()


def _foreign_quantization(checkpoint: Checkpoint) -> object | None:
    """Another program's name for its format, whose tensors' names would otherwise only be missed."""
    config = checkpoint.config.get("quantization_config")
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    return None if method in (None, "fettle", "compressed-tensors") else method


def unreadable(checkpoint: Checkpoint, method: object) -> CheckpointError:
    """The error for a model that another program quantized."""
    return CheckpointError(
        f"{checkpoint.folder} is quantized with {method!r}, which fettle does not read (it reads compressed-tensors "
        "with pack-quantized or int-quantized, and its own). Give it the original model."
    )


def dimensions(config: Mapping[str, Any], family: Family) -> dict[str, int]:
    """The symbols of the family's shapes, as numbers, out of config.json."""
    found: dict[str, int] = {}
    for symbol, keys in DIMENSIONS.items():
        values = [config[key] for key in keys if config.get(key) is not None]
        if values:
            if not isinstance(values[0], int) or isinstance(values[0], bool) or values[0] < 1:
                raise CheckpointError(
                    f"config.json says {keys[0]} = {values[0]!r}; it must be a whole number of at least 1."
                )
            found[symbol] = values[0]
    for symbol in ("hidden", "layers", "heads", "vocab"):
        if symbol not in found:
            raise CheckpointError(f"config.json of this {family.name} model lacks {' or '.join(DIMENSIONS[symbol])}.")
    found.setdefault("mlp", 4 * found["hidden"])
    found.setdefault("kv_heads", found["heads"])
    found.setdefault("head_dim", family.default_head_dim or found["hidden"] // found["heads"])
    return found | {"q": found["heads"] * found["head_dim"], "kv": found["kv_heads"] * found["head_dim"]}


_TERM = re.compile(r"^(\d*)(\w+)$")


def evaluate_shape(expression: str, dims: Mapping[str, int]) -> int:
    """The number that a shape such as `q+2kv` stands for."""
    total = 0
    for term in expression.split("+"):
        match = _TERM.match(term)
        assert match is not None, expression
        if match[2] not in dims:
            raise CheckpointError(
                f"config.json lacks {' or '.join(DIMENSIONS[match[2]])}, which the shapes of its matrices need."
            )
        total += int(match[1] or 1) * dims[match[2]]
    return total


def _numbers(rows: tuple[str, str, str], dims: Mapping[str, int]) -> tuple[int, int, int]:
    first, count, period = (evaluate_shape(part, dims) for part in rows)
    return first, count, period


class _Reader:
    """Reads one checkpoint with one family's table, gathering everything that is missing before it complains."""

    def __init__(self, checkpoint: Checkpoint, family: Family) -> None:
        self.checkpoint, self.family = checkpoint, family
        self.dims = dimensions(checkpoint.config, family)
        architectures = checkpoint.config.get("architectures") or []  # a list of names: read_config looked
        default = "" if family.causal else family.base_class  # an encoder without a named class has no head
        self.architecture = architectures[0] if architectures else default
        self.module_prefix = "" if self.architecture == family.base_class else family.prefix
        names = checkpoint.entries
        self.disk_prefix = family.prefix if any(name.startswith(family.prefix) for name in names) else ""
        self.problems: list[str] = []
        self.block_pattern = re.compile(rf"^{re.escape(self.disk_prefix + family.blocks)}\.(\d{{1,9}})\.")

    def read(self) -> Anatomy:
        inside: dict[int, list[str]] = {}
        outside: list[str] = []
        for name in self.checkpoint.entries:
            match = self.block_pattern.match(name)
            inside.setdefault(int(match[1]), []).append(name) if match else outside.append(name)
        layers = self.dims["layers"]
        extra = sorted(index for index in inside if index >= layers)
        if extra:
            self.problems.append(f"blocks {extra[:8]} exist, but config.json says there are {layers}")
        if layers > len(inside):
            self.problems.append(f"config.json says there are {layers} blocks, and the files hold {len(inside)}")
        # One more than there are is enough to name what is missing, whatever number the config says.
        blocks = tuple(self._block(index, inside.get(index, [])) for index in range(min(layers, len(inside) + 1)))
        embedding = self._embedding()
        head, tied = self._head(embedding)
        for name, expression in self.family.outside:
            self._check(self.disk_prefix + name, self._vector_shape(expression))
        if self.problems:
            shown = "; ".join(self.problems[:8]) + (
                f"; and {len(self.problems) - 8} more" if len(self.problems) > 8 else ""
            )
            raise CheckpointError(
                f"{self.checkpoint.folder} does not fit its config.json as a {self.family.name} model: {shown}. "
                "Check that the download is complete and that config.json belongs to these weights."
            )
        return Anatomy(
            family=self.family.name,
            blocks=blocks,
            embedding=embedding,
            head=head,
            tied=tied,
            tensors=tuple(sorted(outside)),
            causal=self.family.causal,
            parameters={name: self._parameter(name) for name in self.checkpoint.entries},
            blocks_return_tuple=self.family.blocks_return_tuple,
            residual=self._residual(),
        )

    def _residual(self) -> Residual | None:
        """The family's, with the names that this checkpoint has."""
        found = self.family.residual
        if found is None:
            return None
        tables = tuple(self.disk_prefix + table for table in found.tables)
        return replace(found, final=self.disk_prefix + found.final, tables=tables)

    def _parameter(self, name: str) -> str:
        """The transformers parameter that holds checkpoint tensor `name`."""
        bare = name.removeprefix(self.disk_prefix) if self.disk_prefix else name
        placed = bare if bare.startswith(self.family.beside_prefix) else self.module_prefix + bare
        for old, new in self.family.renames:
            placed = placed.replace(old, new)
        return placed

    def _check(self, name: str, shape: tuple[int | None, ...]) -> bool:
        """Notes a problem unless tensor `name`, dense or as codes, has `shape` (None: any)."""
        problem = shape_problem(self.checkpoint, name, shape)
        if problem:
            self.problems.append(problem)
        return problem is None

    def _vector_shape(self, expression: str) -> tuple[int | None, ...]:
        return tuple(None if part == "*" else evaluate_shape(part, self.dims) for part in expression.split(","))

    def _block(self, index: int, names: list[str]) -> Block:
        disk = f"{self.disk_prefix}{self.family.blocks}.{index}."
        module = f"{self.module_prefix}{self.family.blocks}.{index}"
        present = set(names)
        is_moe = any(row.role == "router" and f"{disk}{row.name}.weight" in present for row in self.family.rows)
        linears: list[Linear] = []
        dims = block_dimensions(self.checkpoint.config, self.dims, index)
        for row in self.family.rows:
            if row.kind == ("dense" if is_moe else "moe") and (
                is_moe or any(r.kind == "dense" for r in self.family.rows)
            ):
                continue
            count = min(evaluate_shape("experts", self.dims), len(names) + 1) if "{e}" in row.name else 1
            experts = [e if "{e}" in row.name else None for e in range(count)]
            linears += [self._linear(row, (index, dims), disk, module, expert) for expert in experts]
        for name, expression in self.family.vectors:
            self._check(disk + name, self._vector_shape(expression))
        feeds = tuple(feed for source in self.family.sources for feed in self._feeds(source, disk, linears))
        return Block(index, module, tuple(linears), tuple(sorted(names)), feeds)

    def _feeds(self, source: Source, disk: str, linears: list[Linear]) -> list[Feed]:
        """What a row of the family's table means in one block; for experts one each, none where nobody reads it."""
        found = []
        for number in sorted({linear.expert or 0 for linear in linears}) if "{e}" in source.reads else (0,):
            name, group = (disk + part.replace("{e}", str(number)) for part in (source.name, source.reads))
            readers = [linear for linear in linears if linear.input_group == group]
            linear = next((linear for linear in linears if linear.name == name), None)
            if not readers or (linear is None and source.offset is None):
                continue
            span, times = self.dims["head_dim"], self.dims["heads"] // self.dims["kv_heads"]
            found.append(
                Feed(
                    input_group=group,
                    weight_name=f"{name}.weight",
                    bias_name=f"{name}.bias" if f"{name}.bias" in self.checkpoint.entries else None,
                    linear=linear,
                    offset=source.offset or 0.0,
                    rows=None if source.rows is None else _numbers(source.rows, self.dims),
                    repeats=(span, times) if source.heads else (1, 1),
                )
            )
        return found

    def _linear(
        self, row: Row, numbered: tuple[int, Mapping[str, int]], disk: str, module: str, expert: int | None
    ) -> Linear:
        block, dims = numbered
        name = disk + row.name.replace("{e}", str(expert))
        out, into = (evaluate_shape(part, dims) for part in row.shape)
        transposed = self.family.transposed
        self._check(f"{name}.weight", (into, out) if transposed else (out, into))
        if self.checkpoint.config.get(row.bias[0], row.bias[1]):
            self._check(f"{name}.bias", (out,))
        parameter = self._parameter(f"{name}.weight") if row.parameter is None else f"{module}.{row.parameter}"
        rows = None if row.half is None else (row.half * out, (row.half + 1) * out)
        norm = self.family.residual.norm_of(row.role) if self.family.residual is not None else None
        return Linear(
            name=name,
            weight_name=f"{name}.weight",
            role=row.role,
            block=block,
            shape=(out, into),
            slot=Slot(parameter, expert, rows, transposed),
            input_group=disk + row.reads.replace("{e}", str(expert)),
            expert=expert,
            norm=None if norm is None else disk + norm,
        )

    def _embedding(self) -> Linear:
        name = self.disk_prefix + self.family.embedding
        shape = (self.dims["vocab"], self.dims["hidden"])
        self._check(f"{name}.weight", shape)
        slot = Slot(self._parameter(f"{name}.weight"))
        return Linear(name, f"{name}.weight", "embedding", None, shape, slot, f"{name}.ids")

    def _head(self, embedding: Linear) -> tuple[Linear | None, bool]:
        family = self.family
        if family.head is None or self.architecture == family.base_class:
            return None, False
        own = f"{family.head}.weight"
        on_disk = any(name in self.checkpoint.entries for name in (own, *coded_names(family.head)))
        tied = bool(self.checkpoint.config.get("tie_word_embeddings", family.tied_by_default)) and not on_disk
        if not tied:
            self._check(own, embedding.shape)
        weight_name = embedding.weight_name if tied else own
        slot = Slot(family.head_parameter)
        norm = None if family.residual is None else self.disk_prefix + family.residual.final
        inputs = f"{family.head}.inputs"
        return Linear(family.head, weight_name, "head", None, embedding.shape, slot, inputs, norm=norm), tied


def coded_names(stem: str) -> tuple[str, str]:
    """The tensors of which one is there where a matrix is stored as codes, or pruned."""
    return f"{stem}.weight_packed", f"{stem}.weight_values"


def shape_problem(checkpoint: Checkpoint, name: str, shape: tuple[int | None, ...]) -> str | None:
    """What is wrong with tensor `name` against the expected `shape` (None: any length), in words; None if nothing.

    A matrix stored as codes counts when its `weight_packed` is there; its shape is then [out, in], also for Conv1D.
    """
    stem = name.removesuffix(".weight")
    entries = checkpoint.entries
    if name in entries:
        found = entries[name].shape
        # int-quantized codes are [out, in] whatever the module's orientation is
        turned = found == tuple(reversed(shape)) and f"{stem}.weight_scale" in entries
        fits = turned or (
            len(found) == len(shape) and all(e is None or e == f for e, f in zip(shape, found, strict=True))
        )
        return None if fits else f"{name!r} has shape {list(found)}, expected {[e or '*' for e in shape]}"
    if f"{stem}.weight_packed" in entries and any(f"{stem}.{n}" in entries for n in ("weight_scale", "weight_levels")):
        return None
    if f"{stem}.weight_values" in entries:  # pruned
        return None
    return f"{name!r} is missing"
