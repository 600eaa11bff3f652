"""The batch that pieces are packed into, worked out by hand."""

from __future__ import annotations

import numpy as np

from fettle.engine.runner import Piece, pack


def test_pieces_lie_one_behind_the_other() -> None:
    batch = pack(
        [
            Piece(tokens=[7, 8, 9], start=4, pages=[5, 2], known=9, logits=0),
            Piece(tokens=[3], start=0, pages=[1], known=1, logits=1),
            Piece(tokens=[4, 6], start=8, pages=[0, 3, 4], known=9, logits=2),
        ],
        [(2, 6)],
    )
    assert batch.tokens.tolist() == [7, 8, 9, 3, 4, 6]
    assert batch.positions.tolist() == [4, 5, 6, 0, 8, 9]
    assert batch.query_starts.tolist() == [0, 3, 4, 6]
    assert batch.context_lengths.tolist() == [7, 1, 10]
    assert batch.known_lengths.tolist() == [9, 1, 9]
    assert batch.page_table.tolist() == [[5, 2, -1], [1, -1, -1], [0, 3, 4]]
    assert batch.logit_rows.tolist() == [3, 4, 5]
    assert batch.copies.tolist() == [[2, 6]]
    for array in vars(batch).values():
        assert array.dtype == np.int32 and array.flags.c_contiguous


def test_no_copies_are_an_empty_table() -> None:
    assert pack([Piece(tokens=[1], start=0, pages=[0], known=1, logits=1)]).copies.shape == (0, 2)
