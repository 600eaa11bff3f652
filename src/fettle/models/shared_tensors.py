"""Matrices that blocks share: stored once, read under every name.

    X1.weight = X0.weight                                   config.json: quantization_config.shared names X1 → X0
    X1.weight = S.weight_shared + left · right              with the two thin factors beside it, where there are any

What: a folder that ties blocks (`methods/reshape/share_blocks.py`) holds one tensor for all of them. A `Checkpoint`
lists every name that a model of this configuration has, so anatomy, loading, engines and evaluation read the tied
blocks as if each had a matrix of its own; a shared name counts no bytes and no parameters.

Where it stands: inside of `quantization_config`, with the quant method `fettle`, so that a loader that cannot read it
refuses with a sentence instead of filling the missing matrices with noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fettle.errors import CheckpointError
from fettle.models.header import TensorEntry

COMMON, LEFT, RIGHT = "weight_shared", "weight_difference_left", "weight_difference_right"


def shared_names(config: Mapping[str, Any]) -> dict[str, str]:
    """The names of tensors that are stored under another name → that name.

    Raises:
        CheckpointError: the table in config.json is no table of names.
    """
    quantization = config.get("quantization_config")
    table = quantization.get("shared", {}) if isinstance(quantization, Mapping) else {}
    if not isinstance(table, Mapping) or not all(isinstance(x, str) for pair in table.items() for x in pair):
        raise CheckpointError("config.json: quantization_config.shared must be a table of tensor names; copy it again.")
    return dict(table)


def shared_entries(shared: Mapping[str, str], entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """What the headers would say of the tensors that are stored under another name: no bytes of their own.

    Raises:
        CheckpointError: a name that is stored after all, a source that is not, or factors of another shape.
    """
    found = {}
    for name, source in shared.items():
        if name in entries or source not in entries or len(entries[source].shape) != 2:
            raise CheckpointError(
                f"config.json says that tensor {name!r} is stored as {source!r}, which does not fit what the files "
                "hold; copy config.json again."
            )
        rows, columns = entries[source].shape
        pair = [entries.get(factor) for factor in factor_names(name)]
        if any(pair):
            shapes = [None if entry is None else entry.shape for entry in pair]
            left, right = shapes
            if left is None or right is None or left[:1] + right[1:] != (rows, columns) or left[1] != right[0]:
                raise CheckpointError(
                    f"the factors of {name!r} have the shapes {shapes}; their product must be [{rows}, {columns}]."
                )
        found[name] = replace(entries[source], name=name, nbytes=0)
    return found


def factor_names(name: str) -> tuple[str, str]:
    """The tensors whose product is added to what `X.weight` shares, where there is a difference."""
    stem = name.removesuffix(".weight")
    return f"{stem}.{LEFT}", f"{stem}.{RIGHT}"


def common_name(name: str) -> str:
    """Where the part that all share is stored, if each has a difference of its own."""
    return f"{name.removesuffix('.weight')}.{COMMON}"


def is_part(name: str) -> bool:
    """Whether a tensor is the common part or a factor: no parameter of the model by that name."""
    return name.rpartition(".")[2] in (COMMON, LEFT, RIGHT)
