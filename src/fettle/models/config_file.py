"""The JSON files of a model folder, believed only after a look: `config.json` above all.

What: `read_json` reads one JSON object from a regular file; `read_config` also checks what `config.json` says. A number
that is NaN or infinite, a word where a number belongs, a `quantization_config` that is no object: each of them would
otherwise surface later, as a traceback out of another library, or as a model that answers garbage.

Only keys that mean the same in every family are checked here, and null always stands for "not said"; the sizes of a
known family are checked with its table (`anatomy.py`), the schemes of stored codes where they are read (`storage.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fettle.errors import CheckpointError

QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises `CheckpointError` where it is missing, unreadable or no JSON object."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no regular file; a model is a Hugging Face folder of plain files.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}. A model is a Hugging Face folder; check the path."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}). Check the file and its permissions."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Copy or download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds {type(content).__name__}, not a JSON object.")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """What `config.json` in `folder` says; raises `CheckpointError` naming the key that cannot be."""
    path = folder / "config.json"
    config = read_json(path)
    for key, value in _leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise damaged(path, f"{key} is {value}, and must be a finite number")
    for key, value in config.items():
        wanted = _KINDS.get(key)
        if wanted is not None and value is not None and not wanted[0](value):
            raise damaged(path, f"{key} is {value!r}, and must be {wanted[1]}")
    return config


def damaged(path: Path, what: str) -> CheckpointError:
    """The error for a configuration that cannot be, in one sentence with the next step."""
    return CheckpointError(f"{path.name} is damaged: {what}. Correct {path}, or download it again.")


def check_token_ids(path: Path, table: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` for token ids in `table`, read from `path`, that are no numbers of tokens."""
    for key in _TOKENS:
        if table.get(key) is not None and not _are_ids(table[key]):
            raise damaged(path, f"{key} is {table[key]!r}, and must be {_IDS}")


def context_length(config: Mapping[str, Any]) -> int | None:
    """The tokens that a model's context holds, under the name that its family gives it; None where it says none."""
    for key in ("max_position_embeddings", "n_positions", "n_ctx"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return None


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value inside, with its dotted key."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{prefix}[{index}]")
    else:
        yield prefix, value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_dtype(value: Any) -> bool:
    named = isinstance(value, str) and getattr(torch, value.removeprefix("torch."), None)
    return value == "auto" or isinstance(named, torch.dtype)


def _are_ids(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, list) and all(map(_is_whole, value)))


_IDS = "a whole number, or a list of whole numbers"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_WHOLE = ("num_experts_per_tok", "sliding_window")
_CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx")
_NUMBERS = (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "rotary_pct", "partial_rotary_factor",
    "attention_dropout", "initializer_range", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping",
)  # fmt: skip
_TEXTS = ("model_type", "hidden_act", "hidden_activation", "activation_function")
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")

#: key → (whether a value can be, what is allowed)
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_WHOLE, (_is_whole, "a whole number")),
    **dict.fromkeys(_CONTEXTS, (lambda value: _is_whole(value) and value > 0, "a whole number of at least 1")),
    **dict.fromkeys(_NUMBERS, (_is_number, "a number")),
    **dict.fromkeys(_TEXTS, (lambda value: isinstance(value, str), "a name in quotes")),
    **dict.fromkeys(_FLAGS, (lambda value: isinstance(value, bool), "true or false")),
    **dict.fromkeys(_TOKENS, (_are_ids, _IDS)),
    **dict.fromkeys(("dtype", "torch_dtype"), (_is_dtype, "a dtype of torch, such as bfloat16 or float32")),
    **dict.fromkeys(QUANTIZATION_KEYS, (lambda value: isinstance(value, dict), "an object")),
    "architectures": (
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "a list of class names",
    ),
}
