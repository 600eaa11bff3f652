"""How long one step of a model takes here, on a runner that is opened for it: a figure for choosing between shapes.

The step is repeated in one place of the cache, behind the same context, and the fastest repetition counts: what else
the machine does only ever adds. The model may be a view of files (`models/view.py`) that nobody has written.
"""

from __future__ import annotations

import time

from fettle.engine.native_runner import NativeRunner
from fettle.engine.runner import Piece, Runner, pack
from fettle.engine.torch_runner import TorchRunner
from fettle.errors import UsageError, unknown_word
from fettle.models.checkpoint import Checkpoint
from fettle.models.config_file import context_length
from fettle.models.loading import load_checkpoint

CONTEXT, REPETITIONS, PAGE = 64, 25, 16
LEAST_SECONDS = 0.05  # that all repetitions together last at least


def step_seconds(checkpoint: Checkpoint, *, engine: str, tokens: int = 1, threads: int | None = None) -> float:
    """Seconds of a step of `tokens` new tokens behind `CONTEXT` others, the fastest of many.

    Args:
        checkpoint: a folder, or a view of one.
        engine: "native" or "torch".
        tokens: 1 for writing, more for reading.
        threads: to compute with; None: as many as the engine takes.

    Raises:
        UsageError: an engine that cannot run this model, or is not there; more tokens than the model has positions.
    """
    context = context_length(checkpoint.config)
    if context is not None and tokens > context:
        raise UsageError(f"latency_tokens is {tokens}, and the model's context holds {context}; give at most that")
    pages = -(-(CONTEXT + tokens) // PAGE)
    return fastest_step(_runner(checkpoint, engine, pages, threads), tokens)


def fastest_step(runner: Runner, tokens: int) -> float:
    """The same for a runner that is open, with an empty cache."""
    table = tuple(range(-(-(CONTEXT + tokens) // runner.shape.page_size)))
    ids = [index % runner.shape.vocab_size for index in range(CONTEXT + tokens)]
    runner.run(pack([Piece(tokens=ids[:CONTEXT], start=0, pages=table, known=CONTEXT, logits=1)]))
    step = pack([Piece(tokens=ids[CONTEXT:], start=CONTEXT, pages=table, known=CONTEXT + tokens, logits=1)])
    found: list[float] = []
    while len(found) < REPETITIONS or sum(found) < LEAST_SECONDS:
        began = time.perf_counter()
        runner.run(step)
        found.append(time.perf_counter() - began)
    return min(found)


def _runner(checkpoint: Checkpoint, engine: str, pages: int, threads: int | None) -> Runner:
    if engine == "native":
        return NativeRunner.of(checkpoint, pages=pages, page_size=PAGE, threads=threads)
    if engine == "torch":
        return TorchRunner(load_checkpoint(checkpoint), pages=pages, page_size=PAGE, threads=threads)
    raise UsageError(unknown_word("engine", engine, ("native", "torch")))
