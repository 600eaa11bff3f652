"""A pruned weight: a mask that says which weights stayed, and their values, which may be codes of a grid.

    weight_mask          uint8 [out, ⌈in/8⌉]     a bit a weight, column 8k + j in bit j of byte k; 1: it stayed
                         uint8 [out/R, ⌈in/8C⌉]  with blocks of R x C: a bit a block
    weight_mask_indices  uint8 [out, ⌈in/8⌉]     with 2:4 instead: of every four inputs the indices of the two that
                                                 stayed, two bits each, the smaller first, two groups a byte
    weight_values        16 or 32 bits [kept]    what stayed, row after row; or, as codes,
    weight_packed        int32 [⌈kept·bits/32⌉]  the codes of what stayed, one dense stream, with
    weight_scale, weight_zero_point, …           as `scheme.py` lists them for the whole weight
    weight_shape         int64 [2]

Bytes are exact beforehand, since a pattern and a share fix how many stay (`patterns.py`). What went is zero, whatever
the grid: a grid without zero is as good here as any. A bit a weight is what the mask costs: at 50% and 16 bits 9 bits
a weight are stored of 16, at 50% and 4 bits with groups of 32 about 3.6; below 1/16 sparsity a mask costs more than
it saves.

compressed-tensors said such files once (`sparse-bitmask`, with the same bits in the same order, and
`sparse-24-bitmask`); from 0.20 on its compressors for them are gone, so the standard's loaders read neither, and
fettle marks the folder as its own. `storage: dense` writes plain weights with zeros in them, which any loader opens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fettle.errors import CheckpointError, RecipeError, unknown_word
from fettle.tensors.bitmask import pack_mask, unpack_mask
from fettle.tensors.packing import pack_bits, packed_width, unpack_bits
from fettle.tensors.patterns import Pattern, parse_pattern
from fettle.tensors.quantized import QuantizedTensor, row_tiles
from fettle.tensors.remainder import TensorSpec
from fettle.tensors.scheme import SCALE_DTYPES, Scheme

VALUE_DTYPES = ("float16", "bfloat16", "float32")
STORAGES = ("pack-quantized", "int-quantized", "masked", "dense")  # but for dense all mean the tensors above


@dataclass(frozen=True, kw_only=True)
class MaskedScheme:
    """How a pruned weight is stored. It answers what `Scheme` answers.

    Attributes:
        pattern: the word of a recipe; see `patterns.py`.
        sparsity: the share that goes.
        values: the scheme of the codes of what stayed; None for plain values.
        value_dtype: their type where they are plain, and of the weight where it is written dense.
    """

    pattern: str
    sparsity: float
    values: Scheme | None = None
    value_dtype: str = "float32"

    @property
    def shape_of_mask(self) -> Pattern:
        """The pattern, parsed."""
        return parse_pattern(self.pattern)

    @property
    def activations(self) -> None:
        """Inputs stay as they are."""
        return None

    @property
    def has_input_scale(self) -> bool:
        """None is stored."""
        return False

    @property
    def zero_point(self) -> bool:
        """Whether scales come with zero points."""
        return self.values is not None and self.values.zero_point

    @property
    def torch_value_dtype(self) -> torch.dtype:
        """`value_dtype` as torch says it."""
        return SCALE_DTYPES[self.value_dtype]

    def validate(self) -> None:
        """Checks that the parts fit together.

        Raises:
            RecipeError: they do not; says what, the value, the allowed set.
        """
        fixed = parse_pattern(self.pattern).fixed_sparsity
        share = self.sparsity
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise RecipeError(f"sparsity={share!r} cannot be; allowed: from 0 to below 1. Try 0.5")
        if fixed is not None and fixed != share:
            raise RecipeError(
                f"sparsity={share!r} contradicts the pattern {self.pattern}, which prunes {fixed:g}; leave sparsity out"
            )
        if self.value_dtype not in VALUE_DTYPES:
            raise RecipeError(unknown_word("value_dtype", str(self.value_dtype), VALUE_DTYPES))
        if self.values is not None:
            self.values.validate()
            if self.values.remainder is not None or self.values.activations is not None:
                raise RecipeError("the codes of a pruned weight have no remainder, and its inputs stay as they are")

    def check_storage(self, storage: str) -> None:
        """Checks the word; every storage of codes means the tensors of this module.

        Raises:
            RecipeError: an unknown one.
        """
        if storage not in STORAGES:
            raise RecipeError(unknown_word("storage", storage, STORAGES))

    def storage_for(self, shape: tuple[int, int], preferred: str = "masked") -> str:
        """The storage of a weight [out, in] where a recipe prefers one: only `dense` makes a difference."""
        return preferred

    def kept_count(self, shape: tuple[int, int]) -> int:
        """How many weights of [out, in] stay, exactly."""
        return math.prod(shape) - self.shape_of_mask.pruned_count(shape, self.sparsity)

    def state_spec(self, shape: tuple[int, int], storage: str = "masked") -> dict[str, TensorSpec]:
        """Name, type and shape of every stored tensor of a weight [out, in].

        Raises:
            RecipeError: the pattern does not divide the shape.
        """
        self.check_storage(storage)
        kept, pattern = self.kept_count(shape), self.shape_of_mask
        if storage == "dense":
            return {"weight": (self.torch_value_dtype, shape)}
        spec: dict[str, TensorSpec] = {"weight_shape": (torch.int64, (2,))}
        if pattern.is_two_of_four:
            spec["weight_mask_indices"] = (torch.uint8, (shape[0], math.ceil(shape[1] / 8)))
        else:
            rows, columns = (shape[0] // pattern.rows, shape[1]) if pattern.kind == "block" else shape
            bits = columns // pattern.columns if pattern.kind == "block" else columns
            spec["weight_mask"] = (torch.uint8, (rows, math.ceil(bits / 8)))
        if self.values is None:
            return spec | {"weight_values": (self.torch_value_dtype, (kept,))}
        packed = {"weight_packed": (torch.int32, (packed_width(kept, self.values.grid.bits),))}
        return spec | self.values.state_spec(shape) | packed

    def stored_bytes(self, shape: tuple[int, int], storage: str = "masked") -> int:
        """Bytes on disk of a weight [out, in]: mask, values or codes, all scales, exactly."""
        return sum(dtype.itemsize * math.prod(sides) for dtype, sides in self.state_spec(shape, storage).values())

    def bits_per_weight(self, shape: tuple[int, int], storage: str = "masked") -> float:
        """Everything stored, in bits, over the number of weights, pruned ones included."""
        return 8 * self.stored_bytes(shape, storage) / math.prod(shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads back."""
        values = None if self.values is None else self.values.to_dict()
        return {"pattern": self.pattern, "sparsity": self.sparsity, "values": values, "value_dtype": self.value_dtype}

    @classmethod
    def from_dict(cls, mapping: dict[str, Any]) -> MaskedScheme:
        """The inverse of `to_dict`.

        Raises:
            RecipeError: an unknown key, or parts that do not fit together.
        """
        allowed = ("pattern", "sparsity", "values", "value_dtype")
        for key in mapping:
            if key not in allowed:
                raise RecipeError(unknown_word("key of a pruned weight's scheme", str(key), allowed))
        values = mapping.get("values")
        scheme = cls(
            pattern=str(mapping.get("pattern")),
            sparsity=mapping.get("sparsity", -1),
            values=None if values is None else Scheme.from_dict(values),
            value_dtype=str(mapping.get("value_dtype")),
        )
        scheme.validate()
        return scheme

    def describe(self) -> str:
        """For people: "50% pruned, 2:4, int4, group 32, bfloat16 scale"."""
        values = self.value_dtype if self.values is None else self.values.describe()
        return f"{100 * self.sparsity:.4g}% pruned, {self.pattern}, {values}"


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedTensor:
    """A pruned weight [out, in]. It answers what `QuantizedTensor` answers.

    Attributes:
        kept: bool [out, in], True where a weight stayed.
        values: `scheme.value_dtype` [kept], row after row; or codes of the whole weight, zero where it went.
        scheme: what the others mean.
    """

    kept: Tensor
    values: Tensor | QuantizedTensor
    scheme: MaskedScheme

    @classmethod
    def of(cls, weight: Tensor, kept: Tensor, scheme: MaskedScheme) -> MaskedTensor:
        """Plain values of weight [out, in] where `kept` says so."""
        return cls(kept=kept, values=weight[kept].to(scheme.torch_value_dtype), scheme=scheme)

    @classmethod
    def of_codes(cls, codes: QuantizedTensor, kept: Tensor, scheme: MaskedScheme) -> MaskedTensor:
        """Codes where `kept` says so; those of pruned weights become 0, as a reader finds them."""
        return cls(kept=kept, values=replace(codes, codes=codes.codes * kept), scheme=scheme)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.kept.shape[0], self.kept.shape[1])

    @property
    def input_quantizer(self) -> None:
        """Inputs stay as they are."""
        return None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [out, in], zero where it was pruned."""
        weight = torch.zeros(self.shape, dtype=dtype, device=self.kept.device)
        if isinstance(self.values, Tensor):
            weight[self.kept] = self.values.to(dtype)
            return weight
        for rows in row_tiles(*self.shape):
            weight[rows] = self.dequantize_tile(rows).to(dtype)
        return weight

    def dequantize_tile(self, rows: slice) -> Tensor:
        """The dense values of some rows, float32 [rows, in]."""
        kept = self.kept[rows]
        if not isinstance(self.values, Tensor):
            return self.values.dequantize_tile(rows).float().masked_fill_(~kept, 0.0)
        start = int(self.kept[: rows.start or 0].sum())
        tile = torch.zeros(kept.shape, device=kept.device)
        tile[kept] = self.values[start : start + int(kept.sum())].float()
        return tile

    def nbytes(self, storage: str = "masked") -> int:
        """Bytes on disk of everything that `to_state` returns."""
        return self.scheme.stored_bytes(self.shape, storage)

    def to_state(self, storage: str = "masked") -> dict[str, Tensor]:
        """The stored tensors by their local names.

        Raises:
            RecipeError: an unknown storage.
        """
        self.scheme.check_storage(storage)
        if storage == "dense":
            return {"weight": self.dequantize(self.scheme.torch_value_dtype)}
        pattern = self.scheme.shape_of_mask
        name = "weight_mask_indices" if pattern.is_two_of_four else "weight_mask"
        state = {"weight_shape": torch.tensor(self.shape, dtype=torch.int64), name: pack_mask(self.kept, pattern)}
        if isinstance(self.values, Tensor):
            return state | {"weight_values": self.values}
        codes = self.values.codes[self.kept]
        packed = pack_bits(codes.unsqueeze(0), self.values.scheme.grid.bits)[0]
        return state | self.values.to_state() | {"weight_packed": packed}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], scheme: MaskedScheme, storage: str = "masked") -> MaskedTensor:
        """The inverse of `to_state`.

        Raises:
            CheckpointError: a tensor is missing, has another type or shape than the scheme says, or the mask keeps
                other weights than its pattern allows.
        """
        shape = masked_shape(state, scheme)
        pattern = scheme.shape_of_mask
        kept = unpack_mask(mask_of(state), shape, pattern)
        _check_mask(kept, scheme)
        if scheme.values is None:
            return cls(kept=kept, values=state["weight_values"], scheme=scheme)
        bits, count = scheme.values.grid.bits, scheme.kept_count(shape)
        codes = torch.zeros(shape, dtype=torch.uint8, device=kept.device)
        codes[kept] = unpack_bits(state["weight_packed"].unsqueeze(0), bits, count)[0]
        whole = {**state, "weight_packed": pack_bits(codes, bits)}
        return cls(kept=kept, values=QuantizedTensor.from_state(whole, scheme.values), scheme=scheme)


def mask_of(state: Mapping[str, Tensor]) -> Tensor:
    """The packed mask of a state, whichever of its two forms is there."""
    return state["weight_mask_indices"] if "weight_mask_indices" in state else state["weight_mask"]


def masked_shape(state: Mapping[str, Tensor], scheme: MaskedScheme) -> tuple[int, int]:
    """The weight's shape that a state says, once everything in it agrees with the scheme.

    Raises:
        CheckpointError: it does not.
    """
    told = state["weight_shape"].flatten().tolist() if "weight_shape" in state else []
    if len(told) != 2 or min(told) < 1:
        raise CheckpointError(f"weight_shape says {told}; a pruned weight is a matrix [out, in]. The file is damaged")
    shape = (int(told[0]), int(told[1]))
    try:
        spec = scheme.state_spec(shape)
    except RecipeError as error:
        raise CheckpointError(f"weight_shape says {told}: {error}") from None
    for name, (dtype, sides) in spec.items():
        found = state.get(name)
        if found is None:
            raise CheckpointError(
                f"the tensor {name} is missing; {scheme.describe()} needs it. There are {sorted(state)}"
            )
        if found.dtype != dtype or tuple(found.shape) != sides:
            raise CheckpointError(
                f"{name} is {found.dtype} {list(found.shape)}; a weight {list(shape)} in {scheme.describe()} has "
                f"{dtype} {list(sides)}"
            )
    return shape


def _check_mask(kept: Tensor, scheme: MaskedScheme) -> None:
    """Raises CheckpointError for a mask that keeps another number of weights than the scheme says."""
    shape, pattern = (kept.shape[0], kept.shape[1]), scheme.shape_of_mask
    wanted, found = scheme.kept_count(shape), int(kept.sum())
    even = True
    if pattern.kind == "n:m":
        even = bool((kept.view(shape[0], -1, pattern.columns).sum(-1) == pattern.keep).all())
    elif pattern.kind == "row":
        even = bool((kept.sum(1) == wanted // shape[0]).all())
    if found != wanted or not even:
        raise CheckpointError(
            f"the mask keeps {found} weights, and {scheme.describe()} keeps {wanted} of {shape[0]} x {shape[1]}"
            + ("" if even else ", as many in each row and group")
            + "; the file is damaged"
        )
