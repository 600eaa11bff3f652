"""The one type that holds a compressed weight: codes, scales, zero points.

    value[o, i] = (levels[codes[o, i]] - levels[zero_point[o, g]]) · scale[o, g]      g = i // group_size

without a zero point the second term is left out; learned levels are a table of each tensor, row or group, and have no
scale; a tensor scale, where the scheme has one, divides the small scales first, in float32. A remainder, where the
scheme has one, is added to the rounded values in float32.

The product is rounded to the scale's type, as compressed-tensors'
decompression does it: the difference of two codes is an integer below 256 in size, exact in every scale type, so its
arithmetic in that type is one rounding of the exact product, and so is ours in float32 followed by one rounding.

Everything works on tiles of rows, so temporaries stay at a few megabytes whatever the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fettle.errors import CheckpointError
from fettle.tensors.activations import InputQuantizer, InputScale
from fettle.tensors.packing import pack_bits, unpack_bits
from fettle.tensors.remainder import Remainder, TensorSpec
from fettle.tensors.scales import Shared
from fettle.tensors.scheme import Scheme
from fettle.tensors.storages import (
    EXPONENT_SCALES,
    WITH_SHAPE,
    code_tensor,
    pack_codes,
    signed,
    told_shape,
    unpack_codes,
    unsigned,
)

TILE_WEIGHTS = 1 << 19  # weights worked on at once: 2 MB in float32


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedTensor:
    """A compressed weight [out, in].

    Attributes:
        codes: uint8 [out, in], index into `scheme.grid.levels` or into `levels`.
        scale: `scheme.value_dtype` [out, groups]; channel [out, 1]; tensor [1, 1]; ones with learned levels.
        zero_point: uint8 as `scale`, the code that stands for zero; None without.
        scheme: what the others mean.
        levels: `scheme.value_dtype` [out, groups, 2**bits] with the learned grid; None with any other.
        tensor_scale: float32 [1] where the scheme has one, by which scales are divided; None otherwise.
        remainder: what is added to the values of the codes; None without, and where the weight is too small for one.
        input_scale: of the linear's inputs, where the scheme stores one; a method leaves it to the walk.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme
    levels: Tensor | None = None
    tensor_scale: Tensor | None = None
    remainder: Remainder | None = None
    input_scale: InputScale | None = None

    @classmethod
    def of(cls, codes: Tensor, shared: Shared, scheme: Scheme) -> QuantizedTensor:
        """Codes with what they share."""
        return cls(codes=codes, scale=shared.scale, zero_point=shared.zero_point, levels=shared.levels, scheme=scheme)

    @property
    def shared(self) -> Shared:
        """Scale, zero point and levels, without the tensor scale: `Shared.over` divides by it."""
        return Shared(scale=self.scale, zero_point=self.zero_point, levels=self.levels)

    @property
    def input_quantizer(self) -> InputQuantizer | None:
        """What quantizes the linear's inputs; None where they stay as they are."""
        activations = self.scheme.activations
        return None if activations is None else InputQuantizer(activations=activations, fixed=self.input_scale)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.codes.shape[0], self.codes.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, [out, in]: rounded to the scale's type, then cast to `dtype`."""
        weight = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for rows in row_tiles(*self.shape):
            weight[rows] = self.dequantize_tile(rows)
        return weight

    def dequantize_tile(self, rows: slice) -> Tensor:
        """The values of some rows, [rows, in], in the scheme's `value_dtype`; float32 with a remainder."""
        shared = self.shared.rows(rows, self.scheme).over(self.tensor_scale)
        values = dequantize_rows(self.codes[rows], shared, self.scheme)
        return values if self.remainder is None else self.remainder.add_to_(values.float(), rows)

    def nbytes(self, storage: str = "pack-quantized") -> int:
        """Bytes on disk of everything that `to_state` returns."""
        return self.scheme.stored_bytes(self.shape, storage)

    def to_state(self, storage: str = "pack-quantized") -> dict[str, Tensor]:
        """The stored tensors by their local names; see `scheme` for types and shapes.

        Raises:
            RecipeError: the storage cannot hold this scheme.
        """
        self.scheme.check_storage(storage)
        bits = self.scheme.grid.bits
        whole = self.scheme.granularity == "tensor"
        state = pack_codes(self.codes, self.scheme.grid, storage)
        if self.levels is not None:
            state["weight_levels"] = self.levels.contiguous()
        else:
            scale = self.scale.to(self.scheme.torch_scale_dtype)
            scale = scale.view(torch.uint8) if storage in EXPONENT_SCALES else scale
            state["weight_scale"] = scale.reshape(-1) if whole else scale.contiguous()
        if self.tensor_scale is not None:
            state["weight_global_scale"] = self.tensor_scale
        if self.zero_point is not None:
            if storage == "pack-quantized" and not whole:
                state["weight_zero_point"] = pack_bits(self.zero_point, bits, axis=0)
            else:
                points = signed(self.zero_point, bits)
                state["weight_zero_point"] = points.reshape(-1) if whole else points
        if self.input_scale is not None and self.scheme.activations is not None:
            name = self.scheme.activations.scale_name
            assert name is not None
            state[name] = self.input_scale.scale
            if self.input_scale.zero_point is not None:
                state["input_zero_point"] = self.input_scale.zero_point
        return state if self.remainder is None else state | self.remainder.to_state()

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], scheme: Scheme, storage: str = "pack-quantized"
    ) -> QuantizedTensor:
        """The inverse of `to_state`.

        Raises:
            CheckpointError: a tensor is missing, has another type or shape than the scheme says, or names what is not
                there.
            RecipeError: the storage cannot hold this scheme.
        """
        shape = stored_shape(state, scheme, storage)
        bits = scheme.grid.bits
        rows, groups = scheme.scale_shape(shape)
        codes = unpack_codes(state[code_tensor(storage)], scheme.grid, storage, shape[1])
        zero_point = stored_zero_point(state, scheme, rows)
        if scheme.grid.level_count < 2**bits and int(codes.max()) >= scheme.grid.level_count:
            raise CheckpointError(
                f"a code is {int(codes.max())}, and {scheme.describe()} has {scheme.grid.level_count} levels; the file "
                "is damaged"
            )
        shared = stored_shared(state, scheme, (rows, groups))
        if scheme.has_tensor_scale and not float(state["weight_global_scale"]) > 0:
            raise CheckpointError(
                f"weight_global_scale is {float(state['weight_global_scale'])}, and scales are divided by it; the file "
                "is damaged"
            )
        remainder = None if scheme.remainder is None else scheme.remainder.from_state(state, shape)
        if remainder is not None:
            remainder.check()
        return cls(
            codes=codes,
            scale=shared.scale,
            zero_point=zero_point,
            levels=shared.levels,
            scheme=scheme,
            tensor_scale=state["weight_global_scale"] if scheme.has_tensor_scale else None,
            remainder=remainder,
            input_scale=stored_input_scale(state, scheme),
        )


