"""Schedules by the paper's equation, and the loop with any healing."""

from __future__ import annotations

import pytest
import torch
from tests.methods.quantize.problems import correlated_gram, random_weight

from fettle.methods.prune.schedule import prune_in_rounds, sparsities
from fettle.methods.quantize.errors import output_error
from fettle.methods.registry import from_fields


def test_the_cubic_schedule_is_the_papers() -> None:
    """Zhu and Gupta, equation 1: s_t = s_f + (s_i - s_f)·(1 - t/n)³ with s_i = 0."""
    found = sparsities(0.9, 4)
    assert found == pytest.approx([0.9 - 0.9 * (1 - t / 4) ** 3 for t in (1, 2, 3, 4)])
    assert found[-1] == 0.9
    assert sparsities(0.9, 3, "linear") == pytest.approx([0.3, 0.6, 0.9])
    assert sparsities(0.5, 1) == [0.5]


def test_the_loop_prunes_then_heals_and_takes_any_state() -> None:
    told: list[str] = []

    def prune(state: str, sparsity: float) -> str:
        told.append(f"prune {sparsity:g}")
        return state + "p"

    def heal(state: str) -> str:
        told.append("heal")
        return state + "h"

    assert prune_in_rounds("", [0.5, 0.8], prune, heal) == "phph"
    assert told == ["prune 0.5", "heal", "prune 0.8", "heal"]


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_healing_pays_and_more_rounds_pay_more(name: str) -> None:
    errors = []
    for fields in ({}, {"heal": "least_squares"}, {"heal": "least_squares", "rounds": 8}):
        total = 0.0
        for seed in range(3):
            gram, weight = correlated_gram(64, seed), random_weight(24, 64, seed)
            known = {"gram": gram, "squared_norm": gram.diagonal().clone()}
            method = from_fields(name, {"sparsity": 0.7, "pattern": "row", **fields})
            total += output_error(weight, method.compress(weight, known, dtype="float32"), gram)
        errors.append(total)
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < errors[1]


def test_what_went_stays_gone_while_rounds_go_on() -> None:
    gram, weight = correlated_gram(32), random_weight(8, 32)
    method = from_fields("magnitude", {"heal": "least_squares", "rounds": 5})
    found = method.compress(weight, {"gram": gram}, dtype="float32")
    assert int((found.dequantize() != 0).sum()) == 128
    assert torch.equal(found.dequantize() != 0, found.kept)
