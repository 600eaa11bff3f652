"""How a weight is stored: grid, who shares a scale, the scale's type, zero point or none; and exactly how many bytes.

    out ┌────────── in ──────────┐
        │ group 0 │ group 1 │ g2 │   one scale (and zero point) for each row and group;
        │ group 0 │ group 1 │ g2 │   the last group may be shorter
        └────────────────────────┘

How codes lie in a file, their storage, is compressed-tensors' (what its loaders cannot say, such as a short last
group, is laid out in the same way and marked as fettle's own by `models/storage`): `storages.py` has the codes; beside
them are

    weight_scale        [out, groups]; for "tensor" [1]
    weight_zero_point   pack-quantized: int32 [⌈out·bits/32⌉, groups]   (for "tensor": int8 [1], the standard leaves it)
                        int-quantized: int8 [out, groups]

Scales may have eight bits themselves: float8_e8m0fnu, powers of two (the MX formats), and float8_e4m3fn, which has too
little range for a model's scales and so comes with one float32 for the whole tensor (the NV formats), by which they are
divided: weight_global_scale [1]. Learned levels replace the scale: weight_levels [out, groups, 2^bits] (tensor: [1, 1,
2^bits]).

A remainder, where a scheme has one, stands beside the codes in tensors of its own: `sparse.py`, `factored.py`.
Inputs that are quantized with a stored scale have input_scale [1] and, asymmetric, input_zero_point int8 [1]; those
of the NV format input_global_scale float32 [1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from typing import Any, Literal, cast, get_args

import torch

from fettle.errors import RecipeError, unknown_word
from fettle.tensors.activations import Activations
from fettle.tensors.factored import FactoredScheme
from fettle.tensors.grid import Grid
from fettle.tensors.remainder import RemainderScheme, TensorSpec
from fettle.tensors.sparse import SparseScheme
from fettle.tensors.storages import EXPONENT_SCALES, Storage, code_spec, float_storage

Granularity = Literal["tensor", "channel", "group"]

SCALE_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How codes stand for a weight [out, in].

    Attributes:
        grid: the levels.
        granularity: what shares a scale: the whole tensor, an output channel (row), or a group of a row's columns.
        group_size: columns a group, with "group" only; need not divide the row.
        zero_point: whether each scale comes with the code that stands for zero (asymmetric; uniform grids only).
        scale_dtype: a key of `SCALE_DTYPES`; of learned levels the type of the levels.
        remainder: what is kept beside the codes and added to their values; None for nothing.
        activations: how the linear's inputs are quantized; None for not at all.
    """

    grid: Grid
    granularity: Granularity
    group_size: int | None = None
    zero_point: bool = False
    scale_dtype: str = "float32"
    remainder: RemainderScheme | None = None
    activations: Activations | None = None

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.grid.bits

    @property
    def codes_alone(self) -> Scheme:
        """The same without a remainder."""
        return replace(self, remainder=None)

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """`scale_dtype` as torch says it: the type on disk."""
        return SCALE_DTYPES[self.scale_dtype]

    @property
    def value_dtype(self) -> torch.dtype:
        """The type of scales in memory and of the values: that on disk, or float32 for scales of eight bits.

        The standard's own NV layout has bfloat16: its loaders round the values so.
        """
        if self.float_storage == "nvfp4-pack-quantized":
            return torch.bfloat16
        stored = self.torch_scale_dtype
        return stored if stored.itemsize > 1 else torch.float32

    @property
    def float_storage(self) -> Storage | None:
        """The storage that the standard has for small floats, where groups divide the row; None for other codes."""
        return float_storage(self.grid, self.group_size, self.scale_dtype)

    def storage_for(self, shape: tuple[int, int], preferred: str = "pack-quantized") -> str:
        """How a weight [out, in] is written: as the standard does it with small floats, else as preferred."""
        own = self.float_storage
        return preferred if own is None or shape[1] % (self.group_size or 1) else own

    @property
    def has_tensor_scale(self) -> bool:
        """Whether the small scales are to be divided by one float32 for the whole tensor."""
        return self.scale_dtype == "float8_e4m3fn"

    @property
    def has_input_scale(self) -> bool:
        """Whether a scale for the linear's inputs is stored beside the weight."""
        return self.activations is not None and self.activations.scale_name is not None

    def validate(self) -> None:
        """Checks that the parts fit together.

        Raises:
            RecipeError: they do not; says what, the value, the allowed set.
        """
        if self.granularity not in get_args(Granularity):
            raise RecipeError(unknown_word("granularity", str(self.granularity), get_args(Granularity)))
        if self.scale_dtype not in SCALE_DTYPES:
            raise RecipeError(unknown_word("scale_dtype", str(self.scale_dtype), SCALE_DTYPES))
        size = self.group_size
        if self.granularity == "group" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise RecipeError(
                f"group_size={size!r} cannot be with granularity 'group'; allowed: integers from 1. Try group_size: "
                "32, or granularity: channel for one scale a row"
            )
        if self.granularity != "group" and size is not None:
            raise RecipeError(
                f"group_size={size!r} belongs to granularity 'group', got {self.granularity!r}; leave it out"
            )
        if self.zero_point and not self.grid.is_uniform:
            raise RecipeError(f"a zero point needs the uniform grid, got {self.grid.name!r}; use asymmetric: false")
        if self.grid.is_learned and self.torch_scale_dtype.itemsize == 1:
            raise RecipeError(
                f"learned levels in {self.scale_dtype} would be no finer than a float8 grid; allowed: float16, "
                "bfloat16, float32"
            )
        if self.remainder is not None:
            self.remainder.validate()
        if self.activations is not None:
            self.activations.validate()

    def group_count(self, in_features: int) -> int:
        """Scales a row."""
        return math.ceil(in_features / self.group_size) if self.group_size is not None else 1

    def group_width(self, in_features: int) -> int:
        """Columns that share a scale in every group but the last; the whole row without groups."""
        return min(self.group_size, in_features) if self.group_size is not None else in_features

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of `QuantizedTensor.scale`: [out, groups], or [1, 1] for the whole tensor."""
        return (1, 1) if self.granularity == "tensor" else (shape[0], self.group_count(shape[1]))

    def state_spec(self, shape: tuple[int, int], storage: str = "pack-quantized") -> dict[str, TensorSpec]:
        """Name, type and shape of every stored tensor of a weight [out, in].

        Raises:
            RecipeError: the storage is unknown or cannot hold this scheme.
        """
        self.check_storage(storage)
        bits = self.grid.bits
        rows, groups = self.scale_shape(shape)
        scale_shape = (1,) if self.granularity == "tensor" else (rows, groups)
        spec = code_spec(storage, shape, bits)
        if self.grid.is_learned:
            spec["weight_levels"] = (self.torch_scale_dtype, (rows, groups, 2**bits))
        else:
            dtype = torch.uint8 if storage in EXPONENT_SCALES else self.torch_scale_dtype
            spec["weight_scale"] = (dtype, scale_shape)
        if self.has_tensor_scale:
            spec["weight_global_scale"] = (torch.float32, (1,))
        if self.zero_point:
            packed = storage == "pack-quantized" and self.granularity != "tensor"
            spec["weight_zero_point"] = (
                (torch.int32, (math.ceil(rows * bits / 32), groups)) if packed else (torch.int8, scale_shape)
            )
        if self.activations is not None and self.activations.scale_name is not None:
            unit = self.activations.granularity == "tensor_group"
            spec[self.activations.scale_name] = (torch.float32 if unit else self.value_dtype, (1,))
            if self.activations.zero_point:
                spec["input_zero_point"] = (torch.int8, (1,))
        return spec | self.remainder_spec(shape)

    def remainder_spec(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """The part of `state_spec` that is not codes and what they share."""
        return {} if self.remainder is None else self.remainder.state_spec(shape, self.torch_scale_dtype)

    def check_storage(self, storage: str) -> None:
        """Checks that `storage` can hold this scheme.

        Raises:
            RecipeError: it cannot.
        """
        if storage not in get_args(Storage):
            raise RecipeError(unknown_word("storage", storage, get_args(Storage)))
        if storage == "int-quantized" and not (self.grid.bits == 8 and self.grid.is_uniform):
            raise RecipeError(
                f"storage int-quantized holds uniform codes of 8 bits, got {self.describe()}; use storage: "
                "pack-quantized or bits: 8"
            )
        if storage not in ("pack-quantized", "int-quantized") and storage != self.float_storage:
            raise RecipeError(
                f"storage {storage} holds floats of the standard's formats, got {self.describe()}; use storage: "
                f"{self.float_storage or 'pack-quantized'}"
            )

    def stored_bytes(self, shape: tuple[int, int], storage: str = "pack-quantized") -> int:
        """Bytes on disk of a weight [out, in]: codes, all scales, zero points, shape tensor and remainder, exactly."""
        spec = self.state_spec(shape, storage).values()
        return sum(dtype.itemsize * math.prod(dimensions) for dtype, dimensions in spec)

    def bits_per_weight(self, shape: tuple[int, int], storage: str = "pack-quantized") -> float:
        """Everything stored, in bits, over the number of weights."""
        return 8 * self.stored_bytes(shape, storage) / math.prod(shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads back."""
        plain: dict[str, Any] = {
            "grid": self.grid.to_dict(),
            "granularity": self.granularity,
            "group_size": self.group_size,
            "zero_point": self.zero_point,
            "scale_dtype": self.scale_dtype,
        }
        beside = {"remainder": self.remainder, "activations": self.activations}
        return plain | {name: part.to_dict() for name, part in beside.items() if part is not None}

    @classmethod
    def from_dict(cls, mapping: dict[str, Any]) -> Scheme:
        """The inverse of `to_dict`.

        Raises:
            RecipeError: an unknown key, or parts that do not fit together.
        """
        allowed = ("grid", "granularity", "group_size", "zero_point", "scale_dtype", "remainder", "activations")
        for key in mapping:
            if key not in allowed:
                raise RecipeError(unknown_word("key of a scheme", str(key), allowed))
        activations = mapping.get("activations")
        scheme = cls(
            grid=Grid.from_dict(mapping.get("grid", {})),
            granularity=cast(Granularity, mapping.get("granularity")),
            group_size=mapping.get("group_size"),
            zero_point=bool(mapping.get("zero_point", False)),
            scale_dtype=str(mapping.get("scale_dtype", "float32")),
            remainder=_remainder_from_dict(mapping.get("remainder")),
            activations=None if activations is None else Activations.from_dict(activations),
        )
        scheme.validate()
        return scheme

    def describe(self) -> str:
        """For people: "int4, group 32, zero point, bfloat16 scale"."""
        if self.grid.is_nothing and self.remainder is not None:
            return f"{self.remainder.describe()}, {self.scale_dtype}"
        grid = f"int{self.grid.bits}" if self.grid.is_uniform else f"{self.grid.name} {self.grid.bits} bits"
        what = "table" if self.grid.is_learned else "scale"
        shared = f"group {self.group_size}" if self.granularity == "group" else f"a {what} a {self.granularity}"
        tensor = " and a tensor scale" if self.has_tensor_scale else ""
        beside = f", {self.remainder.describe()}" if self.remainder is not None else ""
        inputs = f"; {self.activations.describe()}" if self.activations is not None else ""
        zero = "zero point, " if self.zero_point else ""
        return f"{grid}, {shared}, {zero}{self.scale_dtype} {what}{tensor}{beside}{inputs}"


def _remainder_from_dict(mapping: dict[str, Any] | None) -> RemainderScheme | None:
    """The inverse of a remainder's `to_dict`.

    Raises:
        RecipeError: an unknown kind, or other fields than the kind has.
    """
    if mapping is None:
        return None
    kinds: dict[str, type[SparseScheme] | type[FactoredScheme]] = {c.kind: c for c in (SparseScheme, FactoredScheme)}
    kind, fields = str(mapping.get("kind")), {key: value for key, value in mapping.items() if key != "kind"}
    if kind not in kinds:
        raise RecipeError(unknown_word("remainder", kind, kinds))
    known = [field.name for field in dataclass_fields(kinds[kind])]
    for key in (*fields, *known):
        if key not in known or key not in fields:
            raise RecipeError(unknown_word(f"field of the remainder {kind}", key, known))
    return kinds[kind](**fields)
