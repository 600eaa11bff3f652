"""Which scheme each matrix is stored with: `quantization_config` ⇄ schemes, and reading a matrix back.

Two spellings in `config.json`:

- compressed-tensors (https://github.com/vllm-project/compressed-tensors), where the standard can say it: uniform grids, a
  scale per channel or per group of a size that divides the row, on `nn.Linear` modules. Such a folder loads with plain
  `transformers` and vLLM. Folders of other programs in this format are understood too (exact names, `re:` patterns, classes).
- `"quant_method": "fettle"` for everything else: a group size that does not divide the row, GPT-2's Conv1D, experts
  (transformers 5 holds them as 3-D parameters), routers, embeddings, non-uniform grids. The tensors are stored the same
  way, and the schemes stand in the config.

transformers 5 *skips* a quantization method that it does not know and answers with random weights. The keys in `_REFUSAL`
prevent that: they lead it to parse our sentence as a dtype, which fails, with the sentence in the error. A test proves it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fettle.errors import CheckpointError
from fettle.models.anatomy import Anatomy, Linear
from fettle.models.checkpoint import Checkpoint, check_finite
from fettle.tensors.grid import uniform
from fettle.tensors.quantized import QuantizedTensor
from fettle.tensors.scheme import Granularity, Scheme

STORAGES = ("pack-quantized", "int-quantized")
_REFUSAL = {
    "load_in_8bit": True,
    "bnb_4bit_compute_dtype": "fettle wrote this folder and transformers cannot read it: open it with fettle.load(folder)",
}
_CODE_NAMES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
_SCALE_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True)
class StoredScheme:
    """How one matrix lies on disk: its scheme, and the layout of its codes ("pack-quantized" or "int-quantized")."""

    scheme: Scheme
    storage: str


# ---- writing


def quantization_config(schemes: Mapping[str, Scheme], anatomy: Anatomy, storage: str) -> dict[str, Any]:
    """`config.json`'s `quantization_config` for these linears (by name): the standard's where it can say it, else ours."""
    if not schemes:
        return {}
    linears = {linear.name: linear for linear in _every_linear(anatomy)}
    obstacle = next(
        filter(None, (standard_obstacle(linears[n], s, anatomy, storage) for n, s in schemes.items())), None
    )
    if obstacle is None:
        return _standard_config(schemes, linears, anatomy, storage)
    distinct = list(dict.fromkeys(schemes.values()))
    return {
        "quant_method": "fettle",
        "version": 1,
        "storage": storage,
        "why": obstacle,
        "schemes": [scheme.to_dict() for scheme in distinct],
        "linears": {name: distinct.index(scheme) for name, scheme in schemes.items()},
        **_REFUSAL,
    }


def standard_obstacle(linear: Linear, scheme: Scheme, anatomy: Anatomy, storage: str) -> str | None:
    """Why compressed-tensors cannot say `scheme` for `linear`, in words; None if it can."""
    if not scheme.grid.is_uniform:
        return f"the grid {scheme.grid.name} of {linear.name} is not uniform"
    if storage == "int-quantized" and scheme.grid.bits != 8:
        return f"int-quantized is for 8 bits, and {linear.name} has {scheme.grid.bits}"
    if scheme.granularity == "tensor":
        return f"one scale for the whole of {linear.name} cannot be packed"
    if scheme.granularity == "group" and linear.shape[1] % (scheme.group_size or 1):
        return f"group size {scheme.group_size} does not divide the {linear.shape[1]} inputs of {linear.name}"
    if linear.slot.transposed or linear.slot.index is not None or linear.role in ("router", "embedding"):
        return f"{linear.name} is not an nn.Linear in transformers"
    if linear.role == "head" and anatomy.tied:
        return "the head is tied to the embedding"
    return None


def _every_linear(anatomy: Anatomy) -> Iterable[Linear]:
    yield from anatomy.linears()
    yield from (linear for linear in (anatomy.embedding, anatomy.head) if linear is not None)


def module_name(linear: Linear) -> str:
    """The transformers module of a linear that is one: targets are matched against module names."""
    return linear.slot.parameter.removesuffix(".weight")


def _standard_config(
    schemes: Mapping[str, Scheme], linears: Mapping[str, Linear], anatomy: Anatomy, storage: str
) -> dict[str, Any]:
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(module_name(linears[name]))
    return {
        "quant_method": "compressed-tensors",
        "format": storage,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": targets if len(groups) > 1 else ["Linear"],
                "weights": _weights_arguments(scheme),
                "input_activations": None,
                "output_activations": None,
                "format": storage,
            }
            for number, (scheme, targets) in enumerate(groups.items())
        },
        "ignore": _dense_modules(schemes, anatomy),
        "kv_cache_scheme": None,
    }


def _weights_arguments(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.grid.bits,
        "type": "int",
        "symmetric": not scheme.zero_point,
        "strategy": scheme.granularity,
        "group_size": scheme.group_size if scheme.granularity == "group" else None,
        "dynamic": False,
    }


def _dense_modules(schemes: Mapping[str, Scheme], anatomy: Anatomy) -> list[str]:
    """Modules that stay as they are: every linear without a scheme, and whatever else has a weight outside the blocks."""
    kept = {
        module_name(linear)
        for linear in _every_linear(anatomy)
        if linear.name not in schemes and linear.slot.index is None
    }
    for name in anatomy.tensors:
        if name.endswith(".weight") and name.removesuffix(".weight") not in schemes:
            kept.add(anatomy.parameters[name].removesuffix(".weight"))
    return sorted(kept)


# ---- reading


def stored_schemes(checkpoint: Checkpoint, anatomy: Anatomy) -> dict[str, StoredScheme]:
    """Linear name → how it is stored, for the linears stored as codes; dense ones are absent.

    Raises `CheckpointError` for a quantization that fettle cannot read, naming it and what it can.
    """
    config = checkpoint.config.get("quantization_config") or checkpoint.config.get("compression_config")
    if not config:
        return {}
    method = config.get("quant_method", "compressed-tensors" if "config_groups" in config else None)
    coded = [linear for linear in _every_linear(anatomy) if is_stored_as_codes(checkpoint, linear)]
    if method == "fettle":
        return _read_own(checkpoint, config, coded)
    if method == "compressed-tensors":
        return {linear.name: _read_standard(checkpoint, config, linear) for linear in coded}
    raise CheckpointError(
        f"{checkpoint.folder} is quantized with {method!r}, which fettle does not read (it reads compressed-tensors with "
        f"{' or '.join(STORAGES)}, and its own). Give it the original model."
    )


def is_stored_as_codes(checkpoint: Checkpoint, linear: Linear) -> bool:
    """Whether codes and scales of `linear` are on disk; a tied head belongs to its embedding."""
    stem = linear.weight_name.removesuffix(".weight")
    return f"{stem}.weight_scale" in checkpoint.entries or f"{stem}.weight_packed" in checkpoint.entries


def _read_own(checkpoint: Checkpoint, config: Mapping[str, Any], coded: list[Linear]) -> dict[str, StoredScheme]:
    try:
        schemes = [Scheme.from_dict(fields) for fields in config["schemes"]]
        storage = str(config["storage"])
        chosen = {
            linear.name: schemes[config["linears"][linear.weight_name.removesuffix(".weight")]] for linear in coded
        }
    except (KeyError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'} is damaged: its fettle schemes lack {error}."
        ) from error
    return {name: StoredScheme(scheme, storage) for name, scheme in chosen.items()}


def _read_standard(checkpoint: Checkpoint, config: Mapping[str, Any], linear: Linear) -> StoredScheme:
    group = _find_group(config, linear)
    if group is None:
        raise CheckpointError(
            f"{linear.name} is stored as codes, but no config group of quantization_config targets it."
        )
    arguments, storage = group.get("weights") or {}, group.get("format") or config.get("format")
    if storage == "naive-quantized":
        storage = "int-quantized"
    strategy = arguments.get("strategy") or ("group" if arguments.get("group_size") else "tensor")
    grouped_order = any(
        n.endswith(".weight_g_idx") for n in (f"{linear.name}.weight_g_idx",) if n in checkpoint.entries
    )
    if (
        storage not in STORAGES
        or arguments.get("type", "int") != "int"
        or strategy not in ("tensor", "channel", "group")
    ):
        raise CheckpointError(
            f"{linear.name} is stored as {storage}, {arguments.get('type')}, strategy {strategy}, which fettle does not read "
            f"(it reads {' and '.join(STORAGES)} integers per tensor, channel or group). Give it the original model."
        )
    if grouped_order:
        raise CheckpointError(
            f"{linear.name} has groups in activation order (weight_g_idx), which fettle does not read."
        )
    scale = checkpoint.entry(linear.weight_name.removesuffix(".weight") + ".weight_scale")
    if scale.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"the scale of {linear.name} has dtype {scale.dtype}; fettle reads {sorted(_SCALE_DTYPES.values())}."
        )
    granularity: Granularity = strategy
    scheme = Scheme(
        grid=uniform(int(arguments.get("num_bits", 8))),
        granularity=granularity,
        group_size=int(arguments["group_size"]) if strategy == "group" else None,
        zero_point=not arguments.get("symmetric", True),
        scale_dtype=_SCALE_DTYPES[scale.dtype],
    )
    return StoredScheme(scheme, storage)


def _find_group(config: Mapping[str, Any], linear: Linear) -> Mapping[str, Any] | None:
    """The config group for `linear`: an exact name wins over a pattern, a pattern over a class, as the standard says."""
    names = {module_name(linear), linear.name}
    groups = [group for group in config.get("config_groups", {}).values() if isinstance(group, dict)]
    for matches in (
        lambda target: target in names,
        lambda target: target.startswith("re:") and any(re.match(target[3:], name) for name in names),
        lambda target: target in ("Linear", "Conv1D", "Embedding"),
    ):
        for group in groups:
            if any(matches(target) for target in group.get("targets", ())):
                return group
    return None


def read_quantized(checkpoint: Checkpoint, linear: Linear, stored: StoredScheme) -> QuantizedTensor:
    """The codes, scales and zero points of `linear`; raises `NonFiniteError` for a scale that is NaN or infinite."""
    stem = linear.weight_name.removesuffix(".weight")
    names = (*_CODE_NAMES, "weight") if stored.storage == "int-quantized" else _CODE_NAMES
    state = {name: checkpoint.read(f"{stem}.{name}") for name in names if f"{stem}.{name}" in checkpoint.entries}
    needed = {"weight_scale", "weight" if stored.storage == "int-quantized" else "weight_packed"}
    if stored.scheme.zero_point:
        needed.add("weight_zero_point")
    missing = sorted(needed - set(state))
    if missing:
        raise CheckpointError(
            f"{linear.name} is stored as codes, but tensors {[f'{stem}.{n}' for n in missing]} are missing."
        )
    check_finite(f"{stem}.weight_scale", state["weight_scale"])
    return QuantizedTensor.from_state(state, stored.scheme, stored.storage)


def read_weight(checkpoint: Checkpoint, linear: Linear, stored: StoredScheme | None = None) -> Tensor:
    """float32 [out, in] of `linear`, dequantized when stored as codes; raises `NonFiniteError` for NaN or infinity."""
    if stored is not None:
        return read_quantized(checkpoint, linear, stored).dequantize(torch.float32)
    weight = checkpoint.read(linear.weight_name)
    check_finite(linear.weight_name, weight)
    weight = weight.to(torch.float32)
    return weight.T.contiguous() if linear.slot.transposed else weight
