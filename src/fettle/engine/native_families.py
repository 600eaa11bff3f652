"""What the native decoder must know of a family beside its matrices: norms, and how attention is scaled, as data.

`models/families.py` says where matrices are; this says what stands between them. Keys of the configuration are those of
transformers, first found wins. A new family costs a row here, if its blocks are built of the same parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from fettle.errors import UsageError, unknown_word
from fettle.models.anatomy import Anatomy

#: transformers' name of an activation → the data plane's
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True, kw_only=True)
class NativeFamily:
    """One family's parts.

    Attributes:
        attention_norm: the tensor before attention, without `.weight`, inside a block; so are the other names.
        mlp_norm: before the MLP.
        after_attention_norm: on what attention gives, before it is added.
        after_mlp_norm: on what the MLP gives.
        head_norms: of each query and key head.
        last_norm: before the head, outside the blocks.
        norm: which norm all of them are.
        norm_offset: a norm multiplies by this plus its weight.
        positions: learned positions, outside the blocks.
        embedding_scaled: by the square root of the hidden size.
        renormalize: a mixture's shares sum to 1 whatever the configuration says.
    """

    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    after_attention_norm: str | None = None
    after_mlp_norm: str | None = None
    head_norms: tuple[str, str] | None = None
    last_norm: str = "norm"
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    positions: str | None = None
    embedding_scaled: bool = False
    renormalize: bool = False


_LLAMA = NativeFamily()
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_GPT = NativeFamily(attention_norm="ln_1", mlp_norm="ln_2", last_norm="ln_f", norm="layer", positions="wpe")
FAMILIES: dict[str, NativeFamily] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": NativeFamily(head_norms=_HEAD_NORMS),
    "phi3": _LLAMA,
    "gemma2": NativeFamily(
        mlp_norm="pre_feedforward_layernorm",
        after_attention_norm="post_attention_layernorm",
        after_mlp_norm="post_feedforward_layernorm",
        norm_offset=1.0,
        embedding_scaled=True,
    ),
    "gpt2": _GPT,
    "gpt_neo": _GPT,
    "gpt_neox": NativeFamily(last_norm="final_layer_norm", norm="layer"),
    "mixtral": NativeFamily(renormalize=True),
    "qwen3_moe": NativeFamily(head_norms=_HEAD_NORMS),
}


def native_family(anatomy: Anatomy) -> NativeFamily:
    """The parts of a model's family.

    Raises:
        UsageError: an encoder, or a family without a row here.
    """
    found = FAMILIES.get(anatomy.family)
    if found is None or anatomy.head is None:
        raise UsageError(
            f"{unknown_word('family of the native engine', anatomy.family, FAMILIES)}. Use --engine torch, which runs "
            "all of them"
        )
    return found


def setting(config: Any, names: tuple[str, ...], otherwise: Any = None) -> Any:
    """The first of these that the configuration has and that is not None."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), otherwise)


def window_of(config: Any, block: int) -> int:
    """How many keys a query of this block sees, its own among them; 0 for all."""
    local = getattr(config, "attention_layers", None)
    if local is not None:
        return int(config.window_size) if local[block] == "local" else 0
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[block] != "sliding_attention":
        return 0
    return int(getattr(config, "sliding_window", None) or 0)


def attention_scale(config: Any, block: int, head_size: int) -> float:
    """What scores are multiplied by before the softmax."""
    if getattr(config, "attention_layers", None) is not None:
        return 1.0  # GPT-Neo was trained so
    scale = 1.0 / math.sqrt(float(setting(config, ("query_pre_attn_scalar",), head_size)))
    if getattr(config, "scale_attn_weights", True) is False:
        scale = 1.0
    return scale / (block + 1) if getattr(config, "scale_attn_by_inverse_layer_idx", False) else scale


def activation_of(config: Any) -> str:
    """The MLP's activation as the data plane calls it.

    Raises:
        UsageError: it has none like it.
    """
    name = str(setting(config, ("hidden_activation", "hidden_act", "activation_function"), "silu"))
    if name not in ACTIVATIONS:
        raise UsageError(f"{unknown_word('activation of the native engine', name, ACTIVATIONS)}. Use --engine torch")
    return ACTIVATIONS[name]
