"""A runner without pages: each sequence has a cache of transformers' own kind, one behind the other in memory.

In the terms of the seam a page is a whole context, so the scheduler needs to know nothing: a sequence holds one page,
and a page that is written from position 0 is another sequence's. It runs caches that cannot be cut into pages, such as
one that keeps old tokens as codes, and with a plain cache it is what the paged runner is compared with. Sequences run
one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fettle.engine.runner import Batch, RunnerShape
from fettle.engine.torch_runner import SwitchedRopes, require_head, torch_threads
from fettle.errors import UsageError
from fettle.models.kv_cache import cache_bytes
from fettle.models.loading import LoadedModel


class ContiguousRunner:
    """A loaded model and `sequences` caches of up to `tokens` tokens, made by `make_cache` when they are needed."""

    def __init__(
        self,
        loaded: LoadedModel,
        make_cache: Callable[[], Any],
        *,
        tokens: int,
        sequences: int = 1,
        threads: int | None = None,
    ) -> None:
        require_head(loaded)
        self.loaded, self._make_cache, self._threads = loaded, make_cache, threads
        self._model = loaded.model
        self._device = next(self._model.parameters()).device
        self._ropes = SwitchedRopes(self._model)
        self._caches: dict[int, Any] = {}
        held = getattr(self._model.config, "max_position_embeddings", None)
        self._shape = RunnerShape(
            page_size=tokens,
            pages=sequences,
            page_bytes=0,  # a cache grows with what it holds; `memory_bytes` says how far it is
            vocab_size=self._model.get_output_embeddings().weight.shape[0],
            context_length=tokens if held is None else min(held, tokens),
            rope_switch=self._ropes.switch,
        )

    @property
    def shape(self) -> RunnerShape:
        """Sizes of the cache and of the model."""
        return self._shape

    @property
    def memory_bytes(self) -> int:
        """Bytes of all caches that are in use."""
        return sum(cache_bytes(cache) for cache in self._caches.values())

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """As `Runner.run`.

        Raises:
            UsageError: tokens were guessed wrong, and the cache cannot forget them.
        """
        assert not len(batch.copies), "pages that hold a whole context are never shared"
        found = []
        with torch.inference_mode(), torch_threads(self._threads):
            for sequence, (start, end) in enumerate(zip(batch.query_starts, batch.query_starts[1:], strict=False)):
                rows = batch.logit_rows[(batch.logit_rows >= start) & (batch.logit_rows < end)] - start
                found.append(self._sequence(batch, sequence, slice(int(start), int(end)), rows))
        return np.concatenate(found)

    def _sequence(self, batch: Batch, sequence: int, span: slice, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        page, first = int(batch.page_table[sequence, 0]), int(batch.positions[span.start])
        if first == 0:
            self._caches[page] = self._make_cache()
        cache = self._caches[page]
        if cache.get_seq_length() != first:
            raise UsageError("this cache cannot forget tokens that were guessed wrong; run it without speculation")
        long = self._ropes.switch is not None and int(batch.known_lengths[sequence]) > self._ropes.switch
        with self._ropes.held(long):
            output = self._model(
                input_ids=torch.from_numpy(batch.tokens[span].astype(np.int64))[None].to(self._device),
                position_ids=torch.from_numpy(batch.positions[span].astype(np.int64))[None].to(self._device),
                past_key_values=cache,
                use_cache=True,
            )
        logits: NDArray[np.float32] = output.logits[0, torch.from_numpy(rows.astype(np.int64))].float().cpu().numpy()
        return logits
