"""llama.cpp, through llama-cpp-python: a GGUF file of random blocks in a type, written with the gguf library.

    python llamacpp.py Q4_0 --blocks 22 --threads 2 --folder DIR

Blocks hold random bytes but for their scales, which are small numbers. The head is Q6_K in every type, as llama.cpp's
own quantization has it; Q4_K_M has Q6_K in half of its value and down matrices.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
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

#: type → where its blocks have 16-bit scales
SCALES = {"Q4_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "IQ3_S": (0,), "TQ2_0": (64,)}
FILES = ("Q4_0", "Q4_K_M", "Q2_K", "IQ3_S", "TQ2_0")


def blocks(kind: str, rows: int, columns: int, random: np.random.Generator) -> np.ndarray:
    """uint8 [rows, bytes]."""
    width, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    made = random.integers(0, 256, (rows * columns // width, size), np.uint8)
    small = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
    for place in SCALES[kind]:
        made[:, place : place + 2] = small
    return made.reshape(rows, -1)


def write(path: Path, kind: str, count: int) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(count)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    random, plain = np.random.default_rng(0), "Q4_K" if kind == "Q4_K_M" else kind

    def add(name: str, rows: int, columns: int, type: str) -> None:
        writer.add_tensor(name, blocks(type, rows, columns, random), raw_dtype=gguf.GGMLQuantizationType[type])

    add("token_embd.weight", VOCABULARY, HIDDEN, "Q4_K" if kind in ("Q4_K_M", "TQ2_0") else plain)
    add("output.weight", VOCABULARY, HIDDEN, "Q6_K")
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    narrow = KV_HEADS * HEAD_SIZE
    for i in range(count):
        better = "Q6_K" if kind == "Q4_K_M" and i % 2 == 0 else plain
        add(f"blk.{i}.attn_q.weight", HIDDEN, HIDDEN, plain)
        add(f"blk.{i}.attn_k.weight", narrow, HIDDEN, plain)
        add(f"blk.{i}.attn_v.weight", narrow, HIDDEN, better)
        add(f"blk.{i}.attn_output.weight", HIDDEN, HIDDEN, plain)
        add(f"blk.{i}.ffn_gate.weight", MLP, HIDDEN, plain)
        add(f"blk.{i}.ffn_up.weight", MLP, HIDDEN, plain)
        add(f"blk.{i}.ffn_down.weight", HIDDEN, MLP, better)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    options = peer_options(__doc__, FILES)
    path = options.folder / f"{options.format}-{options.blocks}.gguf"
    if not path.exists():
        write(path.with_suffix(".part"), options.format, options.blocks)
        path.with_suffix(".part").rename(path)
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp does not open {path.name}")
    wanted = llama_cpp.llama_context_default_params()
    wanted.n_ctx, wanted.n_batch, wanted.n_ubatch, wanted.n_seq_max = 8192, PROMPT, PROMPT, TOGETHER
    wanted.n_threads = wanted.n_threads_batch = options.threads
    wanted.kv_unified = True
    context = llama_cpp.llama_init_from_model(model, wanted)
    memory = llama_cpp.llama_get_memory(context)
    batch = llama_cpp.llama_batch_init(PROMPT, 0, 1)

    def run(tokens: list[tuple[int, int]], all_logits: bool) -> None:
        """(position, sequence) of each token."""
        batch.n_tokens = len(tokens)
        for i, (position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = 7, position, 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = all_logits or i == len(tokens) - 1
        if llama_cpp.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_synchronize(context)

    def prefill() -> Any:
        llama_cpp.llama_memory_clear(memory, True)
        run([(i, 0) for i in range(PROMPT)], False)

    def decode() -> None:
        llama_cpp.llama_memory_seq_rm(memory, -1, PROMPT, -1)
        for i in range(DECODED):
            run([(PROMPT + i, 0)], True)

    def decode8() -> None:
        llama_cpp.llama_memory_seq_rm(memory, -1, PROMPT, -1)
        for sequence in range(1, TOGETHER):
            llama_cpp.llama_memory_seq_cp(memory, 0, sequence, 0, PROMPT)
        for i in range(DECODED):
            run([(PROMPT + i, sequence) for sequence in range(TOGETHER)], True)

    prefill()
    take_turns(
        {"prefill": prefill, "decode": decode, "decode8": decode8},
        {"engine": f"llama.cpp {llama_cpp.__version__}", "bytes": path.stat().st_size},
    )


if __name__ == "__main__":
    main()
