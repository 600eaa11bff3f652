"""The seam between requests and arithmetic: what the engine asks of a model, whoever runs it.

A runner owns the weights and a key-value cache cut into pages of `page_size` tokens. It knows no request: a step
hands it tokens, their positions, and for each sequence the pages that hold its past; it hands back logits. Between
calls it keeps nothing but the pages' contents, so whatever the scheduler decides (who runs, in which chunks, who
shares a page, who is thrown out and computed again) is told anew at every call. Only ints and numpy arrays cross the
seam; a data plane without torch needs none.

    slot of the token at position p of sequence i = page_table[i, p // page_size] · page_size + p mod page_size

That is the paged cache of Kwon et al. 2023 (https://arxiv.org/abs/2309.06180), whose "block" is our page: a block is a
transformer layer here.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
NO_PAGE = -1  # fills a page table's rows behind the last page


@dataclass(frozen=True, kw_only=True)
class RunnerShape:
    """What stays the same over a runner's life.

    Attributes:
        page_size: tokens a page.
        pages: how many pages the cache has; their ids are 0 … pages - 1.
        page_bytes: keys and values of one page, all blocks together.
        vocab_size: how many logits a token has.
        context_length: the most tokens of a sequence; None: no limit is known.
        rope_switch: longrope only: sequences longer than this use other rotary factors for all their tokens.
    """

    page_size: int
    pages: int
    page_bytes: int
    vocab_size: int
    context_length: int | None = None
    rope_switch: int | None = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One call: T tokens of S sequences, one behind the other, prefill and decode mixed. All int32, contiguous.

    Attributes:
        tokens: [T] ids.
        positions: [T], from 0; consecutive within a sequence.
        query_starts: [S + 1]; sequence i has tokens query_starts[i] : query_starts[i + 1], at least one.
        context_lengths: [S] tokens of the sequence in the cache after this call: its last position + 1.
        known_lengths: [S] tokens of the sequence known so far; decides the rotary factors where `rope_switch` is set.
        page_table: [S, P] pages in the order of positions, `NO_PAGE` behind the last.
        logit_rows: [R] indices into `tokens`, ascending: whose logits are wanted.
        copies: [C, 2] pages (from, to) to copy whole, in this order, before anything is written.
    """

    tokens: Ints
    positions: Ints
    query_starts: Ints
    context_lengths: Ints
    known_lengths: Ints
    page_table: Ints
    logit_rows: Ints
    copies: Ints


class Runner(Protocol):
    """A model that runs batches. One call at a time; the same batch gives the same logits."""

    @property
    def shape(self) -> RunnerShape:
        """Sizes of the cache and of the model."""
        ...

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Copies pages, writes the tokens' keys and values into their slots, and attends from each to its own past.

        Slots behind `context_lengths` hold rubbish and are not read; a slot may be written again later, and the newest
        counts. Pages that several sequences share are only read.

        Returns:
            float32 logits [R, vocab_size], final (soft cap included), a fresh array.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some neighbouring tokens of one sequence that a call computes.

    Attributes:
        tokens: their ids.
        start: the position of the first.
        pages: of the whole sequence, up to these tokens.
        known: tokens of the sequence known so far.
        logits: for how many of the last tokens logits are wanted.
    """

    tokens: Listed[int]
    start: int
    pages: Listed[int]
    known: int
    logits: int


def pack(pieces: Listed[Piece], copies: Listed[tuple[int, int]] = ()) -> Batch:
    """The batch of these pieces, in their order."""
    counts = [len(piece.tokens) for piece in pieces]
    starts = list(accumulate(counts, initial=0))
    table = np.full((len(pieces), max(len(piece.pages) for piece in pieces)), NO_PAGE, dtype=np.int32)
    for row, piece in zip(table, pieces, strict=True):
        row[: len(piece.pages)] = piece.pages
    rows = [row for piece, end in zip(pieces, starts[1:], strict=True) for row in range(end - piece.logits, end)]
    return Batch(
        tokens=_ints([token for piece in pieces for token in piece.tokens]),
        positions=_ints([p for piece in pieces for p in range(piece.start, piece.start + len(piece.tokens))]),
        query_starts=_ints(starts),
        context_lengths=_ints([piece.start + len(piece.tokens) for piece in pieces]),
        known_lengths=_ints([piece.known for piece in pieces]),
        page_table=table,
        logit_rows=_ints(rows),
        copies=_ints(copies).reshape(-1, 2),
    )


def _ints(values: Listed[int] | Listed[tuple[int, int]]) -> Ints:
    return np.array(values, dtype=np.int32)
