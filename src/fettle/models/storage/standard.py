"""What compressed-tensors can say, in both directions: schemes → config groups, config groups → schemes.

    format                 weights                                     scale
    pack-quantized         integers of 2 to 8 bits                     a tensor, a channel, a group
    int-quantized          integers of 8 bits                          the same
    float-quantized        e4m3 (FP8)                                  the same
    mxfp8-quantized        e4m3                                        e8m0, groups of 32
    mxfp4-pack-quantized   e2m1                                        e8m0, groups of 32
    nvfp4-pack-quantized   e2m1                                        e4m3, groups of 16, and one float32

The standard's names of the last three are the presets MXFP8A16, MXFP4A16 and NVFP4A16, and with inputs in the same
floats MXFP8, MXFP4 and NVFP4; tests compare the words of each with the presets, and the tensors with the standard's own
compressors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch

from fettle.errors import CheckpointError
from fettle.models.anatomy import Anatomy, Linear
from fettle.models.checkpoint import Checkpoint
from fettle.models.masked_storage import masked_obstacle
from fettle.models.storage.modules import every_linear, module_name
from fettle.tensors.activations import GROUP_SIZES, Activations
from fettle.tensors.grid import Grid, uniform
from fettle.tensors.masked import MaskedScheme
from fettle.tensors.scheme import Granularity, Scheme
from fettle.tensors.storages import FLOAT4, FLOAT8, PACKED_FLOATS, Storage
from fettle.tensors.weights import WeightScheme

STORAGES = get_args(Storage)
MIXED = "mixed-precision"
_CLASSES = ("Linear", "Conv1D", "Embedding")  # a target by class; that it is stored as codes, the tensors say
_SCALE_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
INPUT_GROUPS = {  # granularity of inputs → the storages of weights that they go with, and the type of their scales
    "group": (("mxfp4-pack-quantized", "mxfp8-quantized"), torch.uint8),
    "tensor_group": (("nvfp4-pack-quantized",), torch.float8_e4m3fn),
}
OWN_SCALES = {  # format → the type that its scales are stored in, the one that they mean, and the size of its groups
    "mxfp8-quantized": (torch.uint8, "float8_e8m0fnu", 32),
    "mxfp4-pack-quantized": (torch.uint8, "float8_e8m0fnu", 32),
    "nvfp4-pack-quantized": (torch.float8_e4m3fn, "float8_e4m3fn", 16),
}


# ---- writing


def standard_obstacle(linear: Linear, scheme: WeightScheme, anatomy: Anatomy, storage: str) -> str | None:
    """Why compressed-tensors cannot say `scheme` for `linear`, in words; None if it can."""
    if isinstance(scheme, MaskedScheme):
        return masked_obstacle(linear.name)
    if not isinstance(scheme, Scheme):
        return f"a code of {linear.name} stands for eight weights at once"
    name, columns, group = linear.name, linear.shape[1], scheme.group_size or 1
    no_module = linear.slot.transposed or linear.slot.index is not None or linear.role in ("router", "embedding")
    beside = "" if scheme.remainder is None else scheme.remainder.describe()
    storage = scheme.storage_for(linear.shape, storage)
    own = scheme.float_storage is not None
    codes = f"{scheme.grid.bits}-bit {scheme.grid.name} codes"
    obstacles = (
        (not (own or scheme.grid.is_uniform), f"the standard has no format for the {codes} of {name}"),
        (bool(beside), f"{name} keeps {beside} beside its codes"),
        (
            not own and scheme.torch_scale_dtype.itemsize == 1,
            f"the standard has no format for {codes} with {scheme.scale_dtype} scales ({name})",
        ),
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
        (
            scheme.activations is not None
            and scheme.activations.granularity in INPUT_GROUPS
            and storage not in INPUT_GROUPS[scheme.activations.granularity][0],
            f"the standard's inputs with a scale for each group ({name}) go with weights of the same format, MX or NV",
        ),
        (
            scheme.activations is not None and scheme.activations.outliers > 0,
            f"the standard has no word for inputs that are kept apart ({name})",
        ),
    )
    return next((why for holds, why in obstacles if holds), None)


def decompressed_while_loading(schemes: Sequence[Scheme]) -> bool:
    """Whether the config may ask transformers to decompress while it loads.

    Without it, transformers expects packed zero points in the shape of unpacked ones and stops, and a model saved in
    bfloat16 but loaded in float32 is decompressed with other roundings. With it, it takes one group's scheme for every
    linear, hence not with several (see `quantization_config`), and it leaves the inputs as they are.
    """
    return len(schemes) == 1 and schemes[0].activations is None


def bfloat16_obstacle(linear: Linear, scheme: Scheme, storage: str) -> str | None:
    """Why only a model in bfloat16 can have `scheme` where it is not decompressed while loading; None if any can.

    compressed-tensors 0.20 then decompresses at the first product: to bfloat16 whatever the model's type is, and the
    product refuses two types.
    """
    found = scheme.storage_for(linear.shape, storage)
    if found not in OWN_SCALES:
        return None
    return (
        f"transformers decompresses {found} ({linear.name}) to bfloat16 where inputs are quantized or schemes are "
        "several, and the model has another type"
    )


def standard_config(
    schemes: Mapping[str, Scheme], linears: Mapping[str, Linear], anatomy: Anatomy, storage: str
) -> dict[str, Any]:
    """The standard's words for linears without an obstacle: a config group for each scheme."""
    groups: dict[Scheme, list[str]] = {}
    formats: dict[Scheme, str] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(module_name(linears[name]))
        formats[scheme] = scheme.storage_for(linears[name].shape, storage)
    # The class is the shortest target, where a model has no nn.Linear but those of its blocks and the head.
    by_class = len(groups) == 1 and anatomy.causal and anatomy.family != "generic"
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": next(iter(formats.values())) if len(set(formats.values())) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if by_class else targets,
                "weights": weights_arguments(scheme, formats[scheme]),
                "input_activations": inputs_arguments(scheme.activations),
                "output_activations": None,
                "format": formats[scheme],
            }
            for number, (scheme, targets) in enumerate(groups.items())
        },
        "ignore": _dense_modules(schemes, anatomy),
        "kv_cache_scheme": None,
    }
    if decompressed_while_loading(list(groups)):
        config["dequantize"] = True
    return config


