"""Sampling against distributions worked out by hand, and the race against the distribution that it draws from."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fettle.engine.sampler import (
    Draw,
    Sampling,
    adjusted,
    draw_token,
    likeliest,
    log_probabilities,
    probabilities,
    race,
)
from fettle.errors import UsageError

CHANCES = [0.1, 0.5, 0.15, 0.25]
LOGITS = np.log(np.array(CHANCES, np.float32))


def close(found: np.ndarray, wanted: list[float]) -> bool:
    return bool(np.allclose(found, wanted, atol=1e-6))


def test_temperature_one_is_the_softmax() -> None:
    assert close(probabilities(LOGITS, Sampling(temperature=1.0)), CHANCES)


def test_temperature_squares_the_odds() -> None:
    squares = [0.01, 0.25, 0.0225, 0.0625]
    assert close(probabilities(LOGITS, Sampling(temperature=0.5)), [x / sum(squares) for x in squares])


def test_top_k_keeps_the_likeliest() -> None:
    assert close(probabilities(LOGITS, Sampling(temperature=1.0, top_k=2)), [0, 2 / 3, 0, 1 / 3])
    assert close(probabilities(LOGITS, Sampling(temperature=1.0, top_k=99)), CHANCES)


def test_top_p_keeps_the_smallest_nucleus() -> None:
    assert close(probabilities(LOGITS, Sampling(temperature=1.0, top_p=0.7)), [0, 2 / 3, 0, 1 / 3])
    assert close(probabilities(LOGITS, Sampling(temperature=1.0, top_p=0.4)), [0.0, 1.0, 0.0, 0.0])


def test_min_p_is_a_share_of_the_likeliest() -> None:
    assert close(probabilities(LOGITS, Sampling(temperature=1.0, min_p=0.4)), [0, 2 / 3, 0, 1 / 3])
    assert close(probabilities(LOGITS, Sampling(temperature=1.0, min_p=1.0)), [0, 1, 0, 0])


def test_penalties_follow_their_formulas() -> None:
    logits = np.array([2.0, -2.0, 1.0, 0.5], np.float32)
    seen = Draw(sampling=Sampling(repetition_penalty=2.0), position=3, prompt=(0,), made=(1, 1))
    assert close(adjusted(logits, seen), [1.0, -4.0, 1.0, 0.5])
    made = Draw(
        sampling=Sampling(presence_penalty=0.5, frequency_penalty=0.25), position=3, prompt=(0,), made=(1, 1, 2)
    )
    assert close(adjusted(logits, made), [2.0, -3.0, 0.25, 0.5])


def test_bias_and_bans_decide_greedy_tokens() -> None:
    assert draw_token(LOGITS, Draw(sampling=Sampling(), position=0)) == 1
    assert draw_token(LOGITS, Draw(sampling=Sampling(), position=0, bias={2: 9.0})) == 2
    assert draw_token(LOGITS, Draw(sampling=Sampling(), position=0, banned={1})) == 3
    sampling = Sampling(temperature=1.0)
    assert all(draw_token(LOGITS, Draw(sampling=sampling, position=p, banned={1, 3})) in (0, 2) for p in range(50))


def test_greedy_takes_the_first_of_equal_ones() -> None:
    assert draw_token(np.array([1.0, 3.0, 3.0], np.float32), Draw(sampling=Sampling(), position=0)) == 1


def chi_square(counts: list[int], chances: list[float]) -> float:
    total = sum(counts)
    return sum((n - total * p) ** 2 / (total * p) for n, p in zip(counts, chances, strict=True))


@pytest.mark.parametrize("vary", ["position", "seed"])
def test_the_race_draws_from_the_distribution(vary: str) -> None:
    drawn = [race(np.array(CHANCES), *((0, i) if vary == "position" else (i, 0))) for i in range(4000)]
    assert chi_square([drawn.count(token) for token in range(4)], CHANCES) < 16.27  # 3 degrees of freedom, p = 0.001


def test_the_race_never_draws_what_cannot_be() -> None:
    assert all(race(np.array([0.0, 0.5, 0.0, 0.5]), 0, place) in (1, 3) for place in range(200))


def test_a_draft_that_races_with_the_same_noise_mostly_agrees() -> None:
    p, q = np.array(CHANCES), np.array([0.15, 0.45, 0.15, 0.25])
    distance = np.abs(p - q).sum() / 2
    agreed = np.mean([race(p, 1, place) == race(q, 1, place) for place in range(2000)])
    assert agreed > (1 - distance) / (1 + distance) - 0.02


def test_log_probabilities_and_the_likeliest() -> None:
    found = log_probabilities(LOGITS + 5)
    assert np.allclose(np.exp(found), CHANCES, atol=1e-6)
    assert [token for token, _ in likeliest(found, 3)] == [1, 3, 2]
    assert likeliest(np.array([1.0, 1.0]), 1) == ((0, 1.0),)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"presence_penalty": math.nan}, "presence_penalty is nan"),
        ({"frequency_penalty": 1000.0}, "frequency_penalty is 1000.0"),
        ({"seed": 2**63}, f"seed is {2**63}"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_values_are_refused_with_the_value(fields: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Sampling(**fields).check()


@pytest.mark.parametrize(
    "fields", [{"temperature": 1e-40}, {"temperature": 5e-324}, {"temperature": 1.0, "top_p": 1e-300}]
)
def test_values_next_to_nothing_still_draw_the_best(fields: dict[str, float]) -> None:
    sampling = Sampling(**fields)
    sampling.check()
    for logits in (LOGITS, LOGITS * np.float32(1e30)):
        assert close(probabilities(logits, sampling), [0.0, 1.0, 0.0, 0.0])
        assert draw_token(logits, Draw(sampling=sampling, position=7)) == 1
