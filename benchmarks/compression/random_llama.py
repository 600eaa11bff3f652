"""Write a random-weight Llama of TinyLlama-1.1B's shape, sharded, bf16: what the compression benchmarks run on.

Random weights cost the same time and memory as trained ones; nothing about quality is measured on them. The tokenizer
is the embedded model's (its ids are all below 32,000), so that text can be cut into windows.

    python benchmarks/compression/random_llama.py build/llama-1.1b
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from fettle.models.source import resolve

HIDDEN, BLOCKS, HEADS, KV_HEADS, MLP, VOCABULARY = 2048, 22, 32, 4, 5632, 32_000


def block_shapes(hidden: int, heads: int, kv_heads: int, mlp: int) -> dict[str, tuple[int, ...]]:
    """Tensor name inside a block → shape."""
    kv = hidden // heads * kv_heads
    return {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }


def write(folder: Path, *, hidden: int = HIDDEN, blocks: int = BLOCKS, mlp: int = MLP, seed: int = 0) -> None:
    """Writes config, shards of two blocks each, index and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "num_hidden_layers": blocks, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "intermediate_size": mlp, "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 0,
        "eos_token_id": 1, "rope_theta": 10000.0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.empty(shape).normal_(0, 0.02, generator=generator).to(torch.bfloat16)

    units: list[dict[str, tuple[int, ...]]] = [
        {
            "model.embed_tokens.weight": (VOCABULARY, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (VOCABULARY, hidden),
        }
    ]
    inside = block_shapes(hidden, HEADS, KV_HEADS, mlp)
    for first in range(0, blocks, 2):
        names = {f"model.layers.{i}.{n}": s for i in range(first, min(first + 2, blocks)) for n, s in inside.items()}
        units.append(names)
    weight_map, total = {}, 0
    for number, unit in enumerate(units, start=1):
        shard = f"model-{number:05d}-of-{len(units):05d}.safetensors"
        tensors = {name: draw(shape) for name, shape in unit.items()}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve("demo") / name, folder / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    args = parser.parse_args()
    write(args.folder, blocks=args.blocks)
