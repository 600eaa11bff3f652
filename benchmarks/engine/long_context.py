"""Memory against the length of the context: a tiny Llama reads 8k, 32k and 128k tokens, then decodes.

python benchmarks/engine/long_context.py [--engine torch] [--lengths 8192,32768,131072] [--chunk 256]

Each length runs in a process of its own. Reported: the cache's bytes, the peak of resident memory above that of the
loaded model, both a token, and the seconds. An attention matrix of a whole prompt would be tokens² · 4 bytes a head:
its size is told beside. One JSON line.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHUNK, HEADS, LAYERS, HEAD_SIZE = 256, 2, 2, 16


def write_model(folder: Path, context: int) -> None:
    """A random Llama: 2 blocks, 2 heads of 16, one of them for keys and values, and a context of any length."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=HEADS * HEAD_SIZE,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        max_position_embeddings=context,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(folder: str, engine_name: str, length: int, chunk: int) -> dict[str, float]:
    import torch

    import fettle

    engine = fettle.open_engine(
        folder,
        engine=engine_name,
        runner=fettle.RunnerOptions(cache_tokens=length + 16),
        scheduler=fettle.SchedulerOptions(max_sequences=1, max_step_tokens=chunk, reuse_prefixes=False),
    )
    warm = fettle.Request(prompt=(1,) * chunk, max_tokens=2)
    engine.generate([warm])
    before = peak_bytes()
    prompt = tuple(torch.randint(256, (length,), generator=torch.Generator().manual_seed(0)).tolist())
    began = time.perf_counter()
    made = engine.generate([fettle.Request(prompt=prompt, max_tokens=8, ignore_end=True)])[0]
    shape = engine.runner.shape
    return {
        "tokens": length,
        "cache_bytes": shape.page_bytes * shape.pages,
        "peak_bytes_above_model": peak_bytes() - before,
        "prefill_seconds": made.prefill_seconds,
        "seconds_per_decoded_token": made.decode_seconds / 7,
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--lengths", default="8192,32768,131072")
    parser.add_argument("--chunk", type=int, default=CHUNK)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(one(asked.one[0], asked.engine, int(asked.one[1]), asked.chunk)))
        return
    lengths = [int(word) for word in asked.lengths.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), max(lengths) + 64)
        found = []
        for length in lengths:
            command = [sys.executable, __file__, "--engine", asked.engine, "--chunk", str(asked.chunk)]
            done = subprocess.run([*command, "--one", folder, str(length)], check=True, capture_output=True, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    for each in found:
        each["peak_bytes_per_token"] = each["peak_bytes_above_model"] / each["tokens"]
        each["attention_matrix_bytes"] = each["tokens"] ** 2 * 4 * HEADS
    print(
        json.dumps({"benchmark": "engine/long_context", "engine": asked.engine, "chunk": asked.chunk, "lengths": found})
    )


if __name__ == "__main__":
    main()
