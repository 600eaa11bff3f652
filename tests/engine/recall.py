"""A model that remembers: its logits are a hash of every token before, as the paged cache gives them back.

It is a runner like any other, only that a key is the token itself. A page that is shared, copied, taken or left
behind wrongly changes the context that it reads, and with it nearly every logit. It also checks what the seam
promises to a runner.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from fettle.engine.runner import NO_PAGE, Batch, RunnerShape

VOCAB = 24
EMPTY = -7


class Recall:
    """Tokens in slots; logits from all of a sequence's past."""

    def __init__(
        self, *, pages: int, page_size: int, context: int | None = None, salt: bytes = b"", sharpness: float = 3.0
    ) -> None:
        self.shape = RunnerShape(
            page_size=page_size, pages=pages, page_bytes=4 * page_size, vocab_size=VOCAB, context_length=context
        )
        self.slots = np.full((pages, page_size), EMPTY)
        self.salt, self.sharpness = salt, sharpness
        self.calls = self.tokens = 0

    def run(self, batch: Batch) -> NDArray[np.float32]:
        self.calls += 1
        self.tokens += len(batch.tokens)
        size = self.shape.page_size
        for source, target in batch.copies:
            self.slots[target] = self.slots[source]
        written: dict[int, int] = {}
        contexts: list[NDArray[np.int64]] = []
        for i, (start, end) in enumerate(zip(batch.query_starts, batch.query_starts[1:], strict=False)):
            positions = batch.positions[start:end]
            assert end > start and (np.diff(positions) == 1).all()
            assert batch.context_lengths[i] == positions[-1] + 1 <= batch.known_lengths[i] + 64
            pages = batch.page_table[i, positions // size]
            assert (pages != NO_PAGE).all(), "a token without a page"
            for page in set(pages.tolist()):
                assert written.setdefault(page, i) == i, "two sequences write one page"
            self.slots[pages, positions % size] = batch.tokens[start:end]
        for i, (start, end) in enumerate(zip(batch.query_starts, batch.query_starts[1:], strict=False)):
            table = batch.page_table[i]
            whole = self.slots[table[table != NO_PAGE]].ravel()
            contexts += [whole[: position + 1] for position in batch.positions[start:end]]
        rows = [self.logits(contexts[row]) for row in batch.logit_rows]
        return np.array(rows, np.float32).reshape(-1, VOCAB)

    def logits(self, context: NDArray[np.int64]) -> NDArray[np.float32]:
        """What comes after these tokens: as good as random, the same every time."""
        assert (context != EMPTY).all(), "a slot is read that nobody wrote"
        digest = hashlib.blake2b(context.astype(np.int64).tobytes() + self.salt, digest_size=8).digest()
        generator = np.random.default_rng(int.from_bytes(digest, "little"))
        return (self.sharpness * generator.standard_normal(VOCAB)).astype(np.float32)

    def alone(self, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
        """Greedy tokens behind a prompt, without an engine."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(np.array(tokens)).argmax()))
        return tuple(tokens[len(prompt) :])
