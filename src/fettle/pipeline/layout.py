"""Layout: which file of the written model holds which tensors, known to the byte before any work.

A unit is one shard file. Each block is one unit; what stands outside the blocks follows: every tensor of at least 64
MB alone
(embeddings, heads), the rest together. So the walk never holds more than one unit, and the plan's prediction of the
output is no estimate: the safetensors header is a function of the names, types and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fettle.errors import RecipeError
from fettle.methods.protocols import BlockMethod, MatrixMethod, Rescaler, RescalingMethod, Tuner
from fettle.methods.statistics import OF_THE_WEIGHT
from fettle.models.anatomy import Anatomy, Linear
from fettle.models.checkpoint import Checkpoint
from fettle.models.storage import input_obstacle
from fettle.models.writer import shard_bytes
from fettle.pipeline.loss_gradients import refuse_without_gradient
from fettle.tensors.masked import MaskedScheme
from fettle.tensors.remainder import TensorSpec
from fettle.tensors.weights import WeightScheme

LARGE_TENSOR_BYTES = 64 * 2**20
METADATA = {"format": "pt"}  # loaders ask for it


@dataclass(frozen=True, kw_only=True)
class Compression:
    """One linear with the method that it gets and the scheme that this leaves behind."""

    linear: Linear
    method: MatrixMethod
    scheme: WeightScheme
    untuned: str = ""  # why the method's tuner leaves it as it is

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the method wants to know of this linear's inputs."""
        wanted = tuple(kind for kind in self.method.needs() if kind not in OF_THE_WEIGHT)
        return (*wanted, "input_range") if self.scheme.has_input_scale else wanted

    @property
    def wants_gradient(self) -> bool:
        """Whether the method looks at the gradient of the loss for this weight."""
        return bool(OF_THE_WEIGHT.intersection(self.method.needs()))

    @property
    def tuner(self) -> Tuner[Any] | None:
        """What improves the codes of a whole block afterwards; None for most methods, and outside the blocks."""
        if self.linear.block is None or self.untuned or not isinstance(self.method, BlockMethod):
            return None
        return self.method.tuner()

    @property
    def rescaler(self) -> Rescaler | None:
        """What chooses factors for its inputs beforehand; None for most methods, and outside the blocks."""
        if self.linear.block is None or not isinstance(self.method, RescalingMethod):
            return None
        return self.method.rescaler()

    @property
    def looks_at_data(self) -> bool:
        """Whether windows of text are needed."""
        return bool(self.statistics) or self.wants_gradient or self.tuner is not None or self.rescaler is not None


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One shard of the written model."""

    index: int
    block: int | None
    shard: str
    kept: tuple[str, ...]  # checkpoint tensors that are copied as they are
    compressed: tuple[Compression, ...]
    tensors: Mapping[str, TensorSpec]  # every tensor of the shard
    bytes: int  # of the whole file, header included


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All shards, in the order in which they are written."""

    units: tuple[Unit, ...]
    storage: str  # the recipe's; small floats have their own

    def storage_of(self, item: Compression) -> str:
        """How the codes of a compressed linear lie in the file."""
        return item.scheme.storage_for(item.linear.shape, self.storage)

    @property
    def bytes(self) -> int:
        """The exact size of all shards together."""
        return sum(unit.bytes for unit in self.units)

    @property
    def compressions(self) -> tuple[Compression, ...]:
        """Every compressed linear, in writing order."""
        return tuple(c for unit in self.units for c in unit.compressed)

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor name → shard: the index of the written model."""
        return {name: unit.shard for unit in self.units for name in unit.tensors}


def build_layout(
    checkpoint: Checkpoint, anatomy: Anatomy, assigned: Mapping[str, MatrixMethod], storage: str
) -> Layout:
    """Lays out the written model; reads headers only.

    Raises:
        RecipeError: a scheme that the model's tensors or the storage cannot take.
    """
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    compressed = {c.linear.weight_name: c for c in compressions(anatomy, assigned, dtype)}
    for item in compressed.values():
        item.scheme.check_storage(item.scheme.storage_for(item.linear.shape, storage))
        _check_mask(item, anatomy, assigned)
        if item.wants_gradient:
            refuse_without_gradient(item.linear, anatomy, item.method.name)
        obstacle = input_obstacle(item.linear) if item.scheme.activations is not None else None
        if obstacle:
            raise RecipeError(f"inputs cannot be quantized: {obstacle}; leave it out with where:, or activations: none")
    groups: list[tuple[int | None, list[str]]] = [(block.index, list(block.tensors)) for block in anatomy.blocks]
    small = []
    for name in anatomy.tensors:
        if checkpoint.entries[name].nbytes >= LARGE_TENSOR_BYTES:
            groups.append((None, [name]))
        else:
            small.append(name)
    if small:
        groups.append((None, small))
    units = []
    for index, (block, names) in enumerate(groups):
        inside = set(names)
        chosen = tuple(item for name, item in compressed.items() if name in inside)  # in the order of the data
        kept = tuple(name for name in names if name not in compressed and name not in checkpoint.shared)
        specs: dict[str, TensorSpec] = {n: (checkpoint.entries[n].dtype, checkpoint.entries[n].shape) for n in kept}
        for item in chosen:
            chosen_storage = item.scheme.storage_for(item.linear.shape, storage)
            turned = storage == "dense" and item.linear.slot.transposed
            for local, (kind, shape) in item.scheme.state_spec(item.linear.shape, chosen_storage).items():
                specs[f"{item.linear.name}.{local}"] = (kind, shape[::-1] if turned else shape)
        shard = f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        units.append(
            Unit(
                index=index, block=block, shard=shard, kept=kept, compressed=chosen, tensors=specs,
                bytes=shard_bytes(specs, METADATA),
            )
        )  # fmt: skip
    return Layout(units=tuple(units), storage=storage)


def _check_mask(item: Compression, anatomy: Anatomy, assigned: Mapping[str, MatrixMethod]) -> None:
    """Raises RecipeError for a pattern that does not divide a weight, and for a tied matrix pruned on one side."""
    if not isinstance(item.scheme, MaskedScheme):
        return
    try:
        item.scheme.shape_of_mask.check_shape(item.linear.shape)
    except RecipeError as error:
        raise RecipeError(f"{item.linear.name}: {error}") from None
    sides = [linear.name for linear in (anatomy.embedding, anatomy.head) if linear is not None]
    if anatomy.tied and item.linear.name in sides and any(name not in assigned for name in sides):
        raise RecipeError(
            f"{' and '.join(sides)} are one matrix, and the recipe prunes one side of it: both would lose the weights. "
            "Name both, as in where: {role: [embedding, head]}, or leave it out"
        )


def compressions(anatomy: Anatomy, assigned: Mapping[str, MatrixMethod], dtype: str) -> list[Compression]:
    """Every linear that gets a method. Tied embeddings are one matrix: either name reaches it, the embedding's wins."""
    found: dict[str, Compression] = {}
    outside = [linear for linear in (anatomy.embedding, anatomy.head) if linear is not None]
    for candidate in [*anatomy.linears(), *outside]:
        linear = candidate
        method = assigned.get(linear.name)
        if method is None or linear.weight_name in found:
            continue
        if anatomy.tied and linear is anatomy.head and anatomy.embedding is not None:
            linear = anatomy.embedding  # the matrix is stored, and named, once
        found[linear.weight_name] = Compression(linear=linear, method=method, scheme=method.scheme(dtype))
    return _without_large_tuning(list(found.values()))


def _without_large_tuning(items: list[Compression]) -> list[Compression]:
    """The same, with the reason where a tuner is not for blocks as large as theirs."""
    sizes: dict[tuple[int | None, Tuner[Any]], int] = {}
    for item in items:
        if item.tuner is not None:
            key = (item.linear.block, item.tuner)
            sizes[key] = sizes.get(key, 0) + item.linear.parameters
    checked = []
    for item in items:
        most = None if item.tuner is None else item.tuner.most_weights
        size = 0 if item.tuner is None else sizes[item.linear.block, item.tuner]
        why = "" if most is None or size <= most else f"not tuned: {size:,} weights in the block, more than {most:,}"
        checked.append(replace(item, untuned=why))
    return checked
