"""Randomized Hadamard matrices: orthogonal for any width, of the order that is promised, and the same row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.tensors.orthogonal import Orthogonal, hadamard_matrix, hadamard_order, randomized

# width → the largest order that divides it, by hand from Paley's and Sylvester's constructions
ORDERS = {
    1: 1, 2: 2, 3: 1, 6: 2, 12: 12, 20: 20, 24: 24, 28: 28, 36: 36, 40: 40, 44: 44, 48: 48, 64: 64, 80: 80, 92: 4,
    96: 96, 100: 20, 172: 4, 576: 576, 640: 640, 896: 896, 960: 960, 1536: 1536, 2304: 2304, 2560: 2560, 3584: 3584,
    5120: 5120, 14336: 14336,
}  # fmt: skip


def make(width: int, seed: int = 0, *, centred: bool = False) -> Orthogonal:
    return randomized(width, torch.Generator().manual_seed(seed), centred=centred)


@pytest.mark.parametrize(("width", "order"), ORDERS.items())
def test_the_largest_order_that_divides_the_width(width: int, order: int) -> None:
    assert hadamard_order(width) == order


@pytest.mark.parametrize("order", [2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 48, 60, 96])
def test_a_hadamard_matrix_has_signs_and_orthogonal_rows(order: int) -> None:
    found = hadamard_matrix(order)
    torch.testing.assert_close(found.abs(), torch.ones(order, order, dtype=torch.float64))
    torch.testing.assert_close(found @ found.T, order * torch.eye(order, dtype=torch.float64))


def test_powers_of_two_are_sylvesters() -> None:
    expected = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        expected = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), expected)
    torch.testing.assert_close(hadamard_matrix(16), expected)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 130), seed=st.integers(0, 2**32 - 1), centred=st.booleans())
def test_orthogonal_for_any_width(width: int, seed: int, centred: bool) -> None:
    turned = make(width, seed, centred=centred)
    matrix = turned.matrix()
    eye = torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, eye, atol=1e-12, rtol=0)
    rows = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(turned.apply(rows), (rows.double() @ matrix).float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(turned.undo(turned.apply(rows)), rows, atol=1e-6, rtol=1e-5)
    if centred:
        ones = torch.ones(width, dtype=torch.float64)
        torch.testing.assert_close(ones @ matrix, ones, atol=1e-12, rtol=0)


def test_a_single_channel_is_shared_out_evenly() -> None:
    for width in (24, 40, 64, 96):
        torch.testing.assert_close(make(width).matrix().abs(), torch.full((width, width), width**-0.5).double())


def test_runs_scales_and_types() -> None:
    turned, rows, scale = make(12), torch.randn(5, 36), torch.rand(36) + 0.5
    expected = (rows * scale).double().reshape(5, 3, 12) @ turned.matrix()
    found = turned.apply(rows.bfloat16().float(), scale, torch.float64)
    assert found.dtype == torch.float64
    torch.testing.assert_close(turned.apply(rows, scale), expected.reshape(5, 36).float())
    assert turned.apply(rows.bfloat16()).dtype == torch.bfloat16


def test_a_row_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, turned = torch.randn(40, 96), make(96, centred=True)
    whole = turned.apply(rows)
    assert all(torch.equal(turned.apply(rows[i : i + 1])[0], whole[i]) for i in range(40))
    monkeypatch.setattr("fettle.tensors.orthogonal.CHUNK", 300)
    assert torch.equal(turned.apply(rows), whole)


def test_seeds_draw_other_signs_and_words_say_what_it_is() -> None:
    assert torch.equal(make(64, 3).signs, make(64, 3).signs)
    assert not torch.equal(make(64, 3).signs, make(64, 4).signs)
    assert make(24).describe() == "Hadamard 24"
    assert make(6).describe() == "3 blocks of Hadamard 2"
