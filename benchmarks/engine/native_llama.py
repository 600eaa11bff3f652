"""Prefill and decode of the native decoder on random weights in the shape of TinyLlama-1.1B, one JSON line out.

    python benchmarks/engine/native_llama.py [--bits 4 --group-size 32 --blocks 22 --threads 2 --repeats 5]

The blocks' matrices and the head have `--bits` codes with float16 scales, the embedding is float16; the table is made
here, without a checkpoint. Decode goes over all weights a token, so bytes of weights × tokens a second is held against
the bandwidth that this machine reads with, prefill against its peak for products of bytes; both are measured before
every repeat, and shares are medians of the repeats' own ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np

from fettle.engine.runner import Batch, Piece, pack
from fettle.kernels.native import plane
from fettle.tensors.grid import Grid, uniform
from fettle.tensors.levels import named

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, MLP, VOCABULARY = 2048, 32, 4, 64, 5632, 32000
PAGE = 16


def grid_of(options: argparse.Namespace) -> Grid:
    """Ternary where no bits are given."""
    return uniform(options.bits) if options.bits else named("ternary")


def coded(
    rows: int, columns: int, options: argparse.Namespace, pool: Any, codes: np.ndarray, scale: float = 0.01
) -> dict[str, Any]:
    grid, group = grid_of(options), options.group_size
    scales = np.full((rows, -(-columns // group)), scale, np.float16).view(np.uint16)
    taken = np.ascontiguousarray(codes[: rows * columns].reshape(rows, columns))
    matrix = plane().coded(taken, columns, 8, grid.bits, group, scales, "float16", list(grid.levels), None, 1.0, pool)
    return {"matrix": matrix, "bias": None}


def make_table(options: argparse.Namespace, pool: Any) -> dict[str, Any]:
    random = np.random.default_rng(0)
    codes = random.integers(0, len(grid_of(options).levels), VOCABULARY * HIDDEN, dtype=np.uint8)
    norm = {"kind": "rms", "weight": np.ones(HIDDEN, np.float32), "bias": None, "eps": 1e-5}
    narrow = KV_HEADS * HEAD_SIZE

    def block() -> dict[str, Any]:
        shapes = {
            "query": (HIDDEN, HIDDEN),
            "key": (narrow, HIDDEN),
            "value": (narrow, HIDDEN),
            "output": (HIDDEN, HIDDEN),
        }
        mlp = {"gate": (MLP, HIDDEN), "up": (MLP, HIDDEN), "down": (HIDDEN, MLP)}
        names = ("query_norm", "key_norm", "after_attention_norm", "after_mlp_norm", "mixture")
        return {
            **{name: coded(*shape, options, pool, codes) for name, shape in shapes.items()},
            "mlp": {name: coded(*shape, options, pool, codes) for name, shape in mlp.items()},
            **dict.fromkeys(names),
            "attention_norm": norm, "mlp_norm": norm, "attention_scale": HEAD_SIZE**-0.5, "attention_cap": 0.0,
            "window": 0, "rotary": 0, "parallel": False, "activation": "silu",
        }  # fmt: skip

    embedding = random.standard_normal((VOCABULARY, HIDDEN), np.float32).astype(np.float16).view(np.uint16)
    frequencies = (10000.0 ** (-np.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)).astype(np.float32)
    return {
        "hidden": HIDDEN, "heads": HEADS, "kv_heads": KV_HEADS, "head_size": HEAD_SIZE, "vocabulary": VOCABULARY,
        "context": 0, "rotary_switch": 0, "embedding_scale": 1.0, "logit_cap": 0.0,
        "rotaries": [{"frequencies": frequencies, "long_frequencies": None, "factor": 1.0, "long_factor": 1.0}],
        "embedding": plane().dense(embedding, "float16", pool), "positions": None,
        "head": coded(VOCABULARY, HIDDEN, options, pool, codes)["matrix"], "head_bias": None, "last_norm": norm,
        "blocks": [block() for _ in range(options.blocks)],
    }  # fmt: skip


def batch_of(count: int, tokens: int, start: int) -> Batch:
    """`count` sequences with `tokens` new tokens each behind `start` old ones; pages lie one after another."""
    pages = -(-(start + tokens) // PAGE)
    pieces = [
        Piece(tokens=[7] * tokens, start=start, pages=range(i * 64, i * 64 + pages), known=start + tokens, logits=1)
        for i in range(count)
    ]
    return pack(pieces)


def seconds(decoder: Any, batch: Batch) -> float:
    arrays = (
        batch.tokens,
        batch.positions,
        batch.query_starts,
        batch.known_lengths,
        batch.page_table,
        batch.logit_rows,
    )
    began = time.perf_counter()
    decoder.step(*arrays, batch.copies)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("bits", 4),
        ("group-size", 32),
        ("blocks", 22),
        ("threads", 2),
        ("repeats", 5),
        ("decode", 16),
        ("context", 512),  # tokens that are there when decoding begins
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    pool = plane().Pool(options.threads)
    began = time.perf_counter()
    decoder = plane().Decoder(make_table(options, pool), 512, PAGE, "float16", pool, True)
    loading = time.perf_counter() - began
    read = decoder.weight_bytes - VOCABULARY * HIDDEN * 2  # the embedding gives one row a token
    weights = options.blocks * (2 * HIDDEN * HIDDEN + 2 * KV_HEADS * HEAD_SIZE * HIDDEN + 3 * MLP * HIDDEN)
    found: dict[str, list[float]] = {
        name: [] for name in ("prefill", "decode", "decode8", "bandwidth", "peak", "memory_share", "arithmetic_share")
    }
    seconds(decoder, batch_of(1, 64, 0))
    for _ in range(options.repeats):
        found["bandwidth"].append(plane().memory_bandwidth(pool, 1 << 28, 1))
        found["peak"].append(plane().integer_peak(pool, 1))
        found["prefill"].append(512 / seconds(decoder, batch_of(1, 512, 0)))
        found["decode"].append(
            options.decode / sum(seconds(decoder, batch_of(1, 1, options.context + i)) for i in range(options.decode))
        )
        found["decode8"].append(8 / seconds(decoder, batch_of(8, 1, options.context)))
        found["memory_share"].append(found["decode"][-1] * read / found["bandwidth"][-1])
        found["arithmetic_share"].append(found["prefill"][-1] * 2 * weights / found["peak"][-1])
    middle = {name: statistics.median(values) for name, values in found.items()}
    print(json.dumps({
        "benchmark": "native_llama", "bits": options.bits, "group_size": options.group_size, "blocks": options.blocks,
        "threads": options.threads, "context": options.context, "weight_bytes_read": read,
        "seconds_to_make": round(loading, 2),
        "prefill_tokens_per_second": round(middle["prefill"], 2),
        "decode_tokens_per_second": round(middle["decode"], 2),
        "decode_tokens_per_second_8": round(middle["decode8"], 2),
        "memory_bandwidth_gb_per_second": round(middle["bandwidth"] / 1e9, 2),
        "integer_peak_gop_per_second": round(middle["peak"] / 1e9, 1),
        "memory_bandwidth_share": round(middle["memory_share"], 3),
        "arithmetic_share": round(middle["arithmetic_share"], 3),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
