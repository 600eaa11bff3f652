"""The deterministic worker pool: independent pieces run side by side, each piece on one thread.

Inside the context torch computes with a single thread, so a floating-point sum has one order whatever the number of
workers; parallelism comes from pieces that do not touch each other (windows, tiles of a gram, linears). Measured: MKL's
Cholesky and torch's own sums give other last bits on 2 threads than on 1, so torch's parallelism cannot be used where
the same bytes are promised.

Torch releases the interpreter's lock inside its operators, so Python threads are enough.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD
LARGE_BLOCK_BYTES = 2**20

Item = TypeVar("Item")
Out = TypeVar("Out")

_inside = (
    threading.local()
)  # .worker is True in a pool's thread: a nested map runs inline, so it cannot wait for itself


def available_threads() -> int:
    """How many threads this process may use: its CPU affinity, and OMP_NUM_THREADS where that is smaller."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(asked)) if asked.isdigit() and int(asked) > 0 else cores


class Workers:
    """A pool of `threads` workers (all available ones by default); enter it as a context, which may nest.

    Attributes:
        threads: how many pieces run at the same time.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = available_threads() if threads is None else max(1, threads)
        self._depth = 0
        self._outer_threads = 1
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self._depth == 0:
            _return_freed_memory()
            self._outer_threads = torch.get_num_threads()
            torch.set_num_threads(1)
            if self.threads > 1:
                self._pool = ThreadPoolExecutor(self.threads, "fettle-worker", initializer=_start_worker)
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            if self._pool is not None:  # after an error or a signal nobody waits for pieces that nobody wants
                self._pool.shutdown(wait=kind is None, cancel_futures=True)
                self._pool = None
            torch.set_num_threads(self._outer_threads)

    def map(self, function: Callable[[Item], Out], items: Iterable[Item]) -> list[Out]:
        """Results in the order of the items; the first failing item's exception, and then pieces not begun are dropped.

        The pieces must not write where another reads. Gradient mode is the caller's. Outside the context, with one
        thread, or inside another piece, everything runs inline.
        """
        if self._pool is None or getattr(_inside, "worker", False):
            return [function(item) for item in items]
        gradients = torch.is_grad_enabled()

        def piece(item: Item) -> Out:
            with torch.set_grad_enabled(gradients):
                return function(item)

        futures = [self._pool.submit(piece, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()


def _start_worker() -> None:
    _inside.worker = True
    torch.set_num_threads(1)  # MKL and OpenMP keep this per thread


@functools.cache
def _return_freed_memory() -> None:
    """Has the C library give large blocks back to the system as soon as they are freed.

    glibc raises the size from which it does so with every large block that is freed, up to 32 MB; from then on freed
    tensors stay in its heaps, in pieces that the next ones do not fit. A fixed size keeps the peak at what is in use.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such setting, and no need of it
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
