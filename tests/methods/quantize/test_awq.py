"""AWQ's factors: brute force over the same grid, by outputs on real inputs; and the clipping search behind them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.methods.quantize.problems import correlated_gram, random_weight
from torch import Tensor

from fettle.errors import NonFiniteError
from fettle.methods.protocols import RescalingMethod
from fettle.methods.quantize.awq import Awq, AwqRescaler, channel_mean, nearest_by_gram, powers, rounding_error
from fettle.methods.quantize.errors import output_error
from fettle.methods.quantize.fields import GridFields
from fettle.methods.quantize.gptq import Gptq
from fettle.methods.quantize.round_to_nearest import round_to_nearest
from fettle.tensors import quantize

GRID = GridFields(bits=3, group_size=8, asymmetric=True, scale_dtype="float32")


def uneven_inputs(in_features: int, seed: int = 0, tokens: int = 300) -> Tensor:
    """Inputs of which a few channels are driven much harder than the others."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.exp(1.5 * torch.randn(in_features, generator=generator))
    return torch.randn(tokens, in_features, generator=generator) * strength


def statistics_of(inputs: Tensor) -> dict[str, Tensor]:
    return {"gram": inputs.T @ inputs, "absolute_mean": inputs.abs().mean(0)}


def by_hand(weights: list[Tensor], inputs: Tensor, channels: Tensor, alphas: int) -> tuple[Tensor, float, float]:
    """The best factors of the grid, their error on the inputs, and the error without any; as the paper says it."""
    strength = torch.stack([inputs[:, channels == c].abs().mean() for c in range(int(channels.max()) + 1)])
    found = []
    for step in range(alphas + 1):
        s = strength.pow(step / alphas)
        s = s / (s.max() * s.min()).sqrt()
        error = 0.0
        for weight in weights:
            rounded = round_to_nearest(weight * s[channels], GRID.scheme("float32")).dequantize()
            outputs = (inputs / s[channels]) @ rounded.T
            error += float((outputs - inputs @ weight.T).double().square().sum())
        found.append((s, error))
    best = min(found, key=lambda one: one[1])
    return best[0], best[1], found[0][1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shared", [False, True])
def test_the_factors_are_those_of_brute_force(seed: int, shared: bool) -> None:
    inputs = uneven_inputs(24, seed)
    weights = [random_weight(16, 24, seed), random_weight(9, 24, seed + 50)]
    channels = torch.arange(24) // 12 * 6 + torch.arange(24) % 6 if shared else torch.arange(24)
    expected, least, without = by_hand(weights, inputs, channels, 20)
    copies = [weight.clone() for weight in weights]
    found = AwqRescaler(grid=GRID).factors(weights, statistics_of(inputs), channels, dtype="float32")
    assert all(torch.equal(weight, copy) for weight, copy in zip(weights, copies, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    error = rounding_error(weights, inputs.T @ inputs, found[channels], GRID.scheme("float32"))
    assert error == pytest.approx(least, rel=1e-3)
    assert error <= without * (1 + 1e-6)


def test_it_pays_where_inputs_are_uneven() -> None:
    gains = []
    for seed in range(4):
        _, least, without = by_hand([random_weight(32, 64, seed)], uneven_inputs(64, seed), torch.arange(64), 20)
        gains.append(least / without)
    assert max(gains) < 0.9, gains


def test_no_exponent_means_no_factors() -> None:
    statistics = statistics_of(uneven_inputs(24))
    found = AwqRescaler(grid=GRID, alphas=0).factors([random_weight(4, 24)], statistics, torch.arange(24), dtype="x")
    assert torch.equal(found, torch.ones(24))


def test_channels_that_nothing_drives_keep_their_factor() -> None:
    driven = torch.tensor([0.0, 4.0, 1.0, 0.0])
    torch.testing.assert_close(powers(driven, 0.5), torch.tensor([1.0, 2**0.5, 0.5**0.5, 1.0]))
    assert torch.equal(powers(torch.zeros(3), 0.7), torch.ones(3))
    wide = powers(torch.tensor([1e-30, 1e30]), 1.0)
    torch.testing.assert_close(wide, torch.tensor([1e-4, 1e4]))
    means = channel_mean(torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([0, 1, 0, 1]))
    assert torch.equal(means, torch.tensor([2.0, 4.0]))
    nothing = {"gram": torch.zeros(24, 24), "absolute_mean": torch.zeros(24)}
    found = AwqRescaler(grid=GRID).factors([random_weight(4, 24)], nothing, torch.arange(24), dtype="float32")
    assert torch.equal(found, torch.ones(24))


def test_weights_that_are_no_numbers_are_refused() -> None:
    weight = random_weight(4, 24)
    weight[1, 2] = float("nan")
    with pytest.raises(NonFiniteError):
        AwqRescaler(grid=GRID).factors([weight], statistics_of(uneven_inputs(24)), torch.arange(24), dtype="float32")


@pytest.mark.parametrize("seed", range(3))
def test_the_better_clip_of_each_row_is_taken(seed: int) -> None:
    weight, gram, scheme = random_weight(20, 70, seed), correlated_gram(70, seed), GRID.scheme("float32")
    full, searched = round_to_nearest(weight, scheme), nearest_by_gram(weight, gram, scheme, clip="search")
    best = nearest_by_gram(weight, gram, scheme, clip="best").dequantize()
    for row in range(len(weight)):
        each = [output_error(weight[row : row + 1], v.dequantize()[row : row + 1], gram) for v in (full, searched)]
        assert output_error(weight[row : row + 1], best[row : row + 1], gram) == pytest.approx(min(each), rel=1e-4)
    again = quantize(weight, searched.scale, searched.zero_point, scheme)
    assert torch.equal(again.codes, searched.codes), "every code is the nearest in its range"


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({}, ("gram",)),
        ({"clip": "none"}, ()),
        ({"solver": "gptq"}, ("gram", "drift")),
    ],
)
def test_it_asks_for_what_its_solver_looks_at(fields: dict[str, Any], needs: tuple[str, ...]) -> None:
    method = Awq(**fields)
    assert method.needs() == needs
    assert isinstance(method, RescalingMethod)
    assert method.rescaler() == Awq(**fields).rescaler(), "linears of one method work on one group"
    assert method.rescaler() != Awq(bits=2, **fields).rescaler()


def test_with_gptq_behind_it_the_codes_are_gptqs() -> None:
    statistics = {"gram": correlated_gram(70), "drift": torch.zeros(70, 70)}
    ours = Awq(bits=3, solver="gptq").compress(random_weight(9, 70), statistics, dtype="float32")
    theirs = Gptq(bits=3).compress(random_weight(9, 70), statistics, dtype="float32")
    assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scale, theirs.scale)
