"""The one layer walk: read a block, collect what its methods declared, call them, write, run on, free.

    for each unit (a block, then what stands outside):
        load        the block's tensors, from the base's shards
        rescale     move factors between what feeds linears and the linears, where their methods choose any
        collect     the statistics that the methods of its linears declare, on inputs that already passed the
                    compressed blocks before
        compress    each linear: method(weight, statistics) → codes, independent linears side by side
        swap        the compressed weight into the block
        run         the windows through the compressed block: the next block's inputs
        write       the shard, the inputs, one journal line, durably and in this order

The walk never asks which method it runs: a method says what it needs, and the loop collects that. With
`order: in_turn` the linears of a block are compressed in the order in which data meets them (query, key and value;
output; gate and up; down), each group on inputs from the already compressed group before it: one more pass through the
block for each group. With `together` all statistics come from one pass.

Memory: one block in float32, its statistics, and the hidden states of the windows. Every floating-point sum has one
order for any number of threads (`workers`), and nothing here depends on time or chance, so the same recipe writes the
same bytes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from fettle.models.anatomy import Linear
from fettle.models.checkpoint import check_finite
from fettle.models.writer import write_shard
from fettle.pipeline.block_objective import BlockObjective
from fettle.pipeline.fused import fused_maxima, with_maximum
from fettle.pipeline.journal import Journal, LedgerLine, ShardRecord
from fettle.pipeline.layout import METADATA, Compression, Unit
from fettle.pipeline.rescaling import rescale_block
from fettle.pipeline.stream import Job, Outcome, Seen, Stream, compress_linear, renewed
from fettle.progress import Progress


def walk(job: Job, output: Path, journal: Journal, progress: Progress, *, last_unit: int | None = None) -> None:
    """Compresses and writes every unit that `journal` does not have yet.

    Args:
        last_unit: stop after this unit (the plan runs one); None for all.

    Raises:
        NonFiniteError: a weight, an activation or a scale is NaN or infinite; names tensor and block.
        DiskFullError: a shard does not fit; what is written stays, and the run resumes once there is room.
    """
    first = len(journal.records(output))
    inputs = journal.load_inputs(first) if 0 < first <= job.last_data_unit else None
    if inputs is None and 0 < first <= job.last_data_unit:
        first = 0  # somebody removed the kept inputs: only the start of the model is known again
    units = job.layout.units[first : None if last_unit is None else last_unit + 1]
    stream: Stream | None = None
    with job.workers, torch.no_grad(), progress.task("compressing", len(job.layout.units)) as task:
        task.advance(first)
        journal.keep(first, output)
        if first <= job.last_data_unit and units:
            stream = Stream(job, inputs)
        for unit in units:
            started = time.monotonic()
            if stream is not None and unit.index > job.last_data_unit:
                stream = None  # no later method looks at data: stop running the windows
            tensors, lines = _compress_unit(job, unit, stream)
            digests = {name: sha256(_raw_bytes(tensor)).hexdigest() for name, tensor in sorted(tensors.items())}
            digest = write_shard(output, unit.shard, tensors, METADATA)
            del tensors
            if stream is not None and unit.index < job.last_data_unit:  # kept before the journal says so
                journal.save_inputs(unit.index + 1, stream.state)
            journal.append(
                ShardRecord(
                    unit=unit.index, shard=unit.shard, sha256=digest, bytes=unit.bytes, tensors=digests,
                    ledger=[line.deterministic() | {"seconds": line.seconds} for line in lines],
                    seconds=time.monotonic() - started,
                )
            )  # fmt: skip
            journal.drop_inputs(before=unit.index + 1)
            task.advance()


def _compress_unit(job: Job, unit: Unit, stream: Stream | None) -> tuple[dict[str, Tensor], list[LedgerLine]]:
    """The tensors of one shard, and a ledger line for each linear in it."""
    tensors = {name: _kept_tensor(job, name) for name in unit.kept}
    if unit.block is not None and stream is not None:
        outcomes, changed = _compress_block(job, unit, stream)
        tensors |= changed
    else:
        inputs = stream.outside_statistics(unit) if stream is not None else {}
        maxima = fused_maxima(unit.compressed, partial(_checked_weight, job))

        def one(item: Compression) -> Outcome:
            name = item.linear.name
            return compress_linear(
                item, _checked_weight(job, item.linear), with_maximum(inputs.get(name), name, maxima), job
            )

        outcomes = job.workers.map(one, unit.compressed)
    transposed = {item.linear.name for item in unit.compressed if item.linear.slot.transposed}
    for outcome in outcomes:
        name = outcome.line.linear
        storage = outcome.quantized.scheme.storage_for(outcome.quantized.shape, job.layout.storage)
        for local, tensor in outcome.quantized.to_state(storage).items():
            turned = storage == "dense" and name in transposed
            tensors[f"{name}.{local}"] = tensor.T.contiguous() if turned else tensor
    return tensors, [outcome.line for outcome in outcomes]


def _compress_block(job: Job, unit: Unit, stream: Stream) -> tuple[list[Outcome], dict[str, Tensor]]:
    """What became of each linear, and the kept tensors that are not the base's any more."""
    assert unit.block is not None
    stream.load_block(unit.block)
    rescaled = rescale_block(job, unit, stream)
    outcomes: list[Outcome] = []
    originals = {c.linear.name: stream.checked_weight(c.linear) for c in unit.compressed if c.tuner is not None}
    stages = _stages(unit.compressed, job)
    if not stages:
        stream.leave_original(unit.block)
    gradients = stream.gradients(unit.block)
    for stage in stages:
        statistics = stream.collect(unit.block, [(item.linear, item.statistics) for item in stage])
        if stage is stages[-1]:  # the last linears are often the largest: their solver wants the memory
            stream.leave_original(unit.block)
        maxima = fused_maxima(stage, stream.checked_weight)
        solved = job.workers.map(partial(_solve, job, stream, statistics, gradients, maxima), stage)
        for item, outcome in zip(stage, solved, strict=True):
            stream.skeleton.set_weight_(item.linear, outcome.quantized.dequantize())
            stream.skeleton.set_inputs_(item.linear, outcome.quantized.input_quantizer)
        outcomes.extend(solved)
    outcomes = _tune_block(job, unit, stream, outcomes, originals)
    if unit.index < job.last_data_unit:
        stream.run_on(unit.block)
    stream.free_block(unit.block)
    return [_noted(outcome, rescaled.notes.get(outcome.line.linear, "")) for outcome in outcomes], rescaled.tensors


