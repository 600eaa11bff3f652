"""Bytes and bits of a written model, counted from the headers of its files: no tensor is read.

Two numbers, because one of them always flatters:

    bits_per_weight        8 · (codes + scales + zero points + shape tensors) / weights of the linears stored as codes
    model_bits_per_weight  8 · bytes of every tensor in the files / parameters of the whole model

A matrix that several names share (a tied head, tied blocks) counts once. Old checkpoints carry buffers beside the
parameters (causal masks, rotary frequencies, position ids): their bytes are stored, so they count as bytes; they are no
parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fettle.models.anatomy import Anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.storage import stored_schemes


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a model's files hold."""

    bytes: int  # length of the safetensors files
    tensor_bytes: int
    parameters: int  # a tied matrix counts once
    bits_per_weight: float | None  # over the linears stored as codes; None where there are none
    model_bits_per_weight: float


def measure_size(checkpoint: Checkpoint, anatomy: Anatomy) -> Size:
    """Counts everything stored: codes, scales, zero points, shapes."""
    stored = stored_schemes(checkpoint, anatomy)
    outside = [linear for linear in (anatomy.embedding, anatomy.head) if linear is not None]
    compressed = {linear.name: linear for linear in [*anatomy.linears(), *outside] if linear.name in stored}
    of_module: dict[str, list[str]] = {}
    for name in checkpoint.entries:
        module, _, last = name.rpartition(".")
        if last != "bias":
            of_module.setdefault(module, []).append(name)
    code_bytes, code_weights = 0, 0
    covered: set[str] = set()
    for linear in compressed.values():
        names = of_module.get(linear.name, [])
        if not names:
            continue  # the other name of a tied matrix
        covered.update(names)
        code_bytes += sum(checkpoint.entries[name].nbytes for name in names)
        code_weights += linear.shape[0] * linear.shape[1]
    dense = sum(
        math.prod(entry.shape)
        for name, entry in checkpoint.entries.items()
        if name not in covered and name not in checkpoint.shared and not entry.is_buffer
    )
    tensor_bytes = sum(entry.nbytes for entry in checkpoint.entries.values())
    return Size(
        bytes=sum((checkpoint.folder / shard).stat().st_size for shard in checkpoint.shards),
        tensor_bytes=tensor_bytes,
        parameters=dense + code_weights,
        bits_per_weight=8 * code_bytes / code_weights if code_weights else None,
        model_bits_per_weight=8 * tensor_bytes / (dense + code_weights),
    )
