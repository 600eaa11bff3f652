"""Codes that stand for eight weights at once: vector quantization with one or two stages.

    value[o, 8j … 8j+7] = scale[o, g] · Σ_m ratio_m · entry_m[codes[o, j, m]]

Entries are points of fixed lattices (`codebook.py`); a second stage holds what the first left over, on the same lattice
made finer by a ratio. A code for eight weights has `bits` bytes, so a width is a number of stages:

    1 bit    e8_roots                    3 bits   e8p, then e8_roots / 2.04
    2 bits   e8p                         4 bits   e8p, then e8p / 3.45      (ratios of QuIP#, its released code)

Stored (`storage` pack-quantized; no other program reads it):

    weight_packed  uint8 [out, ⌈in/8⌉ · bits]    the first stage's bytes of eight weights, low byte first, the second's
    weight_shape   int64 [2]
    weight_scale   [out, groups]; of float8_e4m3fn beside weight_tensor_scale float32 [1], which multiplies them

The last code of a row may reach beyond it; what it says there is nobody's weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from fettle.errors import CheckpointError, RecipeError, unknown_word
from fettle.tensors.codebook import DIMENSION, Codebook, e8_roots, e8p
from fettle.tensors.quantized import check_state, expand_groups, row_tiles
from fettle.tensors.remainder import TensorSpec
from fettle.tensors.scheme import SCALE_DTYPES

STORAGE = "pack-quantized"
WIDTHS = (1, 2, 3, 4)
_FINER = {3: 2.04, 4: 3.45}  # by how much the second stage is finer than the first


@dataclass(frozen=True, kw_only=True)
class VectorScheme:
    """How vector codes stand for a weight [out, in]; has the face of `Scheme` (`weights.py`).

    Attributes:
        bits: of a code by its eight weights.
        group_size: columns that share a scale, a multiple of eight; None for one scale a row.
        scale_dtype: a key of `SCALE_DTYPES`, but powers of two.
    """

    kind: ClassVar[str] = "vector"

    bits: int
    group_size: int | None = None
    scale_dtype: str = "float32"

    @property
    def stages(self) -> tuple[Codebook, ...]:
        """The tables of each stage."""
        return ((e8_roots(),), (e8p(),), (e8p(), e8_roots()), (e8p(), e8p()))[self.bits - 1]

    @property
    def ratios(self) -> tuple[float, ...]:
        """What each stage's entries are multiplied by, beside the scale."""
        return (1.0, 1 / _FINER[self.bits]) if self.bits in _FINER else (1.0,)

    @property
    def activations(self) -> None:
        """Inputs are not quantized."""
        return None

    @property
    def remainder(self) -> None:
        """Nothing is kept beside the codes."""
        return None

    @property
    def has_input_scale(self) -> bool:
        """No."""
        return False

    @property
    def has_tensor_scale(self) -> bool:
        """Whether one float32 scale for the whole tensor stands beside the small ones."""
        return self.scale_dtype == "float8_e4m3fn"

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """`scale_dtype` as torch says it: the type on disk."""
        return SCALE_DTYPES[self.scale_dtype]

    def validate(self) -> None:
        """Checks that the parts fit together.

        Raises:
            RecipeError: they do not; says what, the value, the allowed set.
        """
        if isinstance(self.bits, bool) or self.bits not in WIDTHS:
            raise RecipeError(f"bits={self.bits!r} cannot be with vector codes; allowed: 1, 2, 3, 4. Try bits: 2")
        if self.scale_dtype not in SCALE_DTYPES or self.scale_dtype == "float8_e8m0fnu":
            allowed = [name for name in SCALE_DTYPES if name != "float8_e8m0fnu"]
            raise RecipeError(unknown_word("scale_dtype of vector codes", str(self.scale_dtype), allowed))
        size = self.group_size
        whole = isinstance(size, int) and not isinstance(size, bool) and size >= DIMENSION and size % DIMENSION == 0
        if size is not None and not whole:
            raise RecipeError(
                f"group_size={size!r} cannot be with vector codes: {DIMENSION} neighbours have one code and share a "
                f"scale; allowed: multiples of {DIMENSION}, or none for one scale a row. Try none"
            )

    def vector_count(self, in_features: int) -> int:
        """Codes a row; the last may reach beyond it."""
        return math.ceil(in_features / DIMENSION)

    def group_count(self, in_features: int) -> int:
        """Scales a row."""
        return math.ceil(in_features / self.group_size) if self.group_size is not None else 1

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of `VectorTensor.scale`: [out, groups]."""
        return (shape[0], self.group_count(shape[1]))

    def state_spec(self, shape: tuple[int, int], storage: str = STORAGE) -> dict[str, TensorSpec]:
        """Name, type and shape of every stored tensor of a weight [out, in].

        Raises:
            RecipeError: the storage cannot hold vector codes.
        """
        self.check_storage(storage)
        spec: dict[str, TensorSpec] = {
            "weight_packed": (torch.uint8, (shape[0], self.vector_count(shape[1]) * self.bits)),
            "weight_shape": (torch.int64, (2,)),
            "weight_scale": (self.torch_scale_dtype, self.scale_shape(shape)),
        }
        return spec | ({"weight_tensor_scale": (torch.float32, (1,))} if self.has_tensor_scale else {})

    def storage_for(self, shape: tuple[int, int], preferred: str = STORAGE) -> str:
        """The storage of a weight [out, in] where a recipe prefers one: vector codes lie in the same way in any."""
        return preferred

    def check_storage(self, storage: str) -> None:
        """Checks that `storage` can hold vector codes.

        Raises:
            RecipeError: it cannot.
        """
        if storage != STORAGE:
            raise RecipeError(f"storage {storage} holds no vector codes; use storage: {STORAGE}")

    def stored_bytes(self, shape: tuple[int, int], storage: str = STORAGE) -> int:
        """Bytes on disk of a weight [out, in]: codes, all scales and the shape, exactly; the tables are no part."""
        spec = self.state_spec(shape, storage).values()
        return sum(dtype.itemsize * math.prod(dimensions) for dtype, dimensions in spec)

    def bits_per_weight(self, shape: tuple[int, int], storage: str = STORAGE) -> float:
        """Everything stored, in bits, over the number of weights."""
        return 8 * self.stored_bytes(shape, storage) / math.prod(shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads back."""
        return {
            "kind": self.kind,
            "bits": self.bits,
            "group_size": self.group_size,
            "scale_dtype": self.scale_dtype,
        }

    @classmethod
    def from_dict(cls, mapping: dict[str, Any]) -> VectorScheme:
        """The inverse of `to_dict`.

        Raises:
            RecipeError: an unknown key, or parts that do not fit together.
        """
        known = [found.name for found in dataclass_fields(cls)]
        for key in mapping:
            if key not in ("kind", *known):
                raise RecipeError(unknown_word("key of a scheme of vector codes", str(key), known))
        scheme = cls(
            bits=cast(int, mapping.get("bits")),
            group_size=mapping.get("group_size"),
            scale_dtype=str(mapping.get("scale_dtype", "float32")),
        )
        scheme.validate()
        return scheme

    def describe(self) -> str:
        """For people: "E8 codes 2 bits, a scale a channel, bfloat16 scale"."""
        shared = f"group {self.group_size}" if self.group_size is not None else "a scale a channel"
        tensor = " and a tensor scale" if self.has_tensor_scale else ""
        return f"E8 codes {self.bits} bits, {shared}, {self.scale_dtype} scale{tensor}"


