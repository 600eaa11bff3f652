"""Which scheme each matrix is stored with: `quantization_config` ⇄ schemes, and reading a matrix back.

Two spellings in `config.json`:

- compressed-tensors (https://github.com/vllm-project/compressed-tensors), where the standard can say it: uniform
  grids, a scale per channel or per group of a size that divides the row, on `nn.Linear` modules. Such a folder loads
  with plain `transformers` and vLLM. Folders of other programs in this format are understood too (exact names, `re:`
  patterns, classes).
- `"quant_method": "fettle"` for everything else: a group size that does not divide the row, GPT-2's Conv1D, experts
  (transformers 5 holds them as 3-D parameters), routers, embeddings, non-uniform grids, remainders kept beside the
  codes. The tensors are stored the same way, and the schemes stand in the config.

transformers 5 *skips* a quantization method that it does not know and answers with random weights. The keys in
`_REFUSAL` prevent that: they lead it to parse our sentence as a dtype, which fails, with the sentence in the error. A
test proves it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from fettle.errors import CheckpointError, UsageError
from fettle.models.anatomy import Anatomy, Linear, unreadable
from fettle.models.checkpoint import Checkpoint, check_finite
from fettle.models.config_file import QUANTIZATION_KEYS, damaged
from fettle.models.masked_storage import MASK_NAMES, masked_obstacle, read_masked
from fettle.tensors.activations import Activations, InputQuantizer
from fettle.tensors.grid import uniform
from fettle.tensors.masked import MaskedScheme
from fettle.tensors.quantized import QuantizedTensor, stored_input_scale
from fettle.tensors.scheme import Scheme, Storage
from fettle.tensors.weights import CompressedWeight, WeightScheme, kernel_format, scheme_from_dict

STORAGES = get_args(Storage)
_REFUSAL = {
    "load_in_8bit": True,
    "bnb_4bit_compute_dtype": "this folder was written by fettle, and transformers cannot read it: use fettle.load",
}
_CODE_NAMES = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_levels", "weight_tensor_scale",
    "weight_sparse_values", "weight_sparse_columns", "weight_sparse_offsets",
    "weight_factor_left", "weight_factor_right",
    "input_scale", "input_zero_point",
)  # fmt: skip
_CLASSES = ("Linear", "Conv1D", "Embedding")  # a target by class; that it is stored as codes, the tensors say
_SCALE_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True)
class StoredScheme:
    """How one matrix lies on disk: its scheme, and its layout ("pack-quantized", "int-quantized" or "masked")."""

    scheme: WeightScheme
    storage: str


# ---- writing


def quantization_config(schemes: Mapping[str, WeightScheme], anatomy: Anatomy, storage: str) -> dict[str, Any]:
    """The `quantization_config` for these linears (by name): the standard's where it can say it, else ours."""
    if not schemes or storage == "dense":  # plain weights need no word
        return {}
    linears = {x.name: x for x in _every_linear(anatomy)}
    distinct = list(dict.fromkeys(schemes.values()))
    obstacles = [standard_obstacle(linears[name], scheme, anatomy, storage) for name, scheme in schemes.items()]
    if len(distinct) > 1 and any(scheme.zero_point for scheme in distinct):
        obstacles.append("transformers cannot load several schemes when one of them has zero points")
    if (obstacle := next(filter(None, obstacles), None)) is None:
        return _standard_config({n: s for n, s in schemes.items() if isinstance(s, Scheme)}, linears, anatomy, storage)
    return {
        "quant_method": "fettle",
        "version": 1,
        "storage": storage,
        "why": obstacle,
        "schemes": [scheme.to_dict() for scheme in distinct],
        "linears": {name: distinct.index(scheme) for name, scheme in schemes.items()},
        **_REFUSAL,
    }


def standard_obstacle(linear: Linear, scheme: WeightScheme, anatomy: Anatomy, storage: str) -> str | None:
    """Why compressed-tensors cannot say `scheme` for `linear`, in words; None if it can."""
    if isinstance(scheme, MaskedScheme):
        return masked_obstacle(linear.name)
    name, columns, group = linear.name, linear.shape[1], scheme.group_size or 1
    no_module = linear.slot.transposed or linear.slot.index is not None or linear.role in ("router", "embedding")
    beside = "" if scheme.remainder is None else scheme.remainder.describe()
    obstacles = (
        (not scheme.grid.is_uniform, f"the grid {scheme.grid.name} of {name} is not uniform"),
        (bool(beside), f"{name} keeps {beside} beside its codes"),
        (scheme.torch_scale_dtype.itemsize == 1, f"the integers of {name} have {scheme.scale_dtype} scales"),
        (
            storage == "int-quantized" and scheme.grid.bits != 8,
            f"int-quantized is for 8 bits, and {name} has {scheme.grid.bits}",
        ),
        (columns % group != 0, f"group size {group} does not divide the {columns} inputs of {name}"),
        (no_module, f"{name} is not an nn.Linear in transformers"),
        (linear.role == "head" and anatomy.tied, "the head is tied to the embedding"),
        (
            scheme.activations is not None and scheme.zero_point and storage == "pack-quantized",
            f"transformers cannot load packed zero points ({name}) and quantize inputs as well",
        ),
    )
    return next((why for holds, why in obstacles if holds), None)