def weights_arguments(scheme: Scheme, storage: str) -> dict[str, Any]:
    """The standard's `weights` of a scheme that it can say."""
    arguments = {
        "num_bits": scheme.grid.bits,
        "type": "int" if scheme.grid.is_uniform else "float",
        "symmetric": not scheme.zero_point,
        "strategy": "tensor_group" if scheme.has_tensor_scale else scheme.granularity,
        "group_size": scheme.group_size if scheme.granularity == "group" else None,
        "dynamic": False,
    }
    if storage in OWN_SCALES:
        dtype = str(OWN_SCALES[storage][0])
        arguments |= {"scale_dtype": dtype, "zp_dtype": dtype}
    return arguments


def inputs_arguments(activations: Activations | None) -> dict[str, Any] | None:
    """The standard's `input_activations`."""
    if activations is None:
        return None
    arguments = {
        "num_bits": activations.bits,
        "type": "int" if activations.grid == "uniform" else "float",
        "symmetric": not activations.zero_point,
        "strategy": activations.granularity,
        "group_size": activations.group_size,
        "dynamic": activations.dynamic,
    }
    if activations.granularity in INPUT_GROUPS:
        dtype = str(INPUT_GROUPS[activations.granularity][1])
        arguments |= {"scale_dtype": dtype, "zp_dtype": dtype}
    if activations.granularity == "tensor_group":  # the groups' scales are found on the spot, their unit is stored
        arguments |= {"dynamic": "local", "observer": "static_minmax"}
    return arguments


def _dense_modules(schemes: Mapping[str, Scheme], anatomy: Anatomy) -> list[str]:
    """Modules that stay as they are: linears without a scheme, and whatever else has a weight outside the blocks."""
    kept = {
        module_name(linear)
        for linear in every_linear(anatomy)
        if linear.name not in schemes and linear.slot.index is None
    }
    for name in anatomy.tensors:
        if name.endswith(".weight") and name.removesuffix(".weight") not in schemes:
            kept.add(anatomy.parameters[name].removesuffix(".weight"))
    return sorted(kept)


# ---- reading


