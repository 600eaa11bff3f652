"""Masks from scores: exact counts, the least go, ties from the left; tiles of the sweep add up."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fettle.methods.prune.selection import TilePruner, kept_by_score
from fettle.tensors.patterns import parse_pattern


@given(seed=st.integers(0, 1000), sparsity=st.floats(0, 0.99), pattern=st.sampled_from(["layer", "row"]))
def test_what_goes_is_never_more_than_what_stays(seed: int, sparsity: float, pattern: str) -> None:
    scores = torch.rand(5, 12, generator=torch.Generator().manual_seed(seed))
    kept = kept_by_score(scores, parse_pattern(pattern), sparsity)
    assert int((~kept).sum()) == parse_pattern(pattern).pruned_count((5, 12), sparsity)
    for rows in range(5) if pattern == "row" else [slice(None)]:
        gone, stays = scores[rows][~kept[rows]], scores[rows][kept[rows]]
        assert not len(gone) or float(gone.max()) <= float(stays.min())


@pytest.mark.parametrize("text", ["2:4", "1:4", "3:4", "4:8", "1:3"])
def test_n_of_m_is_the_best_legal_choice_of_every_group(text: str) -> None:
    pattern = parse_pattern(text)
    scores = torch.rand(6, 4 * pattern.columns, generator=torch.Generator().manual_seed(pattern.columns))
    kept = kept_by_score(scores, pattern, pattern.fixed_sparsity or 0)
    for row, start in itertools.product(range(6), range(0, scores.shape[1], pattern.columns)):
        group, chosen = scores[row, start : start + pattern.columns], kept[row, start : start + pattern.columns]
        assert int(chosen.sum()) == pattern.keep
        best = max(float(group[list(c)].sum()) for c in itertools.combinations(range(pattern.columns), pattern.keep))
        assert float(group[chosen].sum()) == pytest.approx(best)


def test_blocks_go_by_their_sums() -> None:
    scores = torch.tensor([[9.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    kept = kept_by_score(scores, parse_pattern("2x2"), 0.5)
    assert kept.tolist() == [[True, True, False, False]] * 2


def test_of_equal_scores_the_first_go() -> None:
    kept = kept_by_score(torch.zeros(2, 4), parse_pattern("layer"), 0.5)
    assert kept.tolist() == [[False] * 4, [True] * 4]
    assert kept_by_score(torch.ones(2, 4), parse_pattern("2:4"), 0.5).tolist() == [[False, False, True, True]] * 2


@pytest.mark.parametrize(("text", "width"), [("layer", 7), ("row", 7), ("2:4", 4), ("2x3", 6)])
def test_the_tile_pruner_takes_exactly_what_is_due(text: str, width: int) -> None:
    pattern, shape = parse_pattern(text), (6, 36)
    total = pattern.pruned_count(shape, 0.5)
    pruner = TilePruner(pattern=pattern, total=total, in_features=36, width=width)
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    kept = torch.cat(
        [
            pruner.choose(
                weights[:, s : s + width], torch.ones(len(range(s, min(s + width, 36)))), slice(s, min(s + width, 36))
            )
            for s in range(0, 36, width)
        ],
        1,
    )
    assert int((~kept).sum()) == total
    if text == "row":
        assert set((~kept).sum(1).tolist()) == {total // 6}