def input_obstacle(linear: Linear) -> str | None:
    """Why the inputs of `linear` cannot be quantized, in words; None if they can."""
    if linear.block is None or linear.role == "router":
        return f"{linear.name} ({linear.role}) is no linear that fettle quantizes inputs for: those of blocks alone"
    if linear.slot.index is not None:
        return f"{linear.name} is a part of a parameter with all experts, and no module of its own"
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
    # The class is the shortest target, where a model has no nn.Linear but those of its blocks and the head.
    by_class = len(groups) == 1 and anatomy.causal and anatomy.family != "generic"
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": storage,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if by_class else targets,
                "weights": _weights_arguments(scheme),
                "input_activations": _inputs_arguments(scheme.activations),
                "output_activations": None,
                "format": storage,
            }
            for number, (scheme, targets) in enumerate(groups.items())
        },
        "ignore": _dense_modules(schemes, anatomy),
        "kv_cache_scheme": None,
    }
    if len(groups) == 1 and next(iter(groups)).activations is None:
        # transformers then decompresses while it loads. Without it, it expects packed zero points in the shape of
        # unpacked ones and stops, and a model saved in bfloat16 but loaded in float32 is decompressed with other
        # roundings. It takes one group's scheme for every linear, though, hence not with several (see
        # `quantization_config`), and it leaves the inputs as they are.
        config["dequantize"] = True
    return config


def _weights_arguments(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.grid.bits,
        "type": "int",
        "symmetric": not scheme.zero_point,
        "strategy": scheme.granularity,
        "group_size": scheme.group_size if scheme.granularity == "group" else None,
        "dynamic": False,
    }


def _inputs_arguments(activations: Activations | None) -> dict[str, Any] | None:
    if activations is None:
        return None
    return {
        "num_bits": activations.bits,
        "type": "int",
        "symmetric": not activations.zero_point,
        "strategy": activations.granularity,
        "group_size": None,
        "dynamic": activations.dynamic,
    }


def _dense_modules(schemes: Mapping[str, Scheme], anatomy: Anatomy) -> list[str]:
    """Modules that stay as they are: linears without a scheme, and whatever else has a weight outside the blocks."""
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
    coded = [linear for linear in _every_linear(anatomy) if is_stored_as_codes(checkpoint, linear)]
    try:
        if method == "fettle":
            found = _read_own(config, coded)
        else:
            found = {linear.name: _read_standard(checkpoint, config, linear) for linear in coded}
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
    storage, numbers = config["storage"], config["linears"]
    found = {}
    for linear in coded:
        scheme = schemes[numbers[linear.weight_name.removesuffix(".weight")]]
        scheme.check_storage(storage)
        found[linear.name] = StoredScheme(scheme, kernel_format(scheme, storage))
    return found


def _read_standard(checkpoint: Checkpoint, config: Mapping[str, Any], linear: Linear) -> StoredScheme:
    group = _find_group(config, linear)
    if group is None:
        raise CheckpointError(f"{linear.name} is stored as codes, but no config group of its folder targets it.")
    arguments, storage = group.get("weights") or {}, group.get("format") or config.get("format")
    storage = "int-quantized" if storage == "naive-quantized" else str(storage)
    bits, kind = arguments.get("num_bits", 8), arguments.get("type", "int")
    size = arguments.get("group_size")
    strategy: Any = arguments.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    known = storage in STORAGES and kind == "int" and strategy in ("tensor", "channel", "group") and bits in range(2, 9)
    if not known or f"{linear.name}.weight_g_idx" in checkpoint.entries:
        order = " with groups in activation order" if arguments.get("actorder") else ""
        raise CheckpointError(
            f"{linear.name} is stored as {storage}, {bits}-bit {kind}, strategy {strategy}{order}, which fettle does "
            f"not read. It reads {' and '.join(STORAGES)} integers of 2 to 8 bits, a scale per tensor, channel or "
            "group of neighbours. Give it the original model."
        )
    scale = checkpoint.entry(linear.weight_name.removesuffix(".weight") + ".weight_scale")
    if scale.dtype not in _SCALE_DTYPES:
        allowed = ", ".join(sorted(_SCALE_DTYPES.values()))
        raise CheckpointError(f"the scale of {linear.name} has dtype {scale.dtype}; fettle reads {allowed}.")
    scheme = Scheme(
        grid=uniform(bits),
        granularity=strategy,
        group_size=size if strategy == "group" else None,
        zero_point=not arguments.get("symmetric", True),
        scale_dtype=_SCALE_DTYPES[scale.dtype],
        activations=_read_inputs(group.get("input_activations"), linear),
    )
    scheme.validate()
    scheme.check_storage(storage)
    return StoredScheme(scheme, storage)


