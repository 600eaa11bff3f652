"""Sampling against distributions worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fettle.engine.sampling import Sampling, next_token, probabilities
from fettle.errors import UsageError

LOGITS = torch.tensor([math.log(x) for x in (0.1, 0.5, 0.15, 0.25)])


def close(found: torch.Tensor, wanted: list[float]) -> bool:
    return torch.allclose(found, torch.tensor(wanted), atol=1e-6)


def test_temperature_one_is_the_softmax() -> None:
    assert close(probabilities(LOGITS, Sampling(temperature=1.0)), [0.1, 0.5, 0.15, 0.25])


def test_temperature_squares_the_odds() -> None:
    squares = [0.01, 0.25, 0.0225, 0.0625]
    wanted = [x / sum(squares) for x in squares]
    assert close(probabilities(LOGITS, Sampling(temperature=0.5)), wanted)


def test_top_k_keeps_the_likeliest() -> None:
    assert close(probabilities(LOGITS, Sampling(temperature=1.0, top_k=2)), [0, 2 / 3, 0, 1 / 3])


def test_top_p_keeps_the_smallest_nucleus() -> None:
    assert close(probabilities(LOGITS, Sampling(temperature=1.0, top_p=0.7)), [0, 2 / 3, 0, 1 / 3])
    assert close(probabilities(LOGITS, Sampling(temperature=1.0, top_p=0.4)), [0.0, 1.0, 0.0, 0.0])


def test_top_k_larger_than_the_vocabulary_changes_nothing() -> None:
    assert close(probabilities(LOGITS, Sampling(temperature=1.0, top_k=99)), [0.1, 0.5, 0.15, 0.25])


def test_greedy_takes_the_first_of_equal_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    assert next_token(torch.tensor([1.0, 3.0, 3.0]), Sampling(), generator) == 1


def test_draws_follow_the_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [next_token(LOGITS, Sampling(temperature=1.0), generator) for _ in range(4000)]
    for token, chance in enumerate([0.1, 0.5, 0.15, 0.25]):
        spread = math.sqrt(chance * (1 - chance) / len(drawn))
        assert abs(drawn.count(token) / len(drawn) - chance) < 5 * spread


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Sampling(temperature=-1.0), "temperature is -1.0"),
        (Sampling(temperature=float("nan")), "temperature is nan"),
        (Sampling(top_k=0), "top_k is 0"),
        (Sampling(top_p=0.0), "top_p is 0.0"),
        (Sampling(top_p=1.5), "top_p is 1.5"),
    ],
)
def test_impossible_values_are_refused_with_the_value(sampling: Sampling, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        sampling.check()


@pytest.mark.parametrize(
    "fields", [{"temperature": 1e-40}, {"temperature": 5e-324}, {"temperature": 1.0, "top_p": 1e-300}]
)
def test_values_next_to_nothing_still_draw_the_best(fields: dict[str, float]) -> None:
    sampling = Sampling(**fields)
    sampling.check()
    assert close(probabilities(LOGITS, sampling), [0.0, 1.0, 0.0, 0.0])
    assert close(probabilities(LOGITS * 1e30, sampling), [0.0, 1.0, 0.0, 0.0])
    assert next_token(LOGITS, sampling, torch.Generator().manual_seed(0)) == 1


@pytest.mark.parametrize("seed", [2**63, -1])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(UsageError, match=f"seed is {seed}"):
        Sampling(seed=seed).check()
