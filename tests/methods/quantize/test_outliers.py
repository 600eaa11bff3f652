"""Sparse outliers: what is kept against brute force, the entries against least squares."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.quantize.problems import correlated_gram, random_weight
from torch import Tensor

from fettle.errors import NonFiniteError, RecipeError
from fettle.methods.quantize.errors import output_error, weight_error
from fettle.methods.quantize.gptq import Gptq
from fettle.methods.quantize.outliers import SparseOutliers, fit_entries, kept_places, sparse_outliers
from fettle.methods.quantize.round_to_nearest import round_to_nearest
from fettle.methods.quantize.rounding_cost import costliest, largest, rounding_costs
from fettle.methods.quantize.solvers import Solver, inverse_diagonal
from fettle.methods.quantize.sweep import factorize
from fettle.methods.registry import from_fields
from fettle.tensors import Scheme, SparseScheme, SparseTensor, uniform
from fettle.tensors.levels import named

CODES = Scheme(grid=uniform(3), granularity="group", group_size=5, zero_point=True, scale_dtype="float32")
GRIDS = [
    CODES,
    replace(CODES, zero_point=False),
    replace(CODES, granularity="channel", group_size=None),
    replace(CODES, granularity="tensor", group_size=None),
    Scheme(grid=named("normal_float", 3), granularity="group", group_size=4),
]


def test_the_inverse_diagonal_is_that_of_the_inverse() -> None:
    gram = correlated_gram(30)
    factor = factorize(gram, damping=0.01, activation_order=True)
    inverse = torch.linalg.inv(gram.double() + factor.damping * torch.eye(30, dtype=torch.float64))
    assert torch.allclose(inverse_diagonal(factor).double(), inverse.diagonal(), rtol=1e-3)


def rounding_error(weight: Tensor, scheme: Scheme, cost: Tensor) -> float:
    """Σ (w - v)² / [H⁻¹]_jj in full ranges."""
    return float(((weight - round_to_nearest(weight, scheme).dequantize()).square() * cost).sum())


@pytest.mark.parametrize("scheme", GRIDS, ids=lambda s: s.describe())
@pytest.mark.parametrize("seed", range(3))
def test_no_other_single_weight_gains_more(scheme: Scheme, seed: int) -> None:
    weight = random_weight(4, 10, seed)
    weight[seed, 2 * seed] *= 3
    diagonal = torch.rand(10, generator=torch.Generator().manual_seed(seed)) + 0.1
    left = {}
    for place in range(weight.numel()):
        without = weight.clone()
        without.view(-1)[place] = 0
        left[place] = rounding_error(without, scheme, 1 / diagonal)
    chosen = int(costliest(weight, 1, scheme, diagonal))
    assert left[chosen] == pytest.approx(min(left.values()), rel=1e-5)
    gains = rounding_costs(weight, scheme, diagonal).flatten() / diagonal.mean()
    before = rounding_error(weight, scheme, 1 / diagonal)
    assert float(gains[chosen]) == pytest.approx(before - left[chosen], rel=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_other_set_of_the_same_size_costs_more_by_its_own_measure(count: int) -> None:
    weight, gram = random_weight(2, 5), correlated_gram(5)
    solving = Solver("round_to_nearest", weight, {"gram": gram}, CODES)
    for importance, cost in (
        ("magnitude", weight.square() / solving.inverse_diagonal),
        ("rounding", rounding_costs(weight, CODES, solving.inverse_diagonal)),
    ):
        flat = cost.flatten()
        best = max(float(flat[list(some)].sum()) for some in itertools.combinations(range(10), count))
        chosen = largest(cost, count) if importance == "rounding" else kept_places(solving, CODES, count, importance)
        assert float(flat[chosen].sum()) == pytest.approx(best)
        assert chosen.tolist() == sorted(chosen.tolist())


def test_an_outlier_behind_another_is_found() -> None:
    weight = torch.full((1, 10), 0.01)
    weight[0, 3:5] = torch.tensor([5.0, 4.9])
    assert costliest(weight, 4, replace(CODES, group_size=10), torch.ones(10)).tolist()[:1] == [3]
    assert {3, 4} <= set(costliest(weight, 4, replace(CODES, group_size=10), torch.ones(10)).tolist())


def test_the_entries_are_the_least_squares_at_their_places() -> None:
    error, gram = random_weight(5, 30), correlated_gram(30)
    places = torch.randperm(150, generator=torch.Generator().manual_seed(1))[:20].sort().values
    sparse = SparseTensor.at(places, torch.zeros(20), (5, 30))
    fitted = fit_entries(error, sparse, gram, 3.0)
    root = torch.linalg.cholesky(gram.double() + 3.0 * torch.eye(30, dtype=torch.float64))
    rows, columns = sparse.places()
    for row in range(5):
        own = columns[rows == row]
        expected = torch.linalg.lstsq(root.T[:, own], root.T @ error[row].double()).solution
        assert torch.allclose(fitted[rows == row].double(), expected, atol=1e-4)


@pytest.mark.parametrize("importance", ["rounding", "magnitude"])
@pytest.mark.parametrize("solver", ["gptq", "round_to_nearest"])
def test_outliers_lower_the_error(importance: Any, solver: Any) -> None:
    weight, gram = random_weight(40, 160), correlated_gram(160)
    errors = []
    for share in (0.0, 0.005, 0.03):
        method = SparseOutliers(bits=3, asymmetric=True, outliers=share, importance=importance, solver=solver)
        found = method.compress(weight, {"gram": gram}, dtype="bfloat16")
        assert (found.remainder is None) == (share == 0)
        errors.append(output_error(weight, found, gram))
    assert errors[2] < errors[1] < errors[0]
    assert errors[1] < 0.95 * errors[0]


def test_without_outliers_it_is_the_solver() -> None:
    weight, statistics = random_weight(8, 70), {"gram": correlated_gram(70), "drift": torch.randn(70, 70)}
    found = SparseOutliers(outliers=0.0).compress(weight, statistics, dtype="bfloat16")
    plain = Gptq().compress(weight, statistics, dtype="bfloat16")
    assert found.scheme == plain.scheme
    assert weight_error(plain.dequantize(), found) < 1e-3  # activation order breaks no tie differently


def test_one_huge_weight_is_kept_and_hurts_nobody() -> None:
    weight = random_weight(10, 64)
    weight[4, 7] = 30.0
    scheme = replace(CODES, group_size=None, granularity="channel", remainder=SparseScheme(share=0.002))
    found = sparse_outliers(weight, {}, scheme, solver="round_to_nearest")
    assert isinstance(found.remainder, SparseTensor)
    assert (found.remainder.places()[0].tolist(), found.remainder.places()[1].tolist()) == ([4], [7])
    assert float(found.dequantize()[4, 7]) == pytest.approx(30.0, rel=0.01)
    rest = weight.clone()
    rest[4, 7] = 0
    values = found.dequantize()
    values[4, 7] = 0
    assert weight_error(rest, values) < 0.1


def test_it_needs_what_it_uses() -> None:
    assert from_fields("sparse_outliers", {}).needs() == ("gram", "drift")
    assert SparseOutliers(solver="round_to_nearest").needs() == ("gram",)
    assert SparseOutliers(solver="round_to_nearest", importance="magnitude").needs() == ()
    with pytest.raises(RecipeError, match=r"outliers=0\.06"):
        from_fields("sparse_outliers", {"outliers": 0.06})


def test_an_entry_beyond_its_type_is_refused() -> None:
    weight = random_weight(20, 20)
    weight[3, 3] = 1e6
    method = SparseOutliers(solver="round_to_nearest", scale_dtype="float16", importance="magnitude")
    with pytest.raises(NonFiniteError, match="beyond float16"):
        method.compress(weight, {}, dtype="float16")
