"""How wide every layer of a network is, as plain data, and a network made as wide as such data says.

    Conv2d [out, in, groups]     Linear [out, in]     batch norm [features]

What `fettle.json` holds for a pruned network: with the configuration of the original it says which network to build.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from fettle.errors import CheckpointError

Widths = dict[str, list[int]]


def widths_of(network: nn.Module) -> Widths:
    """The widths of every layer that has any, by its path."""
    found: Widths = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            found[name] = [layer.out_channels, layer.in_channels, layer.groups]
        elif isinstance(layer, nn.Linear):
            found[name] = [layer.out_features, layer.in_features]
        elif isinstance(layer, BatchNorm):
            found[name] = [layer.num_features]
    return found


def changed_widths(before: Widths, after: Widths) -> Widths:
    """The layers whose widths are others than before."""
    return {name: widths for name, widths in after.items() if before.get(name) != widths}


def filters(widths: Widths) -> int:
    """How many filters all convolutions have together."""
    return sum(value[0] for value in widths.values() if len(value) == 3)


def set_widths_(network: nn.Module, widths: Mapping[str, Any]) -> None:
    """Gives the layers of a network, whose parameters are on meta, other widths.

    Raises:
        CheckpointError: a layer that is not there, or widths that cannot be.
    """
    layers = dict(network.named_modules())
    for name, numbers in widths.items():
        layer = layers.get(name)
        if layer is None or not _can_be(layer, numbers):
            raise CheckpointError(
                f"fettle.json gives {name!r} the widths {numbers!r}, which no such layer of this network can have; "
                "copy the folder again"
            )
        if isinstance(layer, nn.Conv2d):
            layer.out_channels, layer.in_channels, layer.groups = numbers
            shape = (numbers[0], numbers[1] // numbers[2], *layer.kernel_size)
        elif isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = numbers
            shape = tuple(numbers)
        else:
            layer.num_features = numbers[0]
            shape = tuple(numbers)
        _resize(layer, shape)


def _can_be(layer: nn.Module, numbers: Any) -> bool:
    count = {nn.Conv2d: 3, nn.Linear: 2}.get(type(layer), 1 if isinstance(layer, BatchNorm) else 0)
    if not isinstance(numbers, list) or len(numbers) != count or not count:
        return False
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**20 for n in numbers):
        return False
    return count < 3 or (numbers[1] % numbers[2] == 0 and numbers[0] % numbers[2] == 0)


def _resize(layer: nn.Module, weight: tuple[int, ...]) -> None:
    """Parameters and buffers on meta in their new shapes."""
    for key, parameter in layer._parameters.items():
        if parameter is not None:
            shape = weight if key == "weight" else weight[:1]
            layer._parameters[key] = nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"))
    for key, buffer in layer._buffers.items():
        if buffer is not None and buffer.ndim:
            layer._buffers[key] = torch.empty(weight[:1], dtype=buffer.dtype, device="meta")
