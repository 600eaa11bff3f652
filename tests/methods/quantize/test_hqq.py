"""HQQ: its own objective against brute force, and what it is for: an outlier."""

from __future__ import annotations

import pytest
import torch
from tests.methods.quantize.problems import random_weight

from fettle.errors import RecipeError
from fettle.methods.quantize.errors import robust_error
from fettle.methods.quantize.hqq import Hqq, hqq, shrink
from fettle.methods.quantize.round_to_nearest import round_to_nearest
from fettle.tensors import Scheme, quantize, uniform

SCHEME = Scheme(grid=uniform(2), granularity="group", group_size=8, zero_point=True)


def test_near_the_best_of_every_scale_and_zero_point() -> None:
    weight = random_weight(1, 8)
    least = float("inf")
    for zero in range(4):
        for scale in torch.linspace(0.005, float(weight.abs().max()) * 2, 400):
            tried = quantize(weight, scale.reshape(1, 1), torch.tensor([[zero]], dtype=torch.uint8), SCHEME)
            least = min(least, robust_error(weight, tried))
    found = robust_error(weight, hqq(weight, SCHEME))
    assert found <= robust_error(weight, round_to_nearest(weight, SCHEME))
    assert found <= least * 1.35  # it walks downhill from the full range and need not find the bottom


def test_an_outlier_widens_the_range_less_than_with_round_to_nearest() -> None:
    weight = random_weight(8, 64)
    weight[:, 3] *= 12
    scheme = Scheme(grid=uniform(3), granularity="group", group_size=32, zero_point=True)
    ours, nearest = hqq(weight, scheme), round_to_nearest(weight, scheme)
    assert float(ours.scale.mean()) < float(nearest.scale.mean())
    keep = [column for column in range(64) if column != 3]
    assert robust_error(weight[:, keep], ours.dequantize()[:, keep]) < robust_error(
        weight[:, keep], nearest.dequantize()[:, keep]
    )


def test_more_iterations_are_never_worse() -> None:
    weight = random_weight(6, 64)
    errors = [robust_error(weight, hqq(weight, SCHEME, iterations=count)) for count in (1, 3, 10, 30)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("norm", [0.5, 0.7, 1.0])
def test_the_threshold_leaves_small_errors_out_and_large_ones_nearly_whole(norm: float) -> None:
    error = torch.tensor([-2.0, -0.01, 0.0, 0.01, 2.0])
    found = shrink(error, 10.0, norm)
    assert found[[1, 2, 3]].tolist() == [0.0, 0.0, 0.0]
    assert found[4] == pytest.approx(2.0 - norm / 10 * 2 ** (norm - 1))
    assert found[0] == -found[4]


def test_learned_levels_are_refused_with_a_reason() -> None:
    with pytest.raises(RecipeError, match=r"learned levels have none; use round_to_nearest or gptq"):
        Hqq(grid="learned").validate()
