"""Rescaling a loaded block before its linears are compressed: the same function, with weights that round better.

    for each feed of the block (a norm, or rows of a linear, and all linears that read it):
        statistics of those inputs → the method's rescaler → s, one factor a channel
        norm, or rows, and bias   divided by s
        columns of the readers    multiplied by s

Factors are chosen for all feeds of a block from the block as it was loaded, and then moved. Norms and biases stay in
the checkpoint's own type. A norm's quotient is rounded to it first, and s is what the stored norm says: the columns get
exactly what the norm lost. A bias is rounded, too, and nothing makes up for that: half a unit in the last place of its
type. The weights of a feeding linear are divided in float32 and then compressed; one that is kept would have to be
rounded, so such a feed is left alone.

What is left alone is said in the ledger, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fettle.errors import NonFiniteError
from fettle.methods.protocols import Rescaler
from fettle.models.checkpoint import check_finite
from fettle.models.parts import Feed, Linear
from fettle.pipeline.layout import Unit
from fettle.pipeline.stream import Job, Seen, Stream


@dataclass(frozen=True, kw_only=True)
class Rescaled:
    """What became of a block's feeds."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # norms and biases to write instead of the base's
    notes: dict[str, str] = field(default_factory=dict)  # linear → what was done to its inputs, or why nothing


@dataclass(frozen=True, kw_only=True)
class _Group:
    """A feed that is rescaled."""

    feed: Feed
    readers: tuple[Linear, ...]
    rescaler: Rescaler


def rescale_block(job: Job, unit: Unit, stream: Stream) -> Rescaled:
    """Rescales the loaded block of `stream` as the methods of its linears choose; does nothing where none does.

    Raises:
        NonFiniteError: NaN or infinity in a weight or a norm.
    """
    assert unit.block is not None
    rescaled = Rescaled()
    groups = _groups(job, unit, rescaled.notes)
    if not groups:
        return rescaled
    asked = [(reader, group.rescaler.statistics) for group in groups for reader in group.readers]
    statistics = stream.collect(unit.block, asked)
    chosen = job.workers.map(lambda group: _choose(job, stream, group, statistics), groups)
    for group, factors in zip(groups, chosen, strict=True):
        if factors is None:
            note = f"inputs not rescaled: {statistics[group.feed.input_group].note}"
        else:
            moved, tensors = move(job, stream, unit.block, group.feed, group.readers, factors)
            rescaled.tensors.update(tensors)
            note = f"inputs rescaled by {float(moved.min()):.3g} to {float(moved.max()):.3g}"
        rescaled.notes.update({reader.name: note for reader in group.readers})
    return rescaled


def _groups(job: Job, unit: Unit, notes: dict[str, str]) -> list[_Group]:
    """The feeds that are rescaled; says of every other linear with a rescaler why not."""
    assert unit.block is not None
    block = job.anatomy.blocks[unit.block]
    items = {item.linear.name: item for item in unit.compressed}
    groups: list[_Group] = []
    for name, item in items.items():
        if item.rescaler is not None:
            notes[name] = "inputs not rescaled: nothing is known to feed it that could be divided"
    if not notes:
        return groups
    for feed in block.feeds:
        readers = tuple(linear for linear in block.linears if linear.input_group == feed.input_group)
        rescalers = {items[reader.name].rescaler if reader.name in items else None for reader in readers}
        rescaler = next(iter(rescalers)) if len(rescalers) == 1 else None
        if rescaler is not None and (feed.linear is None or feed.linear.name in items):
            groups.append(_Group(feed=feed, readers=readers, rescaler=rescaler))
            continue
        reason = "linears that read the same are not compressed alike"
        if rescaler is not None:
            reason = f"{feed.weight_name} feeds it and is not compressed"
        notes.update({r.name: f"inputs not rescaled: {reason}" for r in readers if r.name in notes})
    return groups


def _choose(job: Job, stream: Stream, group: _Group, statistics: dict[str, Seen]) -> Tensor | None:
    """Factors of the channels, float32; None where too little was seen to choose any."""
    seen = statistics[group.feed.input_group]
    if seen.neutral:
        return None
    weights = [stream.checked_weight(reader) for reader in group.readers]
    channels = torch.tensor(group.feed.channels(weights[0].shape[1]))
    dtype = str(job.checkpoint.dtype).removeprefix("torch.")
    try:
        return group.rescaler.factors(weights, seen.statistics, channels, dtype=dtype)
    except NonFiniteError as found:
        raise NonFiniteError(f"{', '.join(reader.weight_name for reader in group.readers)}: {found}") from found


def move(
    job: Job, stream: Stream, block: int, feed: Feed, readers: tuple[Linear, ...], factors: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Divides a feed of the loaded block by factors [channels] and multiplies its readers' columns.

    Returns:
        the factors that were moved, and the norm and bias as they are to be written.
    """
    skeleton = stream.skeleton
    bias = None if feed.bias_name is None else _vector(job, feed.bias_name)
    if feed.linear is None:
        norm = _vector(job, feed.weight_name)
        factors, stored, bias = divide_norm(norm, bias, factors, feed.offset)
        tensors = {feed.weight_name: stored}
    else:
        rows, tensors = torch.tensor(feed.source_rows(feed.linear.shape[0])), {}
        factors, bias = _divide_bias(bias, rows, factors)
        weight = skeleton.weight(feed.linear)
        weight[rows.to(weight.device)] /= factors.to(weight.device).unsqueeze(1)
        skeleton.set_weight_(feed.linear, weight)
    if feed.bias_name is not None and bias is not None:
        tensors[feed.bias_name] = bias
    for name, values in tensors.items():
        skeleton.set_vector_(block, name, values)
    columns = factors[torch.tensor(feed.channels(readers[0].shape[1]))]
    for reader in readers:
        weight = skeleton.weight(reader)
        skeleton.set_weight_(reader, weight.mul_(columns.to(weight.device)))
    stream.factors[feed.input_group] = columns
    return factors, tensors


def divide_norm(
    norm: Tensor, bias: Tensor | None, factors: Tensor, offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A norm (it multiplies by offset + norm) and its bias divided by factors [channels], each in its own type.

    Returns:
        the factors by which the stored norm differs from what it was, the norm, the bias. Where the type cannot hold a
        quotient, the factor is 1.
    """
    multiplier = offset + norm.float()
    stored = (multiplier / factors - offset).to(norm.dtype)
    held = offset + stored.float()
    moved = torch.where(multiplier == held, torch.where(multiplier == 0, factors, 1.0), multiplier / held)
    usable = torch.isfinite(held) & torch.isfinite(moved) & (moved > 0)
    if bias is not None:
        usable &= torch.isfinite((bias.float() / moved).to(bias.dtype))
    moved = torch.where(usable, moved, 1.0)
    divided = None if bias is None else torch.where(usable, bias.float() / moved, bias.float()).to(bias.dtype)
    return moved, torch.where(usable, stored, norm), divided


def _divide_bias(bias: Tensor | None, rows: Tensor, factors: Tensor) -> tuple[Tensor, Tensor | None]:
    """The bias with its rows divided, in its own type; the factor is 1 where that cannot hold a quotient."""
    if bias is None:
        return factors, None
    usable = torch.isfinite((bias[rows].float() / factors).to(bias.dtype))
    factors = torch.where(usable, factors, 1.0)
    divided = bias.clone()
    divided[rows] = (bias[rows].float() / factors).to(bias.dtype)
    return factors, divided


def _vector(job: Job, name: str) -> Tensor:
    vector = job.checkpoint.read(name)
    check_finite(name, vector)
    return vector
