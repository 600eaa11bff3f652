"""Speed of the native matrix products beside this machine's own limits, one JSON line out.

    python benchmarks/kernels/native_matmul.py [--threads 2] [--rows 5632 --columns 2048] [--repeats 5] [--ggml DIR]
    python benchmarks/kernels/native_matmul.py --threads 1 --best …

For each format: one token (memory is the limit; the weight is read from memory, so many copies of it are gone through
in turn), eight tokens over the same copies, and 512 tokens (arithmetic is the limit). The machine's bandwidth and its
peak for products of bytes are measured between them, in the same run, again and again; shares are medians of each
repeat's own ratio. With --ggml, the folder of llama.cpp's libggml-base.so and libggml-cpu.so, each repeat also times
its products in the type named beside the format, and ratios are to those.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from peers.ggml import TYPES, Ggml

from fettle.kernels.native import plane
from fettle.tensors.grid import Grid, uniform
from fettle.tensors.levels import named

BEYOND_CACHE = 1 << 27  # bytes that the copies of a weight take together


def random_matrix(rows: int, columns: int, grid: Grid, group: int, pool: Any, seed: int) -> Any:
    random = np.random.default_rng(seed)
    codes = random.integers(0, len(grid.levels), (rows, columns), dtype=np.uint8)
    scales = np.full((rows, -(-columns // group)), 0.01, np.float16).view(np.uint16)
    return plane().coded(codes, columns, 8, grid.bits, group, scales, "float16", list(grid.levels), None, 1.0, pool)


def seconds(work: Any, clock: Any) -> float:
    began = clock()
    work()
    return float(clock() - began)


def rival(kind: str, options: argparse.Namespace) -> tuple[Any, Any, Any, int] | None:
    """llama.cpp's products in a type: one and eight tokens over copies beyond the caches, prefill, how many copies."""
    if options.ggml is None or not kind:
        return None
    library = Ggml(options.ggml, options.threads)
    _, block, block_bytes = TYPES[kind]
    nbytes = options.rows * options.columns // block * block_bytes
    copies = max(2, BEYOND_CACHE // nbytes)
    one = library.graph(kind, options.rows, options.columns, copies, 1)
    eight = library.graph(kind, options.rows, options.columns, copies, 8)
    many = library.graph(kind, options.rows, options.columns, 1, 512)
    library.run(many)
    return (lambda: library.run(one)), (lambda: library.run(eight)), (lambda: library.run(many)), copies


def figures(times: dict[str, float], nbytes: int, weights: int, kind: str) -> dict[str, float]:
    """What seconds say: speeds, shares of the limits, and ratios to the other program's."""
    found = {
        "decode_gb_per_second": nbytes / times["one"] / 1e9,
        "memory_bandwidth_share": nbytes / times["one"] / (BEYOND_CACHE / times["read"]),
        "eight_tokens_gop_per_second": 16 * weights / times["eight"] / 1e9,
        "prefill_gop_per_second": 1024 * weights / times["many"] / 1e9,
        "arithmetic_share": 1024 * weights / times["many"] * times["peak"],
    }
    if "other_one" in times:
        found[f"decode_speed_over_{kind}"] = times["other_one"] / times["one"]
        found[f"eight_tokens_speed_over_{kind}"] = times["other_eight"] / times["eight"]
        found[f"prefill_speed_over_{kind}"] = times["other_many"] / times["many"]
    return found


def measure(name: str, grid: Grid, group: int, kind: str, options: argparse.Namespace, pool: Any) -> dict[str, Any]:
    rows, columns = options.rows, options.columns
    first = random_matrix(rows, columns, grid, group, pool, 0)
    count = max(2, BEYOND_CACHE // first.nbytes)
    copies = [first, *(random_matrix(rows, columns, grid, group, pool, i) for i in range(1, count))]
    one = np.random.default_rng(1).standard_normal((1, columns)).astype(np.float32)
    eight = np.random.default_rng(3).standard_normal((8, columns)).astype(np.float32)
    many = np.random.default_rng(2).standard_normal((512, columns)).astype(np.float32)
    other = rival(kind, options)
    clock = time.thread_time if options.best else time.perf_counter
    repeats = []
    for _ in range(options.repeats):
        times = {
            "read": BEYOND_CACHE / plane().memory_bandwidth(pool, BEYOND_CACHE, 1),
            "peak": 1 / plane().integer_peak(pool, 1),
            "one": seconds(lambda: [matrix.multiply(one, pool, True) for matrix in copies], clock) / count,
            "eight": seconds(lambda: [matrix.multiply(eight, pool, True) for matrix in copies], clock) / count,
            "many": seconds(lambda: first.multiply(many, pool, True), clock),
        }
        if other is not None:
            times |= {
                "other_one": seconds(other[0], clock) / other[3],
                "other_eight": seconds(other[1], clock) / other[3],
            }
            times["other_many"] = seconds(other[2], clock)
        repeats.append(times)
    if options.best:
        repeats = [{key: min(times[key] for times in repeats) for key in repeats[0]}]
    found: dict[str, list[float]] = {}
    for times in repeats:
        for key, value in figures(times, first.nbytes, rows * columns, kind).items():
            found.setdefault(key, []).append(value)
    middle = {key: round(statistics.median(values), 3) for key, values in found.items()}
    bits = round(8 * first.nbytes / (rows * columns), 3)
    return {"format": name, "group_size": group, "bits_per_weight": bits, **middle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, value in (("--threads", 2), ("--rows", 5632), ("--columns", 2048), ("--repeats", 5)):
        parser.add_argument(flag, type=int, default=value)
    told = "one thread's processor time, the best repeat of each: for a machine that others use"
    parser.add_argument("--best", action="store_true", help=told)
    parser.add_argument("--ggml", type=Path, help="the folder of llama.cpp's ggml libraries")
    options = parser.parse_args()
    if options.best and options.threads != 1:
        parser.error("--best goes with --threads 1: it looks at one thread's time")
    pool = plane().Pool(options.threads)
    formats = [
        ("uniform 4", uniform(4), 32, "Q4_0"),
        ("uniform 4", uniform(4), 128, "Q4_K"),
        ("uniform 8", uniform(8), 32, "Q8_0"),
        ("uniform 2", uniform(2), 64, "Q2_K"),
        ("ternary", named("ternary"), 256, "TQ2_0"),
        ("uniform 2", uniform(2), 32, "Q2_K"),
        ("uniform 3", uniform(3), 32, "IQ3_S"),
        *((f"uniform {bits}", uniform(bits), 32, "") for bits in (5, 6)),
        ("normal float 4", named("normal_float", 4), 32, ""),
    ]
    results = [measure(*each, options, pool) for each in formats]
    shape = [options.rows, options.columns]
    print(json.dumps({"benchmark": "native_matmul", "threads": options.threads, "shape": shape, "formats": results}))


if __name__ == "__main__":
    main()