def _read_inputs(arguments: Mapping[str, Any] | None, linear: Linear) -> Activations | None:
    if not arguments:
        return None
    dynamic, strategy = arguments.get("dynamic", False), arguments.get("strategy") or "tensor"
    if arguments.get("type", "int") != "int" or strategy not in ("token", "tensor") or not isinstance(dynamic, bool):
        raise CheckpointError(
            f"the inputs of {linear.name} are quantized as {arguments.get('type')}, strategy {strategy}, dynamic "
            f"{dynamic}, which fettle does not read. It reads integers with a scale a token or a tensor. Give it the "
            "original model."
        )
    return Activations.from_dict(
        {
            "dynamic": dynamic, "bits": arguments.get("num_bits", 8), "granularity": strategy,
            "zero_point": not arguments.get("symmetric", True),
        }
    )  # fmt: skip


def _find_group(config: Mapping[str, Any], linear: Linear) -> Mapping[str, Any] | None:
    """The config group for `linear`: an exact name wins over a pattern, a pattern over a class."""
    names = {module_name(linear), linear.name}
    best: tuple[int, Mapping[str, Any]] | None = None
    for group in config.get("config_groups", {}).values():
        for target in group.get("targets", ()):
            rank = _match_rank(target, names)
            if rank is not None and (best is None or rank < best[0]):
                best = (rank, group)
    return None if best is None else best[1]


def _match_rank(target: str, names: set[str]) -> int | None:
    if target in names:
        return 0
    if target.startswith("re:"):
        return 1 if any(re.match(target[3:], name) for name in names) else None
    return 2 if target in _CLASSES else None


def read_quantized(checkpoint: Checkpoint, linear: Linear, stored: StoredScheme) -> CompressedWeight:
    """The codes, scales and zero points of `linear`; raises `NonFiniteError` for a scale that is NaN or infinite."""
    if isinstance(stored.scheme, MaskedScheme):
        return read_masked(checkpoint, linear, stored.scheme)
    stem = linear.weight_name.removesuffix(".weight")
    names = (*_CODE_NAMES, "weight") if stored.storage == "int-quantized" else _CODE_NAMES
    state = {name: checkpoint.read(f"{stem}.{name}") for name in names if f"{stem}.{name}" in checkpoint.entries}
    needed = {"weight" if stored.storage == "int-quantized" else "weight_packed"}
    needed.add("weight_levels" if stored.scheme.grid.is_learned else "weight_scale")
    if stored.scheme.zero_point:
        needed.add("weight_zero_point")
    if stored.scheme.has_tensor_scale:
        needed.add("weight_tensor_scale")
    beside = stored.scheme.remainder_spec(linear.shape)
    needed.update(beside)
    needed |= _input_names(stored.scheme)
    missing = sorted(needed - set(state))
    if missing:
        raise CheckpointError(
            f"{linear.name} is stored as codes, but tensors {[f'{stem}.{n}' for n in missing]} are missing."
        )
    remainders = (name for name, (dtype, _) in beside.items() if dtype.is_floating_point)
    for name in ("weight_scale", "weight_levels", "weight_tensor_scale", "input_scale", *remainders):
        if name in needed:
            check_finite(f"{stem}.{name}", state[name])
    try:
        quantized = QuantizedTensor.from_state(state, stored.scheme, stored.storage)
    except CheckpointError as error:
        raise CheckpointError(f"{linear.name} in {checkpoint.folder}: {error}") from error
    if quantized.shape != linear.shape:
        raise CheckpointError(
            f"{linear.name} is stored with shape {list(quantized.shape)}, expected {list(linear.shape)}."
        )
    return quantized


def _input_names(scheme: WeightScheme) -> set[str]:
    """The stored tensors that say how inputs are quantized."""
    return {name for name in scheme.state_spec((1, 1)) if name.startswith("input_")}


def read_input_quantizer(checkpoint: Checkpoint, linear: Linear, stored: StoredScheme | None) -> InputQuantizer | None:
    """What quantizes the inputs of `linear`, once `read_weight` found it sound; None where they stay."""
    if stored is None or stored.scheme.activations is None:
        return None
    stem = linear.weight_name.removesuffix(".weight")
    state = {name: checkpoint.read(f"{stem}.{name}") for name in _input_names(stored.scheme)}
    return InputQuantizer(activations=stored.scheme.activations, fixed=stored_input_scale(state, stored.scheme))


def read_weight(checkpoint: Checkpoint, linear: Linear, stored: StoredScheme | None = None) -> Tensor:
    """float32 [out, in] of `linear`, dequantized when stored as codes; raises `NonFiniteError` for NaN or infinity."""
    if stored is not None:
        return read_quantized(checkpoint, linear, stored).dequantize(torch.float32)
    weight = checkpoint.read(linear.weight_name)
    check_finite(linear.weight_name, weight)
    weight = weight.to(torch.float32)
    return weight.T.contiguous() if linear.slot.transposed else weight
