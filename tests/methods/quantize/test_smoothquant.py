"""SmoothQuant's factors against the paper's formula, and what they are for: even ranges."""

from __future__ import annotations

import pytest
import torch
from tests.methods.quantize.problems import correlated_gram, random_weight

from fettle.errors import NonFiniteError
from fettle.methods.quantize.errors import output_error
from fettle.methods.quantize.gptq import Gptq
from fettle.methods.quantize.smoothquant import SmoothQuant, SmoothQuantRescaler


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_the_formula(alpha: float) -> None:
    weights = [random_weight(7, 12), random_weight(5, 12, 1)]
    largest = torch.rand(12, generator=torch.Generator().manual_seed(0)) * 50
    found = SmoothQuantRescaler(alpha=alpha).factors(
        weights, {"absolute_maximum": largest}, torch.arange(12), dtype="float32"
    )
    for column in range(12):
        weight = max(float(w[:, column].abs().max()) for w in weights)
        assert float(found[column]) == pytest.approx(float(largest[column]) ** alpha / weight ** (1 - alpha), rel=1e-5)
    if alpha == 0.5:  # inputs and columns have the same range afterwards
        columns = torch.cat(weights).abs().amax(0)
        torch.testing.assert_close(columns * found, largest / found, rtol=1e-5, atol=0)


def test_columns_that_share_a_channel_share_a_factor() -> None:
    weight = torch.tensor([[1.0, 2.0, 4.0, 3.0]])
    largest = torch.tensor([9.0, 1.0, 16.0, 27.0])
    found = SmoothQuantRescaler().factors(
        [weight], {"absolute_maximum": largest}, torch.tensor([0, 1, 0, 1]), dtype="float32"
    )
    torch.testing.assert_close(found, torch.tensor([(16 / 4) ** 0.5, (27 / 3) ** 0.5]))


def test_channels_without_inputs_or_weights_are_left_alone() -> None:
    weight = random_weight(4, 6)
    weight[:, 2] = 0
    largest = torch.tensor([0.0, 1.0, 1.0, 1e30, 1e-30, 1.0])
    found = SmoothQuantRescaler().factors([weight], {"absolute_maximum": largest}, torch.arange(6), dtype="float32")
    assert float(found[0]) == float(found[2]) == 1.0
    assert bool(((found > 0.9e-4) & (found < 1.1e4)).all())


def test_weights_that_are_no_numbers_are_refused() -> None:
    weight = random_weight(4, 6)
    weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError):
        SmoothQuantRescaler().factors([weight], {"absolute_maximum": torch.ones(6)}, torch.arange(6), dtype="float32")


def test_the_method_hands_its_alpha_on() -> None:
    assert SmoothQuant(alpha=0.3).rescaler() == SmoothQuantRescaler(alpha=0.3)
    assert SmoothQuant().needs() == ()


def test_gptq_behind_it_is_gptq() -> None:
    weight, gram = random_weight(9, 40), correlated_gram(40)
    fields = {"bits": 4, "group_size": None, "clip": "none"}
    method = SmoothQuant(solver="gptq", **fields)
    assert method.needs() == Gptq(**fields).needs()
    found = method.compress(weight, {"gram": gram}, dtype="float32")
    assert torch.equal(found.codes, Gptq(**fields).compress(weight, {"gram": gram}, dtype="float32").codes)
    nearest = SmoothQuant(**fields).compress(weight, {}, dtype="float32")
    assert output_error(weight, found, gram) < 0.9 * output_error(weight, nearest, gram)
