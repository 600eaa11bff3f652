"""The runner on the native data plane: a whole step of the decoder is one call into C++, without the GIL.

    Batch → fettle._native.Decoder.step → logits

It is opened from a checkpoint's files, and torch only reads them. With `integer` the inputs of compressed linears
become bytes, a scale a token and block of columns (`kernels/native.py` has the formula); without, sums are in float32
and equal the torch reference's up to their order. Dense weights are always multiplied in float32.

Cost: the weights as stored, and the cache, whose pages take memory when they are first written.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from fettle.engine.native_families import activation_of, native_family
from fettle.engine.native_table import TableReader, check_inputs, read_sizes
from fettle.engine.runner import Batch, RunnerShape
from fettle.errors import UsageError, unknown_word
from fettle.kernels.native import default_threads, plane, runs_as_codes
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.module_tree import build_tree
from fettle.models.rotary import read_rotary
from fettle.models.storage import StoredScheme, stored_schemes
from fettle.tensors.masked import MaskedScheme
from fettle.tensors.scheme import Scheme

if TYPE_CHECKING:
    from fettle._native import Decoder, Pool

CacheType = Literal["float16", "float32", "int8"]


def require_native(folder: Path) -> None:
    """Refuses what the data plane does not run, without reading a weight.

    Raises:
        UsageError: it is not built, or lacks a part of the model: family, sizes, activation, rotary scaling, inputs.
        CheckpointError: damaged files.
    """
    plane()
    checkpoint = Checkpoint.open(folder)
    anatomy = read_anatomy(checkpoint)
    native_family(anatomy)
    tree = build_tree(checkpoint, anatomy, torch.float32, "cpu")
    read_sizes(tree.config, anatomy)
    activation_of(tree.config)
    read_rotary(tree)
    for name, stored in stored_schemes(checkpoint, anatomy).items():
        check_inputs(name, stored)


def _read_verified(checkpoint: Checkpoint, pool: Pool) -> tuple[TableReader, dict[str, Any]]:
    """The table, while a thread of its own compares the files with their hashes; damage is told first."""
    with ThreadPoolExecutor(1) as beside:
        verified = beside.submit(checkpoint.verify_hashes)
        try:
            reader = TableReader(checkpoint, read_anatomy(checkpoint), pool)
            table = reader.read()
        except Exception:
            verified.result()
            raise
        verified.result()
        return reader, table


def _reads_bytes(stored: StoredScheme) -> bool:
    """Whether a product with such a weight reads its inputs as bytes: its codes have a kernel, its inputs no rule."""
    scheme = stored.scheme.values if isinstance(stored.scheme, MaskedScheme) else stored.scheme
    if not isinstance(scheme, Scheme) or scheme.activations is not None or scheme.remainder is not None:
        return False
    return runs_as_codes(scheme)


class NativeRunner:
    """A checkpoint on the native data plane; one call at a time."""

    def __init__(self, decoder: Decoder, shape: RunnerShape, *, multiplies_bytes: bool) -> None:
        self._decoder = decoder
        self._shape = shape
        self.multiplies_bytes = multiplies_bytes  # whether inputs of compressed linears become bytes, and there are any

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        pages: int,
        page_size: int = 16,
        threads: int | None = None,
        integer: bool = True,
        cache_type: CacheType = "float16",
        kernels: str = "",
    ) -> NativeRunner:
        """A runner for the checkpoint in `folder`.

        Args:
            folder: of the checkpoint, compressed or not.
            pages: of the cache.
            page_size: tokens a page.
            threads: to compute with; None: all processors that the process may use.
            integer: whether compressed linears read their inputs as bytes.
            cache_type: what keys and values are kept in; int8: codes, a float32 scale a token and head.
            kernels: which instructions, one of `features()["available"]`; "" for the best that this processor runs.

        Raises:
            UsageError: there is no native data plane here, it lacks a part of this model, or a number cannot be.
            CheckpointError: damaged files.
        """
        return cls.of(
            Checkpoint.open(folder), pages=pages, page_size=page_size, threads=threads, integer=integer,
            cache_type=cache_type, kernels=kernels,
        )  # fmt: skip

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        *,
        pages: int,
        page_size: int = 16,
        threads: int | None = None,
        integer: bool = True,
        cache_type: CacheType = "float16",
        kernels: str = "",
    ) -> NativeRunner:
        """The same for a checkpoint that is open, or a view of one, whose tensors have no hashes to compare with."""
        if min(pages, page_size) < 1 or (threads is not None and threads < 1):
            raise UsageError(f"pages is {pages}, page_size {page_size}, threads {threads}; each must be at least 1")
        if cache_type not in get_args(CacheType):
            raise UsageError(unknown_word("cache type", str(cache_type), get_args(CacheType)))
        native = plane()
        pool = native.Pool(threads or default_threads())
        reader, table = _read_verified(checkpoint, pool)
        decoder = native.Decoder(table, pages, page_size, cache_type, pool, integer, kernels)
        shape = RunnerShape(
            page_size=page_size,
            pages=pages,
            page_bytes=decoder.page_bytes,
            vocab_size=reader.sizes.vocabulary,
            context_length=reader.sizes.context,
            rope_switch=None if reader.rotary is None else reader.rotary.switch,
        )
        return cls(decoder, shape, multiplies_bytes=integer and any(map(_reads_bytes, reader.stored.values())))

    @property
    def shape(self) -> RunnerShape:
        """Sizes of the cache and of the model."""
        return self._shape

    @property
    def weight_bytes(self) -> int:
        """Memory of all matrices in the kernels' layout."""
        return self._decoder.weight_bytes

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """As `Runner.run`."""
        return self._decoder.step(
            batch.tokens,
            batch.positions,
            batch.query_starts,
            batch.known_lengths,
            batch.page_table,
            batch.logit_rows,
            batch.copies,
        )
