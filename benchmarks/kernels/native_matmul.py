"""Speed of the native matrix products beside this machine's own limits, one JSON line out.

    python benchmarks/kernels/native_matmul.py [--threads 2] [--rows 5632 --columns 2048] [--repeats 5]

For each format: one token (memory is the limit; the weight is read from memory, so many copies of it are gone through
in turn), and 512 tokens (arithmetic is the limit). The machine's bandwidth and its peak for products of bytes are
measured between them, in the same run, again and again; shares are medians of each repeat's own ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np

from fettle.kernels.native import plane
from fettle.tensors.grid import Grid, uniform
from fettle.tensors.levels import named

BEYOND_CACHE = 1 << 28  # bytes that the copies of a weight take together


def random_matrix(rows: int, columns: int, grid: Grid, group: int, pool: Any, seed: int) -> Any:
    random = np.random.default_rng(seed)
    codes = random.integers(0, len(grid.levels), (rows, columns), dtype=np.uint8)
    scales = np.full((rows, -(-columns // group)), 0.01, np.float16).view(np.uint16)
    return plane().coded(codes, columns, 8, grid.bits, group, scales, "float16", list(grid.levels), None, 1.0, pool)


def seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(name: str, grid: Grid, group: int, options: argparse.Namespace, pool: Any) -> dict[str, Any]:
    rows, columns = options.rows, options.columns
    first = random_matrix(rows, columns, grid, group, pool, 0)
    count = max(2, BEYOND_CACHE // first.nbytes)
    copies = [first, *(random_matrix(rows, columns, grid, group, pool, i) for i in range(1, count))]
    one = np.random.default_rng(1).standard_normal((1, columns)).astype(np.float32)
    many = np.random.default_rng(2).standard_normal((512, columns)).astype(np.float32)
    decode, prefill, bandwidth_share, peak_share = [], [], [], []
    for _ in range(options.repeats):
        bandwidth = plane().memory_bandwidth(pool, BEYOND_CACHE, 1)
        took = seconds(lambda: [matrix.multiply(one, pool, True) for matrix in copies])
        decode.append(sum(matrix.nbytes for matrix in copies) / took)
        bandwidth_share.append(decode[-1] / bandwidth)
        peak = plane().integer_peak(pool, 1)
        prefill.append(2 * rows * columns * 512 / seconds(lambda: first.multiply(many, pool, True)))
        peak_share.append(prefill[-1] / peak)
    return {
        "format": name,
        "group_size": group,
        "bits_per_weight": round(8 * first.nbytes / (rows * columns), 3),
        "decode_gb_per_second": round(statistics.median(decode) / 1e9, 2),
        "memory_bandwidth_share": round(statistics.median(bandwidth_share), 3),
        "prefill_gop_per_second": round(statistics.median(prefill) / 1e9, 1),
        "arithmetic_share": round(statistics.median(peak_share), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=5632)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    pool = plane().Pool(options.threads)
    formats = [(f"uniform {bits}", uniform(bits), 32) for bits in (2, 3, 4, 5, 6, 8)]
    formats += [
        ("uniform 4", uniform(4), 128),
        ("ternary", named("ternary"), 256),
        ("normal float 4", named("normal_float", 4), 32),
    ]
    results = [measure(*each, options, pool) for each in formats]
    print(
        json.dumps(
            {
                "benchmark": "native_matmul",
                "threads": options.threads,
                "shape": [options.rows, options.columns],
                "formats": results,
            }
        )
    )


if __name__ == "__main__":
    main()
