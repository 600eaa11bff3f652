"""Low-rank correction: the factors against the singular value decomposition, and codes and factors in turns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.quantize.problems import correlated_gram, random_weight
from torch import Tensor

from fettle.errors import RecipeError
from fettle.methods.quantize.errors import output_error, weight_error
from fettle.methods.quantize.gptq import GptqOptions, gptq
from fettle.methods.quantize.low_rank import LowRankCorrection, best_factors, fitted_right, low_rank_correction
from fettle.methods.registry import from_fields
from fettle.tensors import FactoredScheme, FactoredTensor, QuantizedTensor, Scheme, uniform

CODES = Scheme(grid=uniform(3), granularity="group", group_size=16, zero_point=True, scale_dtype="float32")
SHAPES = [(12, 20), (20, 12), (16, 16), (40, 7)]


def truncated(error: Tensor, rank: int, gram: Tensor) -> Tensor:
    """The best product of this rank by the textbook: the truncated SVD of E·L, and L⁻¹ behind it."""
    root = torch.linalg.cholesky(gram.double())
    left, values, right = torch.linalg.svd(error.double() @ root, full_matrices=False)
    product = left[:, :rank] * values[:rank] @ right[:rank]
    return torch.linalg.solve_triangular(root, product, upper=False, left=False)


def remaining(difference: Tensor, gram: Tensor) -> float:
    return float(((difference.double() @ gram.double()) * difference.double()).sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("damping", [0.0, 30.0])
def test_the_product_is_the_truncated_decomposition_in_the_weighted_norm(
    shape: tuple[int, int], rank: int, damping: float
) -> None:
    error, gram = random_weight(*shape), correlated_gram(shape[1])
    left, right = best_factors(error, rank, gram, damping=damping)
    damped = gram + damping * torch.eye(shape[1])
    expected = truncated(error, rank, damped)
    assert remaining(error - left @ right, damped) == pytest.approx(
        remaining(error - expected, damped), rel=1e-3, abs=1e-5 * remaining(error, damped)
    )
    assert torch.allclose((left @ right).double(), expected, atol=2e-3 * float(error.abs().max()))
    assert torch.allclose(left.T @ left, torch.eye(rank), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_gram_it_is_the_plain_decomposition(shape: tuple[int, int]) -> None:
    error = random_weight(*shape)
    left, right = best_factors(error, 3)
    assert torch.allclose((left @ right).double(), truncated(error, 3, torch.eye(shape[1])), atol=1e-4)


def test_a_gram_without_full_rank_and_no_error_at_all() -> None:
    error, gram = random_weight(12, 20), torch.zeros(20, 20)
    gram[:2, :2] = torch.tensor([[4.0, 1.0], [1.0, 3.0]])  # two inputs are driven: rank two leaves nothing
    left, right = best_factors(error, 2, gram)
    assert remaining(error - left @ right, gram) < 1e-8 * remaining(error, gram)
    left, right = best_factors(torch.zeros(12, 20), 2, gram)
    assert float((left @ right).abs().max()) == 0


def test_signs_do_not_depend_on_the_sign_of_the_error() -> None:
    error, gram = random_weight(12, 20), correlated_gram(20)
    left, right = best_factors(error, 4, gram)
    mirrored, other = best_factors(-error, 4, gram)
    assert torch.equal(left, mirrored) and torch.equal(right, -other)
    assert bool((left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all())


def test_the_right_factor_makes_up_for_a_rounded_left_one() -> None:
    error = random_weight(12, 20)
    left = best_factors(error, 3)[0].bfloat16().float()
    expected = torch.linalg.lstsq(left.double(), error.double()).solution
    assert torch.allclose(fitted_right(error, left).double(), expected, atol=1e-5)


def product(found: QuantizedTensor) -> Tensor:
    assert isinstance(found.remainder, FactoredTensor)
    return found.remainder.left.float() @ found.remainder.right.float()


@pytest.mark.parametrize("solver", ["gptq", "round_to_nearest"])
def test_it_is_the_best_correction_of_its_codes(solver: Any) -> None:
    weight, gram = random_weight(24, 48), correlated_gram(48)
    scheme = replace(CODES, remainder=FactoredScheme(rank=5))
    found = low_rank_correction(weight, {"gram": gram}, scheme, solver=solver, rounds=1)
    left_over = weight - replace(found, remainder=None).dequantize()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(48)
    best = remaining(left_over - truncated(left_over, 5, damped), damped)
    assert remaining(left_over - product(found), damped) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("solver", ["gptq", "round_to_nearest"])
def test_more_rounds_and_more_rank_are_never_worse(solver: Any) -> None:
    weight, gram = random_weight(24, 96), correlated_gram(96)
    errors = {}
    for rank, rounds in ((2, 1), (2, 2), (2, 5), (12, 2)):
        scheme = replace(CODES, remainder=FactoredScheme(rank=rank))
        found = low_rank_correction(weight, {"gram": gram}, scheme, solver=solver, rounds=rounds)
        errors[rank, rounds] = output_error(weight, found, gram)
    assert errors[2, 5] <= errors[2, 2] <= errors[2, 1]
    assert errors[12, 2] < errors[2, 2]
    assert errors[2, 5] < 0.99 * errors[2, 1]


def test_it_beats_the_codes_alone_and_weighing_helps_the_outputs() -> None:
    weight, gram = random_weight(24, 96), correlated_gram(96)
    alone = gptq(weight, gram, CODES, GptqOptions(clip="best", refine_passes=2))
    scheme = replace(CODES, remainder=FactoredScheme(rank=4))
    weighted = low_rank_correction(weight, {"gram": gram}, scheme)
    plain = low_rank_correction(weight, {"gram": gram}, scheme, weighted=False)
    errors = [output_error(weight, found, gram) for found in (weighted, plain, alone)]
    assert errors[0] < errors[1] < errors[2]


def test_it_needs_what_it_uses() -> None:
    assert from_fields("low_rank_correction", {}).needs() == ("gram", "drift")
    assert from_fields("low_rank_correction", {"solver": "round_to_nearest"}).needs() == ("gram",)
    method = LowRankCorrection(solver="round_to_nearest", weighted=False, rank=3)
    assert method.needs() == ()
    weight = random_weight(20, 40)
    found = method.compress(weight, {}, dtype="bfloat16")
    assert weight_error(weight, found) < weight_error(weight, replace(found, remainder=None))
    with pytest.raises(RecipeError, match="rank=0"):
        from_fields("low_rank_correction", {"rank": 0})
