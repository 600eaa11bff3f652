"""Rounding to the lattice finds what a look at every entry finds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fettle.methods.quantize.lattice_search import nearest_entries
from fettle.methods.quantize.vector_search import EntrySearch
from fettle.tensors.codebook import e8p
from fettle.tensors.vectors import VectorScheme

EVERYTHING = EntrySearch(torch.eye(8), VectorScheme(bits=2))


def test_every_entry_is_nearest_to_itself() -> None:
    codes = torch.arange(0, 2**16, 7)
    found, units = nearest_entries(e8p().entries(codes), VectorScheme(bits=2))
    assert torch.equal(found[:, 0].long(), codes)
    assert torch.equal(units, e8p().entries(codes))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("spread", [0.5, 1.0, 3.0])
def test_the_same_distance_as_by_looking_at_all(bits: int, spread: float) -> None:
    """With a spread of three most targets lie beyond the table's edge."""
    scheme = VectorScheme(bits=bits)
    targets = spread * torch.randn(96, 8, generator=torch.Generator().manual_seed(bits))
    codes, units = nearest_entries(targets, scheme)
    _, wanted = EntrySearch(torch.eye(8), scheme).nearest(targets)
    torch.testing.assert_close((targets - units).square().sum(1), (targets - wanted).square().sum(1))
    total = sum(
        ratio * book.entries(codes[:, stage])
        for stage, (book, ratio) in enumerate(zip(scheme.stages, scheme.ratios, strict=True))
    )
    assert torch.equal(units, total)


@given(st.lists(st.floats(-4, 4, width=32), min_size=8, max_size=8))
def test_no_entry_is_nearer(coordinates: list[float]) -> None:
    target = torch.tensor([coordinates])
    _, units = nearest_entries(target, VectorScheme(bits=2))
    _, wanted = EVERYTHING.nearest(target)
    nearest = float((target - wanted).square().sum())
    assert float((target - units).square().sum()) <= nearest * (1 + 1e-5) + 1e-5


def test_no_targets_have_no_codes() -> None:
    codes, units = nearest_entries(torch.empty(0, 8), VectorScheme(bits=3))
    assert codes.shape == (0, 2)
    assert units.shape == (0, 8)
