"""Decode with pruned weights beside the dense kernel of the same format, by sparsity, one JSON line out.

    python benchmarks/kernels/sparse_matmul.py [--threads 2] [--repeats 5] [--blocks 6] [--formats uniform4 bfloat16 …]

All matrices of a block in the shape of TinyLlama-1.1B with a random mask, `--blocks` of them so that no cache holds
them, one token. Dense and sparse take turns in each repeat; a ratio is the median of the repeats' own. `pays_from` is
the smallest sparsity measured from which on skipping is faster, `chosen_from` from which on the runner takes it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch

from fettle.kernels.native import NUMBERS, as_numpy, plane
from fettle.kernels.native_sparse import margin
from fettle.tensors.grid import Grid, uniform
from fettle.tensors.levels import named

HIDDEN, KV, MLP = 2048, 256, 5632
SHAPES = [(HIDDEN, HIDDEN), (KV, HIDDEN), (KV, HIDDEN), (HIDDEN, HIDDEN), (MLP, HIDDEN), (MLP, HIDDEN), (HIDDEN, MLP)]
SPARSITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.9)
FORMATS: dict[str, tuple[Grid | None, int]] = {
    "uniform4": (uniform(4), 128),
    "uniform4-32": (uniform(4), 32),
    "normal_float4": (named("normal_float", 4), 64),
    "uniform3": (uniform(3), 128),
    "uniform2": (uniform(2), 128),
    "uniform8": (uniform(8), 128),
    "bfloat16": (None, 0),
}


def coded(grid: Grid, group: int, shape: tuple[int, int], kept: np.ndarray | None, pool: Any) -> Any:
    rows, columns = shape
    random = np.random.default_rng(rows * 31 + columns)
    codes = random.integers(0, len(grid.levels), shape, dtype=np.uint8)
    scales = np.full((rows, -(-columns // group)), 0.01, np.float16).view(np.uint16)
    levels = list(grid.levels)
    if kept is None:
        return plane().coded(codes, columns, 8, grid.bits, group, scales, "float16", levels, None, 1.0, pool)
    return plane().sparse_codes(codes, kept, grid.bits, group, scales, "float16", levels, 1.0, pool)


def numbers(shape: tuple[int, int], kept: np.ndarray | None, pool: Any) -> Any:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]), dtype=torch.float32)
    if kept is not None:
        values *= torch.from_numpy(kept).float()
    values = values.to(torch.bfloat16)
    make = plane().dense if kept is None else plane().sparse_numbers
    return make(as_numpy(values), NUMBERS[torch.bfloat16], pool)


def matrices(name: str, sparsity: float | None, blocks: int, pool: Any) -> list[Any]:
    grid, group = FORMATS[name]
    found = []
    for shape in SHAPES * blocks:
        kept = None
        if sparsity is not None:
            kept = (np.random.default_rng(shape[0]).random(shape, np.float32) >= sparsity).astype(np.uint8)
        found.append(numbers(shape, kept, pool) if grid is None else coded(grid, group, shape, kept, pool))
    return found


def seconds(weights: list[Any], inputs: dict[int, np.ndarray], pool: Any) -> float:
    began = time.perf_counter()
    for matrix in weights:
        matrix.multiply(inputs[matrix.columns], pool, True)
    return time.perf_counter() - began


def measure(name: str, options: argparse.Namespace, pool: Any) -> dict[str, Any]:
    inputs = {n: np.random.default_rng(n).standard_normal((1, n)).astype(np.float32) for n in (HIDDEN, MLP)}
    dense = matrices(name, None, options.blocks, pool)
    weights = options.blocks * sum(rows * columns for rows, columns in SHAPES)
    dense_bytes = sum(matrix.nbytes for matrix in dense)
    rows: list[dict[str, Any]] = []
    for sparsity in SPARSITIES:
        sparse = matrices(name, sparsity, options.blocks, pool)
        sparse_bytes = sum(matrix.nbytes for matrix in sparse)
        ratios, rates, bandwidths = [], [], []
        seconds(sparse, inputs, pool)
        for _ in range(options.repeats):
            bandwidths.append(plane().memory_bandwidth(pool, 1 << 28, 1))
            slow, fast = seconds(dense, inputs, pool), seconds(sparse, inputs, pool)
            ratios.append(slow / fast)
            rates.append(dense_bytes / slow)
        rows.append({
            "sparsity": sparsity,
            "bits_per_weight": round(8 * sparse_bytes / weights, 3),
            "decode_speed_over_dense": round(statistics.median(ratios), 3),
            "bytes_of_dense": round(sparse_bytes / dense_bytes, 3),
            "dense_bandwidth_share": round(statistics.median(r / b for r, b in zip(rates, bandwidths, strict=True)), 3),
        })  # fmt: skip
    bits = grid.bits if (grid := FORMATS[name][0]) is not None else 16
    return {
        "format": name,
        "group_size": FORMATS[name][1] or None,
        "dense_bits_per_weight": round(8 * dense_bytes / weights, 3),
        "by_sparsity": rows,
        "pays_from": first(rows, lambda row: row["decode_speed_over_dense"] > 1),
        "chosen_from": first(rows, lambda row: row["bytes_of_dense"] < margin(bits)),
    }


def first(rows: list[dict[str, Any]], pays: Any) -> float | None:
    """The sparsity from which on all rows pay; None where the last does not."""
    good = None
    for row in reversed(rows):
        if not pays(row):
            break
        good = row["sparsity"]
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, value in (("--threads", 2), ("--repeats", 5), ("--blocks", 6)):
        parser.add_argument(flag, type=int, default=value)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    options = parser.parse_args()
    pool = plane().Pool(options.threads)
    found = [measure(name, options, pool) for name in options.formats]
    print(json.dumps({"benchmark": "sparse_matmul", "threads": options.threads, "formats": found}))


if __name__ == "__main__":
    main()
