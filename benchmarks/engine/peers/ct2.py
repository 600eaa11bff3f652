"""CTranslate2 with int8 weights, made of random numbers without a converter.

    python ct2.py int8 --blocks 22 --threads 2 --folder DIR

It generates for itself, so a decoded token's time is that of 17 tokens less that of one, by 16.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from ctranslate2.specs import common_spec, transformer_spec
from turns import (
    DECODED,
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    KV_HEADS,
    MLP,
    PROMPT,
    TOGETHER,
    VOCABULARY,
    peer_options,
    take_turns,
)


def random_linear(spec: Any, rows: int, columns: int, random: np.random.Generator) -> None:
    spec.weight = (random.standard_normal((rows, columns), np.float32) * 0.02).astype(np.float32)


def write(folder: Path, count: int) -> None:
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        count, HEADS, activation=common_spec.Activation.SWISH, pre_norm=True, ffn_glu=True, rms_norm=True,
        rotary_dim=0, rotary_interleave=False, rotary_base=10000, num_heads_kv=KV_HEADS,
    )  # fmt: skip
    random, ones = np.random.default_rng(0), np.ones(HIDDEN, np.float32)
    decoder = spec.decoder
    decoder.scale_embeddings = False
    random_linear(decoder.embeddings, VOCABULARY, HIDDEN, random)
    random_linear(decoder.projection, VOCABULARY, HIDDEN, random)
    decoder.layer_norm.gamma = ones
    for layer in decoder.layer:
        layer.self_attention.layer_norm.gamma = ones
        random_linear(layer.self_attention.linear[0], HIDDEN + 2 * KV_HEADS * HEAD_SIZE, HIDDEN, random)
        random_linear(layer.self_attention.linear[1], HIDDEN, HIDDEN, random)
        layer.ffn.layer_norm.gamma = ones
        random_linear(layer.ffn.linear_0, MLP, HIDDEN, random)
        random_linear(layer.ffn.linear_0_noact, MLP, HIDDEN, random)
        random_linear(layer.ffn.linear_1, HIDDEN, MLP, random)
    spec.register_vocabulary([f"t{i}" for i in range(VOCABULARY)])
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "t1", "t2", "t0"
    spec.validate()
    spec.optimize(quantization="int8")
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))


def main() -> None:
    options = peer_options(__doc__, ("int8",))
    folder = options.folder / f"ct2-{options.blocks}"
    if not (folder / "model.bin").exists():
        write(folder, options.blocks)
    generator = ctranslate2.Generator(str(folder), device="cpu", compute_type="int8", intra_threads=options.threads)

    def seconds(sequences: int, new: int) -> float:
        began = time.perf_counter()
        generator.generate_batch(
            [["t7"] * PROMPT] * sequences, max_length=new, min_length=new, sampling_topk=1,
            include_prompt_in_result=False, max_batch_size=sequences,
        )  # fmt: skip
        return time.perf_counter() - began

    def decode(sequences: int) -> float:
        return seconds(sequences, DECODED + 1) - seconds(sequences, 1)

    seconds(1, 1)
    work = {"prefill": lambda: seconds(1, 1), "decode": lambda: decode(1), "decode8": lambda: decode(TOGETHER)}
    told = {"engine": f"CTranslate2 {ctranslate2.__version__}", "bytes": (folder / "model.bin").stat().st_size}
    take_turns(work, told)


if __name__ == "__main__":
    main()
