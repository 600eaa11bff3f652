"""SparseGPT against what another mind wrote: explicit inverses, exhaustive least squares, GPTQ where nothing goes."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.methods.quantize.problems import correlated_gram, random_weight
from torch import Tensor

from fettle.errors import RecipeError
from fettle.methods.prune import sparsegpt as room
from fettle.methods.prune.fields import Healing
from fettle.methods.prune.healing import least_squares
from fettle.methods.prune.sparsegpt import SparseGpt, sparsegpt
from fettle.methods.quantize import sweep
from fettle.methods.quantize.errors import output_error
from fettle.methods.quantize.gptq import GptqOptions, gptq
from fettle.methods.quantize.round_to_nearest import round_to_nearest
from fettle.methods.registry import from_fields
from fettle.tensors import MaskedScheme, QuantizedTensor, Scheme, uniform
from fettle.tensors.masked import MaskedTensor

HALF = MaskedScheme(pattern="layer", sparsity=0.5)
CODES = Scheme(grid=uniform(4), granularity="group", group_size=8, zero_point=True)


def damped(gram: Tensor, damping: float = 0.01) -> Tensor:
    return (gram + damping * gram.diagonal().mean() * torch.eye(len(gram))).double()


def best_values(target: Tensor, kept: Tensor, hessian: Tensor) -> Tensor:
    """Every row's exact least squares on what it keeps."""
    values = torch.zeros_like(target)
    for row in range(len(target)):
        own = kept[row].nonzero()[:, 0]
        if len(own):
            values[row, own] = torch.linalg.solve(hessian[own][:, own], (hessian @ target[row])[own])
    return values


def cost(target: Tensor, values: Tensor, hessian: Tensor) -> float:
    error = target - values
    return float(torch.einsum("ri,ij,rj->", error, hessian, error))


def naive(weight: Tensor, hessian: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """SparseGPT as the paper's algorithm 1 has it, one block for all columns, by explicit inverses in float64."""
    w = weight.double().clone()
    in_features = w.shape[1]
    inverses = [torch.linalg.inv(hessian[i:, i:]) for i in range(in_features)]
    diagonal = torch.tensor([float(inverse[0, 0]) for inverse in inverses], dtype=torch.float64)
    scores = w.square() / diagonal
    kept = torch.ones_like(w, dtype=torch.bool)
    kept.view(-1)[scores.view(-1).argsort()[:count]] = False
    for i in range(in_features):
        error = torch.where(kept[:, i], 0.0, w[:, i]) / diagonal[i]
        w[:, i:] -= error[:, None] * inverses[i][0]
        w[~kept[:, i], i] = 0
    return w, kept


def test_the_sweep_is_the_papers_algorithm() -> None:
    gram, weight = correlated_gram(24), random_weight(6, 24)
    found = sparsegpt(weight, gram, HALF)
    values, kept = naive(weight, damped(gram), 72)
    assert torch.equal(found.kept, kept)
    torch.testing.assert_close(found.dequantize().double(), values, rtol=1e-3, atol=1e-4)


def test_the_score_is_what_losing_one_weight_costs_when_the_others_make_up_for_it() -> None:
    gram, weight = correlated_gram(6), random_weight(3, 6)
    scores = SparseGpt().scores(weight, {"gram": gram})
    hessian = damped(gram)
    for row, column in itertools.product(range(3), range(6)):
        kept = torch.ones(1, 6, dtype=torch.bool)
        kept[0, column] = False
        target = weight[row : row + 1].double()
        exact = cost(target, best_values(target, kept, hessian), hessian)
        assert float(scores[row, column]) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("in_features", [2, 3, 4])
def test_of_few_columns_it_is_close_to_the_best_of_all_masks(in_features: int) -> None:
    """Healed, its values are the exact optimum of its mask; over problems it costs little more than the best mask."""
    ours = best = worst = 0.0
    for seed in range(12):
        gram, weight = correlated_gram(in_features, seed), random_weight(1, in_features, seed)
        hessian, target = damped(gram), weight.double()
        scheme = MaskedScheme(pattern="row", sparsity=0.5)
        found = from_fields("sparsegpt", {"pattern": "row"}).compress(weight, {"gram": gram}, dtype="float32")
        assert isinstance(found, MaskedTensor)
        exact = best_values(target, found.kept, hessian)
        torch.testing.assert_close(found.dequantize().double(), exact, rtol=1e-3, atol=1e-4)
        costs = []
        for stays in itertools.combinations(range(in_features), scheme.kept_count((1, in_features))):
            kept = torch.zeros(1, in_features, dtype=torch.bool)
            kept[0, list(stays)] = True
            costs.append(cost(target, best_values(target, kept, hessian), hessian))
        ours += cost(target, found.dequantize().double(), hessian)
        best += min(costs)
        worst += max(costs)
    assert best * (1 - 1e-3) <= ours <= 1.5 * best
    assert ours < 0.6 * worst


def test_without_pruning_the_joint_sweep_is_gptq() -> None:
    gram, weight = correlated_gram(40), random_weight(6, 40)
    found = sparsegpt(weight, gram, MaskedScheme(pattern="layer", sparsity=0.0, values=CODES))
    alone = gptq(weight, gram, CODES, GptqOptions(activation_order=False, clip="search"))
    assert isinstance(found.values, QuantizedTensor)
    assert torch.equal(found.values.codes, alone.codes)
    assert torch.equal(found.dequantize(), alone.dequantize())


@pytest.mark.parametrize("heal", ["none", "least_squares"])
@pytest.mark.parametrize("pattern", ["layer", "2:4"])
def test_both_at_once_is_better_than_one_after_the_other(pattern: str, heal: Healing) -> None:
    joint = after = 0.0
    plain = MaskedScheme(pattern=pattern, sparsity=0.5)
    coded = MaskedScheme(pattern=pattern, sparsity=0.5, values=CODES)
    for seed in range(4):
        gram, weight = correlated_gram(64, seed), random_weight(24, 64, seed)
        joint += output_error(weight, sparsegpt(weight, gram, coded, heal=heal), gram)
        pruned = sparsegpt(weight, gram, plain, heal=heal)
        codes = round_to_nearest(pruned.dequantize(), CODES, clip="search")
        after += output_error(weight, MaskedTensor.of_codes(codes, pruned.kept, coded), gram)
    assert joint < 0.95 * after


@pytest.mark.parametrize("pattern", ["layer", "row", "2:4", "4x4"])
def test_tiles_of_rows_and_columns_prune_exactly_as_many(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "ROW_TILE", 8)
    monkeypatch.setattr(sweep, "BLOCK", 16)
    monkeypatch.setattr(room, "BLOCK", 16)
    gram, weight = correlated_gram(72), random_weight(20, 72)
    scheme = MaskedScheme(pattern=pattern, sparsity=0.5)
    found = sparsegpt(weight, gram, scheme)
    assert int(found.kept.sum()) == scheme.kept_count((20, 72))
    MaskedTensor.from_state(found.to_state(), scheme)
    torch.testing.assert_close(output_error(weight, found, gram), output_error(weight, found.dequantize(), gram))


def test_healing_is_each_rows_least_squares() -> None:
    gram, weight = correlated_gram(20), random_weight(7, 20)
    kept = torch.rand(7, 20, generator=torch.Generator().manual_seed(3)) > 0.5
    damping = 0.01 * float(gram.diagonal().mean())
    found = least_squares(weight, weight * kept, kept, gram, damping=damping, steps=60)
    exact = best_values(weight.double(), kept, damped(gram))
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)
    assert bool((found[~kept] == 0).all())


