"""config.json of a model with fewer blocks or narrower widths: every key that depends on them, and nothing else.

A key that the file leaves to its default is written out as soon as the default would mean something else: a head size
that follows from hidden / heads, a number of key-value heads that follows from the heads, the attention type of each
block that follows from its number. What transformers makes of the file is asked for those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fettle.errors import ModelError, RecipeError
from fettle.models.anatomy import dimensions
from fettle.models.block_widths import cut_table
from fettle.models.families import DIMENSIONS, find_family

#: lists with one entry a block
_BY_BLOCK = ("layer_types", "attention_layers", "no_rope_layers")
#: numbers that say from which block on something holds; the lists above say it once they are written out
_BLOCK_NUMBERS = ("max_window_layers",)


def with_blocks(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The configuration of the model with these blocks alone, in this order."""
    found = {**config, **cut_table(config, list(kept))}
    told = _as_transformers_reads(config)
    layers = dimensions(config, find_family(config["model_type"]))["layers"]
    found[_key(config, "layers")] = len(kept)
    for key in _BY_BLOCK:
        values = told.get(key)
        if isinstance(values, list) and len(values) == layers:
            found[key] = [values[block] for block in kept]
    if "attention_types" in told:  # GPT-Neo: [[[types], repetitions]], from which the list follows
        found["attention_types"] = [[found["attention_layers"], 1]]
    for key in _BLOCK_NUMBERS:
        if isinstance(told.get(key), int) and key in config:
            found[key] = sum(1 for block in kept if block < told[key])
    if told.get("decoder_sparse_step") is not None:  # Qwen3-MoE: which blocks are dense
        step, dense = told["decoder_sparse_step"], set(told.get("mlp_only_layers") or ())
        found["decoder_sparse_step"] = 1
        found["mlp_only_layers"] = [
            place for place, block in enumerate(kept) if block in dense or (block + 1) % step != 0
        ]
    return found


def with_sizes(config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The configuration with other numbers for some symbols of `DIMENSIONS`; the head size stays what it was.

    Raises:
        ModelError: the family's configuration has no key for a size.
    """
    found = dict(config)
    family = find_family(config["model_type"])
    before = dimensions(config, family)
    if {"hidden", "heads"} & sizes.keys() and before["head_dim"] * sizes.get("heads", before["heads"]) != sizes.get(
        "hidden", before["hidden"]
    ):
        found["head_dim"] = before["head_dim"]
    if "heads" in sizes and "kv_heads" in before and "kv_heads" not in sizes:
        sizes = {**sizes, "kv_heads": before["kv_heads"]}
    for symbol, size in sizes.items():
        if symbol == "kv_heads" and size == sizes.get("heads", before["heads"]) and not _present(config, symbol):
            continue
        found[_key(config, symbol)] = size
    return found


def require_known(config: Mapping[str, Any]) -> None:
    """Raises RecipeError for a configuration that transformers refuses: factors of rotary positions may be as many as
    half of hidden / heads, whatever the head size is said to be (Phi-3 with long context).
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        _as_transformers_reads(config)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise RecipeError(
            f"transformers refuses a {config.get('model_type')} model of this shape ({' '.join(str(error).split())}); "
            "change other widths, or drop layers"
        ) from error


def _present(config: Mapping[str, Any], symbol: str) -> bool:
    return any(key in config for key in DIMENSIONS[symbol])


def _key(config: Mapping[str, Any], symbol: str) -> str:
    """The key of config.json that holds a size; where none does, the one that transformers knows."""
    for table in (config, _as_transformers_reads(config)):
        for key in DIMENSIONS[symbol]:
            if key in table:
                return key
    raise ModelError(f"a {config.get('model_type')} configuration has no key for {' or '.join(DIMENSIONS[symbol])}.")


def _as_transformers_reads(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with every default spelled out."""
    import transformers

    fields = {key: value for key, value in config.items() if key != "quantization_config"}
    read: dict[str, Any] = transformers.AutoConfig.for_model(**fields).to_dict()
    return read
