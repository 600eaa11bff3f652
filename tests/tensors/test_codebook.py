"""The tables against the lattice's own rules, and how little they leave of normal weights."""

from __future__ import annotations

import pytest
import torch

from fettle.methods.quantize.vector_search import EntrySearch
from fettle.tensors.codebook import Codebook, e8_roots, e8p
from fettle.tensors.vectors import VectorScheme


def in_e8(points: torch.Tensor) -> torch.Tensor:
    """Whether all coordinates are integers, or all halves of odd ones, and the sum is even."""
    integers = (points == points.round()).all(-1)
    halves = ((points + 0.5) == (points + 0.5).round()).all(-1)
    return (integers | halves) & (points.sum(-1).remainder(2) == 0)


@pytest.mark.parametrize(("book", "count"), [(e8p(), 65_536), (e8_roots(), 256)], ids=["e8p", "e8_roots"])
def test_entries_are_different_and_every_code_has_one(book: Codebook, count: int) -> None:
    entries = book.entries(torch.arange(2**book.code_bits))
    assert entries.shape == (count, 8)
    assert len(entries.unique(dim=0)) == count
    assert torch.equal(entries[count // 2 :], -entries[: count // 2])


def test_e8p_are_points_of_the_shifted_lattice() -> None:
    half = e8p().half
    assert bool(in_e8(half - 0.25).all())
    length = (half - 0.25).square().sum(1)
    assert length.max() == 12
    assert int((length <= 10).sum()) == 227 * 128  # the paper's count of short patterns, times free signs


def test_roots_are_the_240_shortest_points_and_axes() -> None:
    half = e8_roots().half
    assert bool(in_e8(half).all())
    length = half.square().sum(1)
    assert length[:120].tolist() == [2.0] * 120
    assert length[120:].tolist() == [4.0] * 8


@pytest.mark.parametrize(
    ("bits", "scale", "left"), [(1, 1.7, 0.33), (2, 0.97, 0.095), (3, 1.0, 0.0305), (4, 1.1, 0.0094)]
)
def test_little_is_left_of_normal_weights(bits: int, scale: float, left: float) -> None:
    """Of a normal weight's variance the best scalar levels leave 0.363, 0.1175, 0.0345 and 0.0095 (Max 1960)."""
    weights = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    _, units = EntrySearch(torch.eye(8), VectorScheme(bits=bits)).nearest(weights / scale)
    error = float((weights - units * scale).square().mean())
    print(bits, error)
    assert 0.25**bits < error < left  # no code is better than the first
