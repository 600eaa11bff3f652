"""`quantization_config` ⇄ the scheme and the storage of each linear, in the standard's words or in fettle's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fettle.errors import CheckpointError, UsageError
from fettle.models.anatomy import Anatomy, Linear, unreadable
from fettle.models.block_widths import WIDTHS_KEY
from fettle.models.checkpoint import Checkpoint
from fettle.models.config_file import QUANTIZATION_KEYS, damaged
from fettle.models.masked_storage import MASK_NAMES
from fettle.models.storage.modules import every_linear, input_obstacle
from fettle.models.storage.standard import (
    bfloat16_obstacle,
    decompressed_while_loading,
    read_standard,
    standard_config,
    standard_obstacle,
)
from fettle.tensors.scheme import Scheme
from fettle.tensors.weights import WeightScheme, scheme_from_dict

REFUSAL = {
    "load_in_8bit": True,
    "bnb_4bit_compute_dtype": "this folder was written by fettle, and transformers cannot read it: use fettle.load",
}


@dataclass(frozen=True)
class StoredScheme:
    """How one matrix lies on disk: its scheme, and the layout of its codes."""

    scheme: WeightScheme
    storage: str


def quantization_config(
    schemes: Mapping[str, WeightScheme],
    anatomy: Anatomy,
    storage: str,
    model_dtype: torch.dtype = torch.float32,
    *,
    why: str | None = None,
) -> dict[str, Any]:
    """The `quantization_config` for these linears (by name): the standard's where it can say it, else ours.

    `storage` is the recipe's: `Scheme.storage_for` says what becomes of it for small floats. `model_dtype` is the type
    of the tensors that stay as they are, in which loaders run the model. `why`: what else only fettle
    reads.
    """
    if not schemes or storage == "dense":  # plain weights need no word
        return {}
    linears = {linear.name: linear for linear in every_linear(anatomy)}
    distinct = list(dict.fromkeys(schemes.values()))
    obstacles = [why, *(standard_obstacle(linears[name], scheme, anatomy, storage) for name, scheme in schemes.items())]
    scalar = {name: scheme for name, scheme in schemes.items() if isinstance(scheme, Scheme)}
    if len(distinct) > 1 and any(scheme.zero_point for scheme in scalar.values()):
        obstacles.append("transformers cannot load several schemes when one of them has zero points")
    if not decompressed_while_loading(list(dict.fromkeys(scalar.values()))) and model_dtype != torch.bfloat16:
        obstacles += [bfloat16_obstacle(linears[name], scheme, storage) for name, scheme in scalar.items()]
    obstacle = next(filter(None, obstacles), None)
    if obstacle is None:
        return standard_config(scalar, linears, anatomy, storage)
    return {
        "quant_method": "fettle",
        "version": 2,
        "storage": storage,
        "why": obstacle,
        "schemes": [scheme.to_dict() for scheme in distinct],
        "linears": {name: distinct.index(scheme) for name, scheme in schemes.items()},
        **REFUSAL,
    }


def dense_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The `quantization_config` of a folder without codes that only fettle loads: blocks share matrices, or have
    widths of their own. Empty for an ordinary one.
    """
    reasons = []
    if checkpoint.shared:
        reasons.append("blocks share matrices that are stored once")
    if WIDTHS_KEY in checkpoint.config:
        reasons.append("blocks have widths of their own")
    if not reasons:
        return {}
    head = {"quant_method": "fettle", "version": 2, "storage": "dense", "why": " and ".join(reasons)}
    return {**head, "schemes": [], "linears": {}, "shared": dict(checkpoint.shared), **REFUSAL}


def stored_schemes(checkpoint: Checkpoint, anatomy: Anatomy) -> dict[str, StoredScheme]:
    """Linear name → how it is stored, for the linears stored as codes; dense ones are absent.

    Raises `CheckpointError` for a quantization that fettle cannot read, naming it and what it can, for one that is
    damaged, and for codes that no quantization explains: read as weights, they would be noise.
    """
    key = next((key for key in QUANTIZATION_KEYS if checkpoint.config.get(key)), None)
    config = checkpoint.config[key] if key else None
    _refuse_unexplained_codes(checkpoint, explained=bool(config))
    if not config:
        return {}
    method = config.get("quant_method", "compressed-tensors" if "config_groups" in config else None)
    if method not in ("fettle", "compressed-tensors"):
        raise unreadable(checkpoint, method)
    coded = [linear for linear in every_linear(anatomy) if is_stored_as_codes(checkpoint, linear)]
    try:
        if method == "fettle":
            found = _read_own(config, coded)
        else:
            found = {linear.name: StoredScheme(*read_standard(checkpoint, config, linear)) for linear in coded}
    except (UsageError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, re.error) as error:
        what = f"{type(error).__name__}: {error}" if not isinstance(error, UsageError) else str(error)
        raise damaged(checkpoint.folder / "config.json", f"its {key} cannot be understood ({what})") from error
    for linear in coded:
        obstacle = input_obstacle(linear) if found[linear.name].scheme.activations is not None else None
        if obstacle:
            raise CheckpointError(f"the inputs of {linear.name} are quantized, which fettle cannot run: {obstacle}.")
    return found


def _refuse_unexplained_codes(checkpoint: Checkpoint, *, explained: bool) -> None:
    """Raises `CheckpointError` for codes where the config names no scheme, and for whole numbers without a scale."""
    for name, entry in checkpoint.entries.items():
        stem, _, last = name.rpartition(".")
        if last in ("weight_packed", "weight_scale", *MASK_NAMES) and not explained:
            raise CheckpointError(
                f"tensor {name!r} holds codes or their scales, and config.json has no quantization_config that says "
                f"how to read them. Copy config.json again, or compress the model again. ({checkpoint.folder})"
            )
        dense = last in ("weight", "bias") and not entry.is_mask
        if dense and not entry.dtype.is_floating_point and f"{stem}.weight_scale" not in checkpoint.entries:
            raise CheckpointError(
                f"tensor {name!r} has dtype {str(entry.dtype).removeprefix('torch.')}, and no scale stands beside it: "
                f"whole numbers are no weights. Get a sound copy of the model. ({checkpoint.folder})"
            )


def is_stored_as_codes(checkpoint: Checkpoint, linear: Linear) -> bool:
    """Whether codes and scales of `linear` are on disk; a tied head belongs to its embedding."""
    stem = linear.weight_name.removesuffix(".weight")
    return any(f"{stem}.{name}" in checkpoint.entries for name in ("weight_scale", "weight_packed", *MASK_NAMES))


def _read_own(config: Mapping[str, Any], coded: list[Linear]) -> dict[str, StoredScheme]:
    schemes = dict(enumerate(scheme_from_dict(fields) for fields in config["schemes"]))
    preferred, numbers = config["storage"], config["linears"]
    found = {}
    for linear in coded:
        scheme = schemes[numbers[linear.weight_name.removesuffix(".weight")]]
        storage = scheme.storage_for(linear.shape, preferred)
        scheme.check_storage(storage)
        found[linear.name] = StoredScheme(scheme, storage)
    return found
