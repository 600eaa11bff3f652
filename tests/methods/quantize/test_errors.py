"""The objectives, by the definition."""

from __future__ import annotations

import pytest
import torch
from tests.methods.quantize.problems import correlated_gram, random_weight

from fettle.methods.quantize.errors import output_error, weight_error
from fettle.methods.quantize.round_to_nearest import round_to_nearest
from fettle.tensors import Scheme, quantized, uniform

SCHEME = Scheme(grid=uniform(3), granularity="group", group_size=32)


@pytest.mark.parametrize("tile", [1 << 19, 300])
def test_errors_are_what_the_equations_say(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "TILE_WEIGHTS", tile)
    weight, gram = random_weight(9, 80), correlated_gram(80)
    compressed = round_to_nearest(weight, SCHEME)
    difference = (weight - compressed.dequantize()).double()
    wide, exact = weight.double(), gram.double()
    expected = torch.trace(difference @ exact @ difference.T) / torch.trace(wide @ exact @ wide.T)
    assert output_error(weight, compressed, gram) == pytest.approx(float(expected), rel=1e-4)
    assert output_error(weight, compressed.dequantize(), gram) == output_error(weight, compressed, gram)
    expected = difference.square().sum() / wide.square().sum()
    assert weight_error(weight, compressed) == pytest.approx(float(expected), rel=1e-5)


def test_nothing_lost_and_nothing_there() -> None:
    zero = torch.zeros(3, 8)
    assert weight_error(zero, zero) == 0
    assert output_error(zero, zero, torch.eye(8)) == 0
    assert weight_error(zero, zero + 1) == float("inf")
