"""The oracles of gptq and awq see a planted fault: a wrong index or sign, a forgotten damping, a factor upside down.

Each case breaks one line of the method and asks that an oracle of its own test file, unchanged, fails. Without the
fault the same oracle passes there. Those of rotation stand in `tests/parity/test_rotation.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.quantize import test_awq, test_gptq
from tests.methods.quantize.problems import correlated_gram, random_weight
from torch import Tensor

from fettle.methods.quantize import awq, gptq, sweep
from fettle.methods.quantize.sweep import Factor

FactorOf = Callable[[Factor], Factor]


def codes_of_the_naive_update() -> None:
    """GPTQ's oracle on its own problem."""
    weight, gram = random_weight(6, 44), correlated_gram(44)
    found = gptq.gptq(weight, gram, test_gptq.INT4, gptq.GptqOptions(activation_order=True))
    expected = test_gptq.naive(weight, gram, test_gptq.INT4, activation_order=True)
    assert torch.equal(found.codes, expected)


def factors_of_brute_force() -> None:
    """AWQ's oracle on its own problem, with channels that several columns share."""
    test_awq.test_the_factors_are_those_of_brute_force(seed=1, shared=True)


def wrong_index(factor: Factor) -> Factor:
    """Two neighbouring columns take each other's place."""
    order = factor.order.clone()
    order[[20, 21]] = order[[21, 20]]
    return replace(factor, order=order)


def wrong_sign(factor: Factor) -> Factor:
    """Errors are added where they should be made up for."""
    eye = torch.eye(len(factor.pivots))
    return replace(factor, matrix=2 * eye - factor.matrix)


def shifted_row(factor: Factor) -> Factor:
    """The update reads the row beside its own."""
    return replace(factor, matrix=factor.matrix.roll(1, dims=0))


@pytest.mark.parametrize("fault", [wrong_index, wrong_sign, shifted_row])
def test_gptq_with_a_broken_factor_is_seen(fault: FactorOf, monkeypatch: pytest.MonkeyPatch) -> None:
    codes_of_the_naive_update()
    whole = sweep.factorize
    monkeypatch.setattr(gptq, "factorize", lambda gram, **fields: fault(whole(gram, **fields)))
    with pytest.raises(AssertionError):
        codes_of_the_naive_update()


def test_gptq_without_its_damping_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sweep.factorize
    monkeypatch.setattr(gptq, "factorize", lambda gram, **fields: whole(gram, **{**fields, "damping": 0.0}))
    with pytest.raises(AssertionError):
        codes_of_the_naive_update()


def upside_down(driven: Tensor, alpha: float) -> Tensor:
    """Strong channels are made weaker."""
    return 1 / awq_powers(driven, alpha)


def next_channel(driven: Tensor, alpha: float) -> Tensor:
    """Each channel gets its neighbour's factor."""
    return awq_powers(driven, alpha).roll(1)


def without_exponent(driven: Tensor, alpha: float) -> Tensor:
    """The grid has one point."""
    return awq_powers(driven, 1.0)


awq_powers = awq.powers


@pytest.mark.parametrize("fault", [upside_down, next_channel, without_exponent])
def test_awq_with_broken_factors_is_seen(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    factors_of_brute_force()
    monkeypatch.setattr(awq, "powers", fault)
    with pytest.raises(AssertionError):
        factors_of_brute_force()


def test_awq_that_takes_columns_for_channels_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_columns(figures: Tensor, channels: Tensor) -> Tensor:
        return figures[: int(channels.max()) + 1].float()

    monkeypatch.setattr(awq, "channel_mean", first_columns)
    with pytest.raises(AssertionError):
        factors_of_brute_force()


def test_awq_that_forgets_to_divide_the_inputs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = awq.rounding_error

    def undivided(weights: Any, gram: Tensor, columns: Tensor, scheme: Any) -> float:
        return whole([weight * columns for weight in weights], gram, torch.ones_like(columns), scheme)

    monkeypatch.setattr(awq, "rounding_error", undivided)
    with pytest.raises(AssertionError):
        factors_of_brute_force()
