"""The reference runner: any causal model that `fettle.load` gives, through transformers, on any device.

A batch is cut into groups of sequences with equally many new tokens (all decoding ones are one group), each group is
one forward of a rectangle, and pasts of different lengths are padded on the left, so no family needs code of its own.
Longrope models hold two sets of rotary factors and choose by the longest row of a call; here each group says which
one it needs.

Tokens are those of transformers' own generation. Cost beside the model's arithmetic: copying every row's past in
every block.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fettle.engine.runner import Batch, RunnerShape
from fettle.errors import UsageError
from fettle.models.loading import LoadedModel
from fettle.models.paged_kv_cache import Pages, paged_view


class TorchRunner:
    """A loaded model over a paged cache."""

    def __init__(self, loaded: LoadedModel, *, pages: int, page_size: int = 16, threads: int | None = None) -> None:
        if pages < 1 or page_size < 1:
            raise UsageError(f"a cache of {pages} pages of {page_size} tokens holds nothing; both must be at least 1")
        self.loaded = loaded
        require_head(loaded)
        self._model = loaded.model
        self._device = next(self._model.parameters()).device
        self._pages = Pages(pages, page_size)
        self._threads = threads
        self._ropes = SwitchedRopes(self._model)
        config = self._model.config
        nothing = torch.zeros((1, 1), dtype=torch.int64, device=self._device)
        vocab_size = self._forward(nothing, nothing, nothing, nothing, 1, [1]).shape[-1]  # makes the pages, too
        self._shape = RunnerShape(
            page_size=page_size,
            pages=pages,
            page_bytes=self._pages.page_bytes,
            vocab_size=vocab_size,
            context_length=getattr(config, "max_position_embeddings", None),
            rope_switch=self._ropes.switch,
        )

    @property
    def shape(self) -> RunnerShape:
        """Sizes of the cache and of the model."""
        return self._shape

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """As `Runner.run`."""
        with torch.inference_mode(), torch_threads(self._threads):
            return self._run(batch)

    def _run(self, batch: Batch) -> NDArray[np.float32]:
        for source, target in batch.copies.tolist():
            self._pages.copy(source, target)
        starts = batch.query_starts
        counts = np.diff(starts)
        long = np.zeros(len(counts), bool) if self._ropes.switch is None else batch.known_lengths > self._ropes.switch
        wanted = np.zeros(len(batch.tokens), bool)
        wanted[batch.logit_rows] = True
        groups: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for sequence, key in enumerate(zip(counts.tolist(), long.tolist(), strict=True)):
            groups[key].append(sequence)
        logits = np.empty((len(batch.logit_rows), self._shape.vocab_size), np.float32)
        for (count, is_long), members in groups.items():
            rows = starts[members][:, None] + np.arange(count)  # [members, count] indices into the batch's tokens
            kept = (
                int(wanted[rows].any(axis=0)[::-1].nonzero()[0].max(initial=-1)) + 1
            )  # of the last tokens of each row
            found = self._group(batch, members, rows, kept, is_long)  # [members, kept, vocab]
            if kept:
                asked = wanted[rows[:, count - kept :]]
                places = np.searchsorted(batch.logit_rows, rows[:, count - kept :][asked])
                logits[places] = found[torch.from_numpy(asked)].float().cpu().numpy()
        return logits

    def _group(self, batch: Batch, members: list[int], rows: NDArray[np.int32], kept: int, is_long: bool) -> Tensor:
        lengths = batch.context_lengths[members]  # [members]
        longest, size = int(lengths.max()), self._pages.page_size
        places = (
            np.arange(longest) - (longest - lengths)[:, None]
        )  # [members, longest] positions, negative where padded
        table = batch.page_table[members]
        pages = np.take_along_axis(table, np.maximum(places, 0) // size, axis=1)
        read = pages.astype(np.int64) * size + np.maximum(places, 0) % size
        count = rows.shape[1]
        with self._ropes.held(is_long):
            return self._forward(
                torch.from_numpy(batch.tokens[rows].astype(np.int64)).to(self._device),
                torch.from_numpy(batch.positions[rows].astype(np.int64)).to(self._device),
                torch.from_numpy(read[:, longest - count :]).to(self._device),
                torch.from_numpy(read).to(self._device),
                kept,
                lengths.tolist(),
            )

    @torch.inference_mode()
    def _forward(
        self, tokens: Tensor, positions: Tensor, written: Tensor, read: Tensor, kept: int, lengths: list[int]
    ) -> Tensor:
        longest = read.shape[1]
        mask = torch.ones((len(lengths), longest), dtype=torch.int64, device=self._device)
        for row, length in zip(mask, lengths, strict=True):
            row[: longest - length] = 0
        view = paged_view(self._pages, len(self.loaded.anatomy.blocks), written, read)
        output: Any = self._model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=view,
            use_cache=True,
            logits_to_keep=max(kept, 1),
        )
        logits: Tensor = output.logits[:, -max(kept, 1) :]  # a family without logits_to_keep gives them all
        return logits


def require_head(loaded: LoadedModel) -> None:
    """Refuses a model that cannot complete text.

    Raises:
        UsageError: an encoder, or a model without a language-model head.
    """
    if not loaded.anatomy.causal:
        raise UsageError(f"a {loaded.anatomy.family} model is an encoder: it cannot complete text")
    if loaded.model.get_output_embeddings() is None:
        raise UsageError(
            f"{loaded.folder} is a {type(loaded.model).__name__}, which has no language-model head: it cannot complete "
            "text; give a model whose config.json names a class such as LlamaForCausalLM"
        )


class SwitchedRopes:
    """The rotary modules of a longrope model, held to one set of factors for the time of a call.

    transformers chooses by the largest position of the call, so a short row beside a long one, or the first chunk of a
    long prompt, would get the factors of the other. `switch` is None for every other model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules: list[Any] = [m for m in model.modules() if getattr(m, "rope_type", None) == "longrope"]
        self.switch: int | None = None
        for module in self._modules:
            self.switch = int(module.config.rope_parameters["original_max_position_embeddings"])
            place = torch.zeros((1, 1), dtype=torch.int64, device=module.inv_freq.device)
            with torch.no_grad():
                module(torch.zeros(1, device=place.device), place + self.switch)  # makes `long_inv_freq`
                module(torch.zeros(1, device=place.device), place)

    @contextlib.contextmanager
    def held(self, long: bool) -> Iterator[None]:
        """Inside, every rotary module uses its long or its short factors."""
        try:
            for module in self._modules:
                module.rope_type = "held"  # neither "dynamic" nor "longrope": nothing is chosen anew
                module.inv_freq.copy_(module.long_inv_freq if long else module.original_inv_freq)
            yield
        finally:
            for module in self._modules:
                module.rope_type = "longrope"


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Inside, torch computes with so many threads; None leaves them as they are."""
    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