def _noted(outcome: Outcome, note: str) -> Outcome:
    together = "; ".join(part for part in (outcome.line.note, note) if part)
    return replace(outcome, line=replace(outcome.line, note=together))


def _tune_block(
    job: Job, unit: Unit, stream: Stream, outcomes: list[Outcome], originals: Mapping[str, Tensor]
) -> list[Outcome]:
    """Outcomes with the codes that the methods' tuners make of them; linears with equal tuners are tuned together."""
    assert unit.block is not None
    items = {item.linear.name: item for item in unit.compressed if item.linear.name in originals}
    found = {outcome.line.linear: outcome for outcome in outcomes}
    windows = list(zip(stream.hidden, stream.original, strict=True)) if items else []
    for tuner in dict.fromkeys(item.tuner for item in items.values()):
        names = [name for name, item in items.items() if item.tuner == tuner]
        if tuner is None or not windows:
            continue
        started = time.monotonic()
        linears = {name: items[name].linear for name in names}
        objective = BlockObjective(stream.skeleton, unit.block, linears, windows, job.workers)
        start = {name: found[name].quantized for name in names}
        tuned = tuner.tune(start, {name: originals[name] for name in names}, objective)
        seconds = (time.monotonic() - started) / len(names)
        for name, quantized in tuned.items():
            stream.skeleton.set_weight_(linears[name], quantized.dequantize())
            found[name] = renewed(found[name], quantized, originals[name], seconds)
    return list(found.values())


def _solve(
    job: Job,
    stream: Stream,
    seen: Mapping[str, Seen],
    gradients: Mapping[str, Tensor],
    maxima: Mapping[str, Tensor],
    item: Compression,
) -> Outcome:
    weight, known = stream.checked_weight(item.linear), seen.get(item.linear.input_group)
    if item.wants_gradient:
        own = {"gradient": gradients[item.linear.name]}
        known = Seen(statistics=own, tokens=0) if known is None else replace(known, statistics=known.statistics | own)
    return compress_linear(item, weight, with_maximum(known, item.linear.name, maxima), job)


def _stages(compressed: tuple[Compression, ...], job: Job) -> list[list[Compression]]:
    """The linears of a block in the order in which data meets them, those that read the same inputs together.

    In what order an unknown family's linears are met nobody says: they are taken together.
    """
    if job.order == "together" or job.anatomy.family == "generic":
        return [list(compressed)]
    stages: dict[str, list[Compression]] = {}
    for item in compressed:
        group = item.linear.input_group
        if item.linear.expert is not None:  # all experts at once: what one reads does not pass another
            group = re.sub(rf"\b{item.linear.expert}\b(?!.*\b{item.linear.expert}\b)", "*", group)
        stages.setdefault(group, []).append(item)
    return list(stages.values())


def _kept_tensor(job: Job, name: str) -> Tensor:
    tensor = job.checkpoint.read(name)
    if not job.checkpoint.entries[name].is_buffer:  # a mask may hold -inf: no block reads it
        check_finite(name, tensor)
    return tensor


def _checked_weight(job: Job, linear: Linear) -> Tensor:
    weight = job.checkpoint.read(linear.weight_name)
    check_finite(linear.weight_name, weight)
    return (weight.T if linear.slot.transposed else weight).float().contiguous()


def _raw_bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
