"""How fast an engine runs a model, beside what this machine could do at most.

    memory_bandwidth_share = bytes of the weights that a token needs · tokens a second, one sequence / bytes a second
    arithmetic_share       = 2 · those weights · prompt tokens a second / operations a second

One sequence that decodes reads every weight for every token, so memory is its limit; a prompt uses every weight for
many tokens, so arithmetic is. Both limits are measured in the same run: the sum of an array much larger than the
caches, and a product of float32 matrices, or, where the runner multiplies codes with bytes, the multiply-adds of bytes
that this processor does at best (`integer_operations_per_second`; null elsewhere). A part of an embedding's table is
read, not all of it, so it does not count (a tied one does: it is the head).

Each repetition measures everything once, one after the other, so that a noisy minute meets all alike; medians are
of the repetitions, the spread is (largest - smallest) / median.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from fettle.engine.engine import Engine
from fettle.engine.native_runner import NativeRunner
from fettle.engine.runner import Runner
from fettle.engine.scheduler import SchedulerOptions
from fettle.engine.sequence import Request
from fettle.engine.speed_options import SpeedOptions
from fettle.engine.torch_runner import torch_threads
from fettle.errors import UsageError
from fettle.kernels.native import default_threads, plane
from fettle.models.anatomy import Anatomy
from fettle.models.checkpoint import Checkpoint

READ_BYTES = 1 << 28  # far more than any cache
MATRIX = 1536  # rows and columns of the product
TRIES = 3  # of a limit, a repetition; the best counts
ARITHMETIC = {  # a measured limit → what it is
    "float32_operations_per_second": "float32 products of this machine",
    "integer_operations_per_second": "products of bytes of this machine",
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A figure of several repetitions.

    Attributes:
        median: of the repetitions.
        spread: (largest - smallest) / median.
    """

    median: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        """The figure that these repetitions give."""
        middle = median(values)
        return cls(median=middle, spread=(max(values) - min(values)) / middle)


def weights_read(checkpoint: Checkpoint, anatomy: Anatomy) -> tuple[int, int]:
    """(bytes, weights) that every token needs: all stored tensors but the table of an embedding that is not the
    head.
    """
    skipped = anatomy.embedding.weight_name if anatomy.embedding is not None and not anatomy.tied else ""
    entries = [entry for name, entry in checkpoint.entries.items() if name != skipped and not entry.is_buffer]
    matrices = [*anatomy.linears(), *([anatomy.embedding if anatomy.tied else anatomy.head])]
    weights = sum(math.prod(linear.shape) for linear in matrices if linear is not None)
    return sum(entry.nbytes for entry in entries), weights


def measure_speed(runner: Runner, options: SpeedOptions, *, threads: int | None = None) -> dict[str, Any]:
    """Measures prefill, decoding by batch, time to the first token, and the machine's limits.

    Returns:
        `Measured` by name; `decode_tokens_per_second` by batch.

    Raises:
        UsageError: options that cannot be, or a cache or context that is too small for them.
    """
    options.check()
    held = runner.shape.context_length
    longest = max(options.prompt_tokens + 1, options.start_tokens + options.new_tokens)
    if held is not None and held < longest:
        raise UsageError(f"the model's context holds {held} tokens, and {longest} are to be measured; ask for fewer")
    found: dict[str, list[float]] = {
        name: [] for name in ("prefill", "first", "bandwidth", "arithmetic", *map(str, options.batches))
    }
    _prefill(runner, options)  # the first of everything is slower
    for _ in range(options.repetitions):
        seconds = _prefill(runner, options)
        found["first"].append(seconds)
        found["prefill"].append(options.prompt_tokens / seconds)
        for batch in options.batches:
            found[str(batch)].append(_decode(runner, options, batch))
        found["bandwidth"].append(read_bandwidth(threads))
        found["arithmetic"].append(float32_operations(threads))
        if multiplies_bytes(runner):
            found.setdefault("bytes", []).append(integer_operations(threads))
    measured = {name: Measured.of(values) for name, values in found.items()}
    return {
        "prefill_tokens_per_second": measured["prefill"],
        "time_to_first_token_seconds": measured["first"],
        "decode_tokens_per_second": {batch: measured[str(batch)] for batch in options.batches},
        "read_bytes_per_second": measured["bandwidth"],
        "float32_operations_per_second": measured["arithmetic"],
        "integer_operations_per_second": measured.get("bytes"),
    }


def shares(found: dict[str, Any], read_bytes: int, weights: int) -> dict[str, float | None]:
    """How much of the machine's limits was used; the bandwidth's share is null where batch 1 was not measured."""
    one = found["decode_tokens_per_second"].get(1)
    bandwidth = None if one is None else read_bytes * one.median / found["read_bytes_per_second"].median
    operations = 2 * weights * found["prefill_tokens_per_second"].median
    limit = found.get("integer_operations_per_second") or found["float32_operations_per_second"]
    return {"memory_bandwidth_share": bandwidth, "arithmetic_share": operations / limit.median}


def read_bandwidth(threads: int | None = None) -> float:
    """Bytes a second that a sum over a large array reads."""
    array = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    with torch_threads(threads):
        return READ_BYTES / _best(array.sum)


def float32_operations(threads: int | None = None) -> float:
    """Multiplications and additions a second of a product of float32 matrices."""
    matrix = torch.ones(MATRIX, MATRIX)
    with torch_threads(threads):
        return 2 * MATRIX**3 / _best(lambda: matrix @ matrix)


def multiplies_bytes(runner: Runner) -> bool:
    """Whether a runner's products are of codes and bytes."""
    return isinstance(runner, NativeRunner) and runner.multiplies_bytes


def integer_operations(threads: int | None = None) -> float:
    """Multiplications and additions of bytes a second, by the native kernels' own instructions."""
    pool = plane().Pool(threads or default_threads())
    return float(plane().integer_peak(pool, TRIES))


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(TRIES):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _engine(runner: Runner, options: SpeedOptions) -> Engine:
    """An engine that reuses nothing, so that every repetition computes everything."""
    most = max(options.batches)
    return Engine(
        runner,
        options=SchedulerOptions(
            max_sequences=most, max_step_tokens=max(512, most * options.start_tokens), reuse_prefixes=False
        ),
    )


def _prefill(runner: Runner, options: SpeedOptions) -> float:
    prompt = _tokens(runner, options, options.prompt_tokens, 0)
    made = _engine(runner, options).generate([Request(prompt=prompt, max_tokens=1)])[0]
    return made.prefill_seconds


def _decode(runner: Runner, options: SpeedOptions, batch: int) -> float:
    """Tokens a second of all sequences together, from the step behind the prompts to the end."""
    engine = _engine(runner, options)
    for index in range(batch):
        prompt = _tokens(runner, options, options.start_tokens, 1 + index)
        engine.add(Request(prompt=prompt, max_tokens=options.new_tokens))
    engine.step()
    began = time.perf_counter()
    while engine.busy:
        engine.step()
    return batch * (options.new_tokens - 1) / (time.perf_counter() - began)


def _tokens(runner: Runner, options: SpeedOptions, count: int, index: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(options.seed * 1000 + index)
    return tuple(torch.randint(runner.shape.vocab_size, (count,), generator=generator).tolist())