def test_every_step_of_healing_lowers_the_error() -> None:
    gram, weight = correlated_gram(40), random_weight(7, 40)
    kept = torch.rand(7, 40, generator=torch.Generator().manual_seed(3)) > 0.5
    costs = [
        cost(
            weight.double(),
            least_squares(weight, weight * kept, kept, gram, damping=1.0, steps=steps).double(),
            (gram + torch.eye(40)).double(),
        )
        for steps in (0, 1, 2, 4, 8, 16)
    ]
    assert costs == sorted(costs, reverse=True) and costs[-1] < 0.9 * costs[0]


def test_a_planted_fault_is_seen() -> None:
    """What the oracle would say of a sweep that lets nobody make up for what went."""
    gram, weight = correlated_gram(24), random_weight(6, 24)
    found = sparsegpt(weight, gram, HALF)
    lazy = MaskedTensor.of(weight, found.kept, HALF)
    assert output_error(weight, found, gram) < 0.7 * output_error(weight, lazy, gram)
    assert not torch.allclose(lazy.dequantize().double(), naive(weight, damped(gram), 72)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", ["layer", "row", "1x4"])
def test_rounds_choose_a_better_mask_than_the_sweep(pattern: str) -> None:
    errors = {}
    for rounds in (1, 4):
        method = from_fields("sparsegpt", {"pattern": pattern, "rounds": rounds})
        errors[rounds] = 0.0
        for seed in range(4):
            gram, weight = correlated_gram(64, seed), random_weight(24, 64, seed)
            errors[rounds] += output_error(weight, method.compress(weight, {"gram": gram}, dtype="float32"), gram)
    assert errors[4] < 0.9 * errors[1]


def test_drift_moves_the_target() -> None:
    gram, weight = correlated_gram(24), random_weight(6, 24)
    drift = 0.1 * gram.roll(1, 0)
    method = from_fields("sparsegpt", {})
    assert isinstance(method, SparseGpt)
    moved = method.compress(weight, {"gram": gram, "drift": drift}, dtype="float32").dequantize()
    still = method.compress(weight, {"gram": gram, "drift": torch.zeros_like(drift)}, dtype="float32").dequantize()
    assert not torch.equal(moved, still)
    assert torch.equal(still, method.compress(weight, {"gram": gram}, dtype="float32").dequantize())


def test_blocks_that_no_tile_holds_whole_are_refused() -> None:
    with pytest.raises(RecipeError, match="whose rows divide that"):
        from_fields("sparsegpt", {"pattern": "3x4"})