def read_standard(checkpoint: Checkpoint, config: Mapping[str, Any], linear: Linear) -> tuple[Scheme, str]:
    """The scheme of a linear and the storage of its codes.

    Raises:
        CheckpointError: no group has the linear, or what its group says is nothing that fettle reads.
    """
    group = _find_group(config, linear)
    if group is None:
        raise CheckpointError(f"{linear.name} is stored as codes, but no config group of its folder targets it.")
    arguments, storage = group.get("weights") or {}, group.get("format") or config.get("format")
    bits, kind = arguments.get("num_bits", 8), arguments.get("type", "int")
    if storage == "naive-quantized":  # the standard's word for codes of eight bits, whatever they are
        storage = "float-quantized" if kind == "float" else "int-quantized"
    grid = _grid(str(storage), kind, bits)
    strategy, size = _granularity(arguments, str(storage))
    if grid is None or strategy is None or f"{linear.name}.weight_g_idx" in checkpoint.entries:
        order = " with groups in activation order" if arguments.get("actorder") else ""
        raise CheckpointError(
            f"{linear.name} is stored as {storage}, {bits}-bit {kind}, strategy {arguments.get('strategy')}{order}, "
            f"which fettle does not read. It reads {', '.join(STORAGES)}: integers of 2 to 8 bits and the floats e4m3 "
            "and e2m1, a scale per tensor, channel or group of neighbours. Give it the original model."
        )
    scheme = Scheme(
        grid=grid,
        granularity=strategy,
        group_size=size,
        zero_point=not arguments.get("symmetric", True),
        scale_dtype=_scale_dtype(checkpoint, linear, str(storage)),
        activations=_read_inputs(group.get("input_activations"), linear),
    )
    scheme.validate()
    scheme.check_storage(str(storage))
    return scheme, str(storage)


def _grid(storage: str, kind: Any, bits: Any) -> Grid | None:
    """The grid of a format's codes; None where the format has no such codes, or fettle no such format."""
    if storage in ("pack-quantized", "int-quantized"):
        return uniform(bits) if kind == "int" and bits in range(2, 9) else None
    grid = FLOAT4 if storage in PACKED_FLOATS else FLOAT8
    return grid if storage in STORAGES and kind == "float" and bits == grid.bits else None


def _granularity(arguments: Mapping[str, Any], storage: str) -> tuple[Any, int | None]:
    """What shares a scale, or None for what fettle does not know, and the group size."""
    size = arguments.get("group_size")
    strategy = arguments.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if storage in OWN_SCALES:
        fits = strategy in ("group", "tensor_group") and size == OWN_SCALES[storage][2]
        return ("group" if fits else None), size
    return (strategy if strategy in get_args(Granularity) else None), (size if strategy == "group" else None)


def _scale_dtype(checkpoint: Checkpoint, linear: Linear, storage: str) -> str:
    found = checkpoint.entry(linear.weight_name.removesuffix(".weight") + ".weight_scale").dtype
    known = _SCALE_DTYPES
    if storage in OWN_SCALES:
        dtype, meant, _ = OWN_SCALES[storage]
        known = {dtype: meant}
    if found not in known:
        allowed = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in known))
        raise CheckpointError(
            f"the scale of {linear.name} has dtype {found}; of {storage} codes fettle reads {allowed}."
        )
    return known[found]


def _read_inputs(arguments: Mapping[str, Any] | None, linear: Linear) -> Activations | None:
    if not arguments:
        return None
    dynamic, strategy = arguments.get("dynamic", False), arguments.get("strategy") or "tensor"
    bits, kind = arguments.get("num_bits", 8), arguments.get("type", "int")
    known = kind == "int" or (kind == "float" and bits == FLOAT8.bits)
    known = known and strategy in ("token", "tensor") and isinstance(dynamic, bool)
    if not (known or _in_groups(arguments, bits, kind, strategy)):
        raise CheckpointError(
            f"the inputs of {linear.name} are quantized as {bits}-bit {kind}, strategy {strategy}, dynamic {dynamic}, "
            "which fettle does not read. It reads integers and 8-bit floats with a scale a token or a tensor, MX "
            "floats of 4 and 8 bits, and NV floats. Give it the original model."
        )
    return Activations.from_dict(
        {
            "dynamic": bool(dynamic), "bits": bits, "granularity": strategy,
            "grid": "uniform" if kind == "int" else "float", "zero_point": not arguments.get("symmetric", True),
        }
    )  # fmt: skip


def _in_groups(arguments: Mapping[str, Any], bits: Any, kind: Any, strategy: Any) -> bool:
    """Whether inputs are floats of the MX formats, or of the NV one."""
    if kind != "float" or strategy not in INPUT_GROUPS:
        return False
    said = str(arguments.get("scale_dtype")).removeprefix("torch.")
    same = said == str(INPUT_GROUPS[strategy][1]).removeprefix("torch.")
    same = same and arguments.get("group_size") == GROUP_SIZES[strategy]
    if strategy == "group":
        return same and bits in (FLOAT4.bits, FLOAT8.bits) and arguments.get("dynamic") is True
    return same and bits == FLOAT4.bits and str(arguments.get("dynamic")).lower() == "local"


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
