"""Tiny random models of every family that fettle knows, written as ordinary Hugging Face folders.

Sizes are odd on purpose: a head size that is not hidden / heads, a MLP that no group size divides, grouped queries,
two sliding windows shorter than the text, biases that are not zero, norms that are not one. A test that passes on
defaults proves little.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

#: name → (transformers' class name, configuration). The names are the test ids.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"model_type": "llama", **COMMON, "tie_word_embeddings": False}),
    "llama-tied-biased": (
        "LlamaForCausalLM",
        {"model_type": "llama", **COMMON, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama3": (
        "LlamaForCausalLM",
        {
            "model_type": "llama",
            **COMMON,
            "tie_word_embeddings": False,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "mistral": (
        "MistralForCausalLM",
        {"model_type": "mistral", **COMMON, "head_dim": 6, "sliding_window": 8, "tie_word_embeddings": False},
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        {
            "model_type": "qwen2",
            **COMMON,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", {"model_type": "qwen3", **COMMON, "head_dim": 12, "tie_word_embeddings": False}),
    "phi3": ("Phi3ForCausalLM", {"model_type": "phi3", **COMMON, "tie_word_embeddings": False, "sliding_window": 8}),
    "phi3-longrope": (
        "Phi3ForCausalLM",
        {
            "model_type": "phi3",
            **COMMON,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 16,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0]},
        },
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            "model_type": "gemma2",
            **COMMON,
            "head_dim": 12,
            "sliding_window": 8,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "model_type": "gpt2",
            "vocab_size": 96,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_inner": 44,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "scale_attn_by_inverse_layer_idx": True,
        },
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        {
            "model_type": "gpt_neox",
            **{k: v for k, v in COMMON.items() if k != "num_key_value_heads"},
            "rotary_pct": 0.25,
            "tie_word_embeddings": False,
        },
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {
            "model_type": "gpt_neo",
            "vocab_size": 96,
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "intermediate_size": 44,
            "max_position_embeddings": 64,
            "window_size": 8,
            "attention_types": [[["global", "local"], 2]],
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {
            "model_type": "mixtral",
            **COMMON,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {
            "model_type": "qwen3_moe",
            **COMMON,
            "head_dim": 12,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        },
    ),
    "bert": (
        "BertModel",
        {
            "model_type": "bert",
            **{k: v for k, v in COMMON.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")},
        },
    ),
    "bert-masked-lm": (
        "BertForMaskedLM",
        {
            "model_type": "bert",
            **{k: v for k, v in COMMON.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")},
        },
    ),
}


def make_model(name: str, *, seed: int = 0) -> torch.nn.Module:
    """The tiny model `name`, float32, in evaluation mode, every parameter random (norms and biases too)."""
    import transformers

    class_name, fields = TINY[name]
    settings = dict(fields)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    model: torch.nn.Module = getattr(transformers, class_name)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the plain loop, whose sums ours must repeat exactly
    return model.eval()


def reference_output(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits, or the last hidden state of a model without a head, for ids [tokens]."""
    with torch.no_grad():
        result = model(ids[None])
    output: torch.Tensor = getattr(result, "logits", None) if "logits" in result else result.last_hidden_state
    return output


def write_model(name: str, folder: Path, *, seed: int = 0, shard_bytes: int | None = None) -> torch.nn.Module:
    """Writes the tiny model into `folder` as transformers does and returns it."""
    model = make_model(name, seed=seed)
    extra = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
    model.save_pretrained(folder, **extra)  # type: ignore[operator]
    return model


def random_ids(count: int, *, seed: int = 0, vocabulary: int = 96) -> torch.Tensor:
    """Token ids, int64 [count]; never the padding id 0."""
    return torch.randint(1, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))
