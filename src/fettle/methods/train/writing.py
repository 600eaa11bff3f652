"""A trained model in memory → a checkpoint folder: dense where it is dense, codes where its linears ended as codes.

One shard a block and one for what stands outside, each written atomically; config, index and side files after them, and
`fettle.json`, with the SHA-256 of every tensor, last: a folder without it is not finished. Dense tensors get the type
that they had in the base; so what was trained in float32 is rounded once more, and what counts is measured on files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fettle
from fettle.models.anatomy import Anatomy
from fettle.models.checkpoint import Checkpoint, check_finite
from fettle.models.config_file import QUANTIZATION_KEYS
from fettle.models.module_tree import parameter_of, part_of
from fettle.models.parts import CODE_SUFFIXES, Linear
from fettle.models.storage import dense_config, is_stored_as_codes, quantization_config
from fettle.models.writer import copy_side_files, write_index, write_json, write_shard
from fettle.tensors.weights import CompressedWeight

MARKER = "fettle.json"
BEGUN_AFRESH = "begun_afresh"  # in it: random weights came between it and the model that it is called after
METADATA = {"format": "pt"}


def write_trained(
    tree: nn.Module, base: Checkpoint, anatomy: Anatomy, output: Path, record: Mapping[str, Any],
    *, codes: Mapping[str, CompressedWeight] | None = None, storage: str = "pack-quantized",
) -> None:  # fmt: skip
    """Writes `tree`, which was made from `base`, to `output`.

    Args:
        tree: the transformers model; its parameters stand where `anatomy` says.
        base: the checkpoint that it was loaded from, compressed or not.
        anatomy: of both.
        output: the folder.
        record: what `fettle.json` says beside the hashes.
        codes: linear's name → its codes; all other linears are written dense.
        storage: how the codes lie.

    Raises:
        NonFiniteError: training left NaN or infinity; names the tensor.
    """
    codes = codes or {}
    output.mkdir(parents=True, exist_ok=True)
    units = [(block.tensors, block.linears) for block in anatomy.blocks]
    outside = [linear for linear in (anatomy.embedding, anatomy.head) if linear is not None]
    units.append((anatomy.tensors, tuple(outside[:1] if anatomy.tied else outside)))
    files, digests, shard_of, total = {}, {}, {}, 0
    for number, (names, linears) in enumerate(units, start=1):
        shard = f"model-{number:05d}-of-{len(units):05d}.safetensors"
        tensors = dict(_unit(tree, base, anatomy, (names, linears), codes, storage))
        for name, tensor in tensors.items():
            check_finite(name, tensor)
            digests[name] = sha256(_raw(tensor)).hexdigest()
            shard_of[name] = shard
            total += tensor.numel() * tensor.dtype.itemsize
        files[shard] = write_shard(output, shard, tensors, METADATA)
    config = {key: value for key, value in base.config.items() if key not in QUANTIZATION_KEYS}
    schemes = {name: quantized.scheme for name, quantized in codes.items()}
    found = quantization_config(schemes, anatomy, storage, base.dtype)
    found = found or dense_config(replace(base, shared={}))  # here every matrix is written out
    if found:
        config["quantization_config"] = found
    write_index(output, shard_of, total)
    copy_side_files(base.folder, output)
    write_json(output / "config.json", config)
    hashes = {"files": files, "tensors": dict(sorted(digests.items()))}
    written: dict[str, Any] = {
        "schema": 1,
        "fettle_version": fettle.__version__,
        "generic": anatomy.family == "generic",
    }
    if (base.record or {}).get("reshaped"):  # has other blocks or widths than what it was made from
        written["reshaped"] = True
    if (base.record or {}).get(BEGUN_AFRESH):
        written[BEGUN_AFRESH] = True
    write_json(output / MARKER, {**written, "causal": anatomy.causal, **record, **hashes})


def _unit(
    tree: nn.Module, base: Checkpoint, anatomy: Anatomy, unit: tuple[tuple[str, ...], tuple[Linear, ...]],
    codes: Mapping[str, CompressedWeight], storage: str,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """The tensors of one shard."""
    names, linears = unit
    owned: set[str] = set()
    for linear in linears:
        stem = linear.weight_name.removesuffix(".weight")
        owned |= {f"{stem}{suffix}" for suffix in (*CODE_SUFFIXES, ".weight")}
        if linear.name in codes:
            found = codes[linear.name]
            state = found.to_state(found.scheme.storage_for(found.shape, storage))
            yield from ((f"{stem}.{local}", tensor.cpu()) for local, tensor in state.items())
            continue
        dtype = base.dtype if is_stored_as_codes(base, linear) else base.entry(linear.weight_name).dtype
        held = parameter_of(tree, linear.slot.parameter)
        assert held is not None, linear.slot
        weight = part_of(held.detach(), linear)  # [out, in]
        yield linear.weight_name, (weight.T if linear.slot.transposed else weight).to(dtype).contiguous().cpu()
    for name in names:
        if name in owned:
            continue
        held = parameter_of(tree, anatomy.parameters[name])
        stored = base.read(name)
        yield name, stored if held is None else held.detach().to(stored.dtype).contiguous().cpu()


def _raw(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
