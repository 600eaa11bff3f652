"""Pruned matrices on disk: reading one back, and why the compressed-tensors standard cannot say it."""

from __future__ import annotations

from fettle.errors import CheckpointError
from fettle.models.checkpoint import Checkpoint, check_finite
from fettle.models.parts import Linear
from fettle.tensors.masked import MaskedScheme, MaskedTensor

MASK_NAMES = ("weight_mask", "weight_mask_indices")


def masked_obstacle(name: str) -> str:
    """Why the standard cannot say a pruned matrix, in words."""
    return (
        f"{name} is pruned, and compressed-tensors from 0.20 on reads no sparse format any more (storage: dense writes "
        "plain weights with zeros)"
    )


def read_masked(checkpoint: Checkpoint, linear: Linear, scheme: MaskedScheme) -> MaskedTensor:
    """The mask and what stayed of `linear`.

    Raises:
        CheckpointError: a tensor is missing or contradicts the scheme, or the mask is damaged.
        NonFiniteError: a value or a scale is NaN or infinite.
    """
    stem = linear.weight_name.removesuffix(".weight")
    spec = scheme.state_spec(linear.shape)
    missing = sorted(name for name in spec if f"{stem}.{name}" not in checkpoint.entries)
    if missing:
        raise CheckpointError(f"{linear.name} is pruned, but tensors {[f'{stem}.{n}' for n in missing]} are missing.")
    state = {name: checkpoint.read(f"{stem}.{name}") for name in spec}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            check_finite(f"{stem}.{name}", tensor)
    try:
        found = MaskedTensor.from_state(state, scheme)
    except CheckpointError as error:
        raise CheckpointError(f"{linear.name} in {checkpoint.folder}: {error}") from error
    if found.shape != linear.shape:
        raise CheckpointError(f"{linear.name} is stored with shape {list(found.shape)}, expected {list(linear.shape)}.")
    return found
