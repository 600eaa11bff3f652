"""Reading a matrix back: codes, scales, zero points, remainders and the quantizer of its inputs, checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fettle.errors import CheckpointError
from fettle.models.anatomy import Linear
from fettle.models.checkpoint import Checkpoint, check_finite
from fettle.models.masked_storage import read_masked
from fettle.models.storage.config import StoredScheme
from fettle.tensors.activations import InputQuantizer
from fettle.tensors.masked import MaskedScheme
from fettle.tensors.packed import PackedTensor, can_stay_packed
from fettle.tensors.quantized import stored_input_scale
from fettle.tensors.scheme import Scheme
from fettle.tensors.storages import code_tensor
from fettle.tensors.weights import CompressedWeight, WeightScheme, weight_from_state

_NAMES = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_levels", "weight_global_scale",
    "weight_sparse_values", "weight_sparse_columns", "weight_sparse_offsets",
    "weight_factor_left", "weight_factor_right",
    "input_scale", "input_zero_point", "input_global_scale",
)  # fmt: skip


def read_quantized(checkpoint: Checkpoint, linear: Linear, stored: StoredScheme) -> CompressedWeight:
    """The codes, scales and zero points of `linear`; raises `NonFiniteError` for a scale that is NaN or infinite."""
    if isinstance(stored.scheme, MaskedScheme):
        return read_masked(checkpoint, linear, stored.scheme)
    state = _read_state(checkpoint, linear, stored)
    with _blaming(checkpoint, linear):
        quantized = weight_from_state(state, stored.scheme, stored.storage)
    _check_shape(quantized.shape, linear)
    return quantized


def read_packed(checkpoint: Checkpoint, linear: Linear, stored: StoredScheme) -> PackedTensor:
    """As `read_quantized` for a scheme that `can_stay_packed`, codes as they lie in the file."""
    assert isinstance(stored.scheme, Scheme) and can_stay_packed(stored.scheme, stored.storage)
    state = _read_state(checkpoint, linear, stored)
    with _blaming(checkpoint, linear):
        packed = PackedTensor.from_state(state, stored.scheme)
    _check_shape(packed.shape, linear)
    return packed


def _read_state(checkpoint: Checkpoint, linear: Linear, stored: StoredScheme) -> dict[str, Tensor]:
    """The stored tensors of a weight by their local names: all there, and no scale that is NaN or infinite."""
    stem = linear.weight_name.removesuffix(".weight")
    spec = stored.scheme.state_spec(linear.shape, stored.storage)
    names = dict.fromkeys((*_NAMES, *spec))
    state = {name: checkpoint.read(f"{stem}.{name}") for name in names if f"{stem}.{name}" in checkpoint.entries}
    missing = sorted(set(spec) - {"weight_shape"} - set(state))
    if missing:
        raise CheckpointError(
            f"{linear.name} is stored as codes, but tensors {[f'{stem}.{n}' for n in missing]} are missing."
        )
    for name in spec:
        found = state.get(name)
        if found is None or name == code_tensor(stored.storage):
            continue
        exponents = name == "weight_scale" and found.dtype == torch.uint8
        if exponents or found.dtype.is_floating_point:
            check_finite(f"{stem}.{name}", found.view(torch.float8_e8m0fnu) if exponents else found)
    return state


@contextmanager
def _blaming(checkpoint: Checkpoint, linear: Linear) -> Iterator[None]:
    """Puts the linear and the folder in front of what a damaged weight's error says."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{linear.name} in {checkpoint.folder}: {error}") from error


def _check_shape(found: tuple[int, int], linear: Linear) -> None:
    if found != linear.shape:
        raise CheckpointError(f"{linear.name} is stored with shape {list(found)}, expected {list(linear.shape)}.")


def _input_names(scheme: WeightScheme) -> set[str]:
    """The stored tensors that say how inputs are quantized."""
    return {name for name in scheme.state_spec((1, 1)) if name.startswith("input_")}


def read_input_quantizer(checkpoint: Checkpoint, linear: Linear, stored: StoredScheme | None) -> InputQuantizer | None:
    """What quantizes the inputs of `linear`, once `read_weight` found it sound; None where they stay."""
    if stored is None or stored.scheme.activations is None:
        return None
    assert isinstance(stored.scheme, Scheme)  # no other quantizes inputs
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
