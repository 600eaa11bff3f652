"""Blocks of different widths: a table in config.json that says how many neurons and heads each block has.

    fettle_widths: {neurons: [96, 160, …], heads: [4, 2, …], kv_heads: [2, 1, …]}      one entry a block

A configuration of transformers has one number for all blocks. Where this table stands, the anatomy expects each block's
matrices in its own shape, and the module tree is built as the configuration says and its linears are then replaced.
That is all it takes: attention cuts its inputs into heads by the head's size, whose number follows; key-value groups
stay as large as they were. Plain transformers does not know the table, finds other shapes than it expects, and refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fettle.errors import CheckpointError
from fettle.models.parts import Anatomy

WIDTHS_KEY = "fettle_widths"
SYMBOLS = {"neurons": "mlp", "heads": "heads", "kv_heads": "kv_heads"}
#: families without fused queries, keys and values and without experts, whose attention asks no configuration for heads
BY_BLOCK = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "bert"})


def block_dimensions(config: Mapping[str, Any], dims: Mapping[str, int], index: int) -> dict[str, int]:
    """The symbols of a block's shapes: the model's, or what the table says of this block.

    Raises:
        CheckpointError: a table that does not fit the number of blocks, or holds what is no width.
    """
    table = config.get(WIDTHS_KEY)
    if table is None:
        return dict(dims)
    found = dict(dims)
    for name, symbol in SYMBOLS.items():
        values = table.get(name) if isinstance(table, Mapping) else None
        listed = values if isinstance(values, list) else []
        if len(listed) != dims["layers"] or not all(type(value) is int and value >= 1 for value in listed):
            raise CheckpointError(
                f"config.json: {WIDTHS_KEY}.{name} must list a whole number of at least 1 for each of the "
                f"{dims['layers']} blocks; copy config.json again."
            )
        if index < len(listed):
            found[symbol] = listed[index]
    return found | {"q": found["heads"] * found["head_dim"], "kv": found["kv_heads"] * found["head_dim"]}


def fit_tree(model: nn.Module, anatomy: Anatomy) -> None:
    """Replaces every linear on meta whose shape the table changed."""
    for linear in anatomy.linears():
        path = linear.slot.parameter.removesuffix(".weight")
        module = model.get_submodule(path)
        out, into = linear.shape
        if not isinstance(module, nn.Linear) or (module.out_features, module.in_features) == (out, into):
            continue
        fitting = nn.Linear(into, out, bias=module.bias is not None, device="meta", dtype=module.weight.dtype)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, fitting)


def cut_table(config: Mapping[str, Any], kept: list[int]) -> dict[str, Any]:
    """The table of a model with these blocks alone, as part of its configuration; empty where there is none."""
    table = config.get(WIDTHS_KEY)
    return {} if table is None else {WIDTHS_KEY: {name: [values[i] for i in kept] for name, values in table.items()}}


def are_heads_alike(config: Mapping[str, Any]) -> bool:
    """Whether all blocks have the same heads."""
    table = config.get(WIDTHS_KEY)
    return table is None or len(set(zip(table["heads"], table["kv_heads"], strict=True))) == 1


def head_counts(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Heads and key-value heads of all blocks, where the table says them and they are alike."""
    table = config.get(WIDTHS_KEY)
    return None if table is None or not are_heads_alike(config) else (table["heads"][0], table["kv_heads"][0])


__all__ = ["BY_BLOCK", "WIDTHS_KEY", "are_heads_alike", "block_dimensions", "cut_table", "fit_tree", "head_counts"]
