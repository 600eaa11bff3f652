"""Continuous against static batching, and paged against contiguous reservation, on a load of mixed lengths.

python benchmarks/engine/batching.py [MODEL] [--requests 48] [--sequences 8] [--repetitions 3] [--engine torch]

Both engines get the same requests in the same order and the same number of sequences at once. Static batching takes
them in groups and starts the next group when the longest of one is done; continuous batching fills every place as it
becomes free. Times are interleaved; steps do not depend on the machine. Reservation: the same cache memory as pages
of 16 tokens, and as one stretch of the model's context for each sequence; how many sequences are held at once. One
JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

import fettle
from fettle import Request, RunnerOptions, SchedulerOptions
from fettle.engine.engine import Engine
from fettle.engine.runner import RunnerShape
from fettle.engine.scheduler import Scheduler
from fettle.engine.sequence import Sequence


def load(count: int, vocabulary: int, seed: int = 0) -> list[Request]:
    """Prompts of 8 to 48 tokens; completions of which a few are long, as in conversations."""
    chosen = random.Random(seed)
    return [
        Request(
            prompt=tuple(chosen.randrange(vocabulary) for _ in range(chosen.randrange(8, 49))),
            max_tokens=min(128, 4 + int(chosen.expovariate(1 / 28))),
            ignore_end=True,
        )
        for _ in range(count)
    ]


def serve(engine: Engine, requests: list[Request], group: int) -> tuple[float, int, list[tuple[int, ...]], float]:
    """(seconds, steps, tokens, mean sequences at once) with `group` requests handed over at a time."""
    began, steps, held, made = time.perf_counter(), 0, 0, {}
    for start in range(0, len(requests), group):
        numbers = [engine.add(request) for request in requests[start : start + group]]
        while engine.busy:
            made.update({u.number: u.completion.tokens for u in engine.step() if u.completion is not None})
            steps += 1
            held += len(engine.scheduler.running)
        assert all(number in made for number in numbers)
    return time.perf_counter() - began, steps, [made[n] for n in sorted(made)], held / steps


def most_held(cache_tokens: int, context: int, page_size: int, requests: list[Request]) -> tuple[int, float]:
    """Sequences at once, most and on average while others wait: the scheduler alone, as no token decides it."""
    shape = RunnerShape(
        page_size=page_size, pages=cache_tokens // page_size, page_bytes=0, vocab_size=1, context_length=context
    )
    scheduler = Scheduler(shape, SchedulerOptions(max_sequences=10**4, max_step_tokens=10**5, reuse_prefixes=False))
    for number, request in enumerate(requests):
        scheduler.add(Sequence(number=number, request=request, limit=request.max_tokens, ends=frozenset()))
    held = []
    while scheduler.waiting:
        for work in scheduler.schedule().work:
            scheduler.computed(work)
            if work.sequence.missing == 0 and work.sequence.append(0):
                scheduler.finish(work.sequence, "length")
        held.append(len(scheduler.running))
    return max(held), statistics.mean(held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=3)
    asked = parser.parse_args()
    options = SchedulerOptions(max_sequences=asked.sequences, max_step_tokens=256, reuse_prefixes=False)
    engine = fettle.open_engine(
        asked.model, engine=asked.engine, runner=RunnerOptions(cache_tokens=8192), scheduler=options
    )
    vocabulary, context = engine.runner.shape.vocab_size, engine.runner.shape.context_length or 2048
    requests = load(asked.requests, vocabulary)
    times: dict[str, list[float]] = {"continuous": [], "static": []}
    steps: dict[str, int] = {}
    tokens: dict[str, list[tuple[int, ...]]] = {}
    for _ in range(asked.repetitions):
        for name, group in (("continuous", len(requests)), ("static", asked.sequences)):
            seconds, steps[name], tokens[name], _ = serve(engine, requests, group)
            times[name].append(seconds)
    ratios = [static / continuous for static, continuous in zip(times["static"], times["continuous"], strict=True)]
    many = load(400, vocabulary, seed=1)
    paged, contiguous = (most_held(16 * context, context, size, many) for size in (16, context))
    count = sum(map(len, tokens["continuous"]))
    print(
        json.dumps(
            {
                "benchmark": "engine/batching",
                "engine": asked.engine,
                "model": asked.model,
                "requests": asked.requests,
                "sequences": asked.sequences,
                "tokens": count,
                "same_tokens": tokens["continuous"] == tokens["static"],
                "continuous_tokens_per_second": count / statistics.median(times["continuous"]),
                "static_tokens_per_second": count / statistics.median(times["static"]),
                "continuous_over_static": statistics.median(ratios),
                "continuous_over_static_spread": [min(ratios), max(ratios)],
                "continuous_steps": steps["continuous"],
                "static_steps": steps["static"],
                "cache_tokens": 16 * context,
                "paged_sequences": paged[0],
                "paged_sequences_mean": paged[1],
                "contiguous_sequences": contiguous[0],
                "contiguous_sequences_mean": contiguous[1],
            }
        )
    )


if __name__ == "__main__":
    main()