@dataclass(frozen=True, kw_only=True, eq=False)
class VectorTensor:
    """A weight [out, in] as codes of eight weights each; has the face of `QuantizedTensor` (`weights.py`).

    Attributes:
        codes: int32 [out, ⌈in/8⌉, stages].
        scale: float32 `scheme.scale_shape`, exactly the stored values.
        shape: (out, in).
        scheme: what the others mean.
        tensor_scale: float32 [1] where the scheme has one; None otherwise.
    """

    codes: Tensor
    scale: Tensor
    shape: tuple[int, int]
    scheme: VectorScheme
    tensor_scale: Tensor | None = None

    @property
    def input_quantizer(self) -> None:
        """Inputs stay as they are."""
        return None

    @property
    def input_scale(self) -> None:
        """Nor is there a scale for them."""
        return None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, [out, in]."""
        weight = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for rows in row_tiles(*self.shape):
            weight[rows] = self.dequantize_tile(rows)
        return weight

    def dequantize_tile(self, rows: slice) -> Tensor:
        """The values of some rows, float32 [rows, in]."""
        scale = self.scale[rows]
        if self.tensor_scale is not None:
            scale = scale * self.tensor_scale
        return scaled(units_of(self.codes[rows], self.scheme), scale, self.scheme)[:, : self.shape[1]]

    def nbytes(self, storage: str = STORAGE) -> int:
        """Bytes on disk of everything that `to_state` returns."""
        return self.scheme.stored_bytes(self.shape, storage)

    def to_state(self, storage: str = STORAGE) -> dict[str, Tensor]:
        """The stored tensors by their local names; see `VectorScheme.state_spec`.

        Raises:
            RecipeError: the storage cannot hold vector codes.
        """
        self.scheme.check_storage(storage)
        bytes_: list[Tensor] = []
        for stage, book in enumerate(self.scheme.stages):
            for shift in range(0, book.code_bits, 8):
                bytes_.append((self.codes[..., stage] >> shift) & 255)
        scale = self.scale.to(self.scheme.torch_scale_dtype)
        state = {
            "weight_packed": torch.stack(bytes_, dim=-1).to(torch.uint8).flatten(1),
            "weight_shape": torch.tensor(self.shape, dtype=torch.int64),
            "weight_scale": scale.contiguous(),
        }
        return state if self.tensor_scale is None else state | {"weight_tensor_scale": self.tensor_scale}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], scheme: VectorScheme, storage: str = STORAGE) -> VectorTensor:
        """The inverse of `to_state`.

        Raises:
            CheckpointError: a tensor is missing, or has another type or shape than the scheme says.
            RecipeError: the storage cannot hold vector codes.
        """
        scheme.check_storage(storage)
        told = state["weight_shape"].tolist() if "weight_shape" in state else []
        if len(told) != 2 or min(told) < 1:
            raise CheckpointError(f"weight_shape says the shape {told}; a compressed weight is a matrix [out, in]")
        shape = (int(told[0]), int(told[1]))
        check_state(state, scheme.state_spec(shape, storage), shape, scheme.describe())
        return cls(
            codes=unpacked(state["weight_packed"], scheme),
            scale=state["weight_scale"].float().reshape(scheme.scale_shape(shape)),
            shape=shape,
            scheme=scheme,
            tensor_scale=state["weight_tensor_scale"] if scheme.has_tensor_scale else None,
        )


def unpacked(stored: Tensor, scheme: VectorScheme) -> Tensor:
    """Codes int32 [rows, vectors, stages] of `weight_packed` uint8 [rows, vectors · bits]."""
    bytes_ = stored.reshape(len(stored), -1, scheme.bits).int()
    codes, first = [], 0
    for book in scheme.stages:
        count = book.code_bits // 8
        codes.append(sum((bytes_[..., first + i] << (8 * i) for i in range(1, count)), bytes_[..., first]))
        first += count
    return torch.stack(codes, dim=-1)


def units_of(codes: Tensor, scheme: VectorScheme) -> Tensor:
    """Sums of the stages' entries, in units of the scale: [rows, vectors, stages] → float32 [rows, 8·vectors]."""
    total = torch.zeros(*codes.shape[:2], DIMENSION, device=codes.device)
    for stage, (book, ratio) in enumerate(zip(scheme.stages, scheme.ratios, strict=True)):
        total += ratio * book.entries(codes[..., stage])
    return total.flatten(1)


def scaled(units: Tensor, scale: Tensor, scheme: VectorScheme) -> Tensor:
    """Units [rows, columns] times their group's scale [rows, groups]."""
    return units * expand_groups(scale, units.shape[1], scheme.group_size or units.shape[1])