def stored_shared(state: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Shared:
    """Scale or levels of a state as they are worked with, the scale in `shape` [rows, groups]; no zero point."""
    if scheme.grid.is_learned:
        levels = state["weight_levels"]
        return Shared(scale=levels.new_ones(shape), levels=levels)
    stored = state["weight_scale"]
    scale = stored.view(torch.float8_e8m0fnu) if stored.dtype == torch.uint8 else stored
    return Shared(scale=scale.to(scheme.value_dtype).reshape(shape))


def stored_zero_point(state: Mapping[str, Tensor], scheme: Scheme, out_features: int) -> Tensor | None:
    """Zero points of a state as uint8 codes [out, groups] (or [1, 1]); None where the scheme has none."""
    if not scheme.zero_point:
        return None
    stored = state["weight_zero_point"]
    if stored.dtype == torch.int32:
        return unpack_bits(stored, scheme.grid.bits, out_features, axis=0)
    codes = unsigned(stored, scheme.grid.bits)
    return codes.reshape(1, 1) if scheme.granularity == "tensor" else codes


def stored_input_scale(state: Mapping[str, Tensor], scheme: Scheme) -> InputScale | None:
    """The scale of the inputs that a state holds, checked; None where the scheme stores none."""
    if scheme.activations is None or scheme.activations.scale_name is None:
        return None
    return InputScale.from_state(state, scheme.activations)


def quantize(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme, levels: Tensor | None = None
) -> QuantizedTensor:
    """The nearest codes for given scales and zero points, or levels.

    Args:
        weight: [out, in], any floating type; untouched.
        scale: `scheme.value_dtype`, positive, in the shape of `scheme.scale_shape`.
        zero_point: uint8 codes in the same shape, or None.
        scheme: what they mean.
        levels: of the learned grid, `scheme.value_dtype` [*scale shape, 2**bits], ascending.
    """
    out_features, in_features = weight.shape
    shared = Shared(scale=scale, zero_point=zero_point, levels=levels)
    codes = torch.empty(out_features, in_features, dtype=torch.uint8, device=weight.device)
    for rows in row_tiles(out_features, in_features):
        codes[rows] = quantize_rows(weight[rows], shared.rows(rows, scheme), scheme)
    return QuantizedTensor.of(codes, shared, scheme)


def quantize_rows(weight: Tensor, shared: Shared, scheme: Scheme) -> Tensor:
    """`quantize` for one tile: codes uint8 [rows, in] for a weight [rows, in] and what [rows, groups] share."""
    in_features = weight.shape[1]
    width = scheme.group_width(in_features)
    grid = scheme.grid
    if shared.levels is not None:
        return _nearest_learned(weight.float(), shared.levels.float(), width)
    # a new tensor: changed in place below
    units = weight.float() / expand_groups(shared.scale.float(), in_features, width)
    if not grid.is_uniform:
        return torch.bucketize(units, grid.midpoints(weight.device)).to(torch.uint8)
    units.round_()
    if shared.zero_point is None:
        units.add_(2 ** (grid.bits - 1))
    else:
        units.add_(expand_groups(shared.zero_point.float(), in_features, width))
    return units.clamp_(0, 2**grid.bits - 1).to(torch.uint8)


def dequantize_rows(codes: Tensor, shared: Shared, scheme: Scheme) -> Tensor:
    """The values of one tile, in `value_dtype`: codes [rows, in], what [rows, groups] share → [rows, in]."""
    in_features = codes.shape[1]
    width = scheme.group_width(in_features)
    grid = scheme.grid
    if shared.levels is not None:
        return _learned_values(codes, shared.levels, width)
    if grid.is_uniform:
        values = codes.float()
        if shared.zero_point is None:
            values.sub_(2 ** (grid.bits - 1))
    else:
        values = grid.table(device=codes.device)[codes.int()]
    if shared.zero_point is not None:
        values.sub_(expand_groups(shared.zero_point.float(), in_features, width))
    return values.mul_(expand_groups(shared.scale.float(), in_features, width)).to(scheme.value_dtype)


def _nearest_learned(weight: Tensor, levels: Tensor, width: int) -> Tensor:
    """Nearest of each group's own levels: weight [rows, in], levels [rows or 1, groups, k] → uint8 [rows, in]."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    midpoints = (levels[..., 1:] + levels[..., :-1]) / 2
    for group in range(levels.shape[1]):
        columns = slice(group * width, (group + 1) * width)
        bounds = midpoints[:, group].expand(len(weight), -1).contiguous()
        codes[:, columns] = torch.searchsorted(bounds, weight[:, columns].contiguous()).to(torch.uint8)
    return codes


def _learned_values(codes: Tensor, levels: Tensor, width: int) -> Tensor:
    """The levels that codes [rows, in] name, from tables [rows or 1, groups, k]."""
    values = torch.empty(codes.shape, dtype=levels.dtype, device=codes.device)
    for group in range(levels.shape[1]):
        columns = slice(group * width, (group + 1) * width)
        table = levels[:, group].expand(len(codes), -1)
        values[:, columns] = table.gather(1, codes[:, columns].long())
    return values


def expand_groups(values: Tensor, in_features: int, width: int) -> Tensor:
    """Each group's value for each of its columns: [rows, groups] → [rows, in], or [rows, 1] where one group is all."""
    if values.shape[1] == 1:
        return values
    return values.repeat_interleave(width, dim=1)[:, :in_features]


def row_tiles(out_features: int, in_features: int, weights: int = TILE_WEIGHTS) -> Iterator[slice]:
    """Slices of rows that hold about `weights` weights each; the same for every number of threads."""
    step = max(1, weights // max(1, in_features))
    return (slice(start, min(start + step, out_features)) for start in range(0, out_features, step))


def stored_shape(state: Mapping[str, Tensor], scheme: Scheme, storage: str) -> tuple[int, int]:
    """The weight's shape that a state says, once everything in it agrees with the scheme.

    Raises:
        CheckpointError: a tensor is missing, or has another type or shape than the scheme says.
    """
    scheme.check_storage(storage)
    source = "weight_shape" if storage in WITH_SHAPE else code_tensor(storage)
    if source not in state:
        raise CheckpointError(f"a weight stored as {storage} needs the tensor {source}; there are {sorted(state)}")
    told = told_shape(state[source], storage)
    if len(told) != 2 or min(told) < 1:
        raise CheckpointError(f"{source} says the shape {told}; a compressed weight is a matrix [out, in]")
    shape = (int(told[0]), int(told[1]))
    check_state(state, scheme.state_spec(shape, storage), shape, scheme.describe())
    return shape


def check_state(
    state: Mapping[str, Tensor], spec: Mapping[str, TensorSpec], shape: tuple[int, int], described: str
) -> None:
    """Checks that a state has what the scheme of a weight [out, in] says, which is described for people.

    Raises:
        CheckpointError: a tensor is missing, or has another type or shape.
    """
    for name, (dtype, dimensions) in spec.items():
        found = state.get(name)
        if found is None:
            raise CheckpointError(f"the tensor {name} is missing; {described} needs it. There are {sorted(state)}")
        if found.dtype != dtype or tuple(found.shape) != dimensions:
            raise CheckpointError(
                f"{name} is {found.dtype} {list(found.shape)}; a weight {list(shape)} in {described} has "
                f"{dtype} {list(dimensions)}"
            )
