"""The search against a look at every entry, and the sweep against minimization by brute force."""

from __future__ import annotations

import pytest
import torch
from tests.methods.quantize.problems import correlated_gram, random_weight
from torch import Tensor

from fettle.methods.quantize.errors import quadratic_form
from fettle.methods.quantize.vector_search import EntrySearch
from fettle.methods.quantize.vector_sweep import (
    Refinement,
    StoredScales,
    factorize_eights,
    filled_up,
    sweep,
)
from fettle.tensors.vectors import VectorScheme, scaled, units_of


def metric(seed: int = 0) -> Tensor:
    return torch.linalg.cholesky(correlated_gram(8, seed) / 400)


@pytest.mark.parametrize("bits", [1, 2])
def test_the_nearest_of_all_entries_in_the_metric(bits: int) -> None:
    scheme = VectorScheme(bits=bits)
    targets = torch.randn(40, 8, generator=torch.Generator().manual_seed(2))
    codes, units = EntrySearch(metric(), scheme).nearest(targets)
    everything = scheme.stages[0].entries(torch.arange(2 ** scheme.stages[0].code_bits))
    for target, code, unit in zip(targets, codes, units, strict=True):
        costs = ((target - everything).double() @ metric().double()).square().sum(1)
        assert torch.equal(scheme.stages[0].entries(code[0]), unit)
        assert float(costs[int(code[0])]) <= float(costs.min()) * (1 + 1e-4)


def test_two_stages_leave_less_than_one_after_the_other() -> None:
    targets = torch.randn(200, 8, generator=torch.Generator().manual_seed(3))
    search = EntrySearch(metric(), VectorScheme(bits=3))
    codes, units = search.nearest(targets)
    first_codes, first = EntrySearch(metric(), VectorScheme(bits=2)).nearest(targets)
    _, rest = EntrySearch(metric() / 2.04, VectorScheme(bits=1)).nearest((targets - first) * 2.04)
    greedy = search.cost(targets - first - rest / 2.04)
    found = search.cost(targets - units)
    assert bool((found <= greedy * (1 + 1e-4) + 1e-6).all())
    assert float(found.sum()) < 0.99 * float(greedy.sum())
    assert not torch.equal(codes[:, 0], first_codes[:, 0])


def test_each_code_of_the_sweep_is_best_while_later_columns_make_up_for_it() -> None:
    """At every eight: the least error over all entries and all values of the columns still to come."""
    scheme = VectorScheme(bits=1)
    gram = correlated_gram(24, 4)
    weight = random_weight(3, 24)
    factor = factorize_eights(gram, 0.01 * float(gram.diagonal().mean()))
    scale = torch.full((3, 1), 0.1)
    codes = sweep(weight, scale, factor, scheme)
    entries = 0.1 * scheme.stages[0].entries(torch.arange(256))
    damped = factor.gram.double()
    for row in range(3):
        errors = torch.zeros(24, dtype=torch.float64)
        free = torch.ones(24, dtype=torch.bool)
        for eight in reversed(factor.order):
            span = torch.arange(8 * eight, 8 * eight + 8)
            free[span] = False
            costs = []
            for entry in entries:
                trial = errors.clone()
                trial[span] = (weight[row, span] - entry).double()
                if bool(free.any()):
                    pulled = damped[free][:, ~free] @ trial[~free]
                    trial[free] = -torch.linalg.solve(damped[free][:, free], pulled)
                costs.append(float(trial @ damped @ trial))
            chosen = int(codes[row, eight, 0])
            assert costs[chosen] <= min(costs) * (1 + 1e-4)
            errors[span] = (weight[row, span] - entries[chosen]).double()


@pytest.mark.parametrize("fields", [{"bits": 2}, {"bits": 3, "group_size": 16}, {"bits": 1, "scale_dtype": "float16"}])
def test_no_step_of_the_refinement_raises_the_error(fields: dict[str, int]) -> None:
    scheme = VectorScheme(**fields)  # type: ignore[arg-type]
    gram = correlated_gram(44, 5)
    weight = filled_up(random_weight(6, 44))
    factor = factorize_eights(gram, 0.01 * float(gram.diagonal().mean()))
    scales = StoredScales.up_to(torch.tensor(1.0), scheme)
    scale = scales.rounded(torch.full(scheme.scale_shape((6, 44)), 0.05))
    tile = Refinement(weight, sweep(weight, scale, factor, scheme), scale, factor, scheme, scales)
    before = quadratic_form(tile.errors(), factor.gram)
    for _ in range(3):
        for step in (tile.refit_scales_, tile.move_codes_):
            step()
            after = quadratic_form(tile.errors(), factor.gram)
            assert after <= before * (1 + 1e-5)
            before = after
    torch.testing.assert_close(tile.units, units_of(tile.codes, scheme))
    assert torch.equal(scales.rounded(tile.scale), tile.scale)


def test_a_refitted_scale_is_the_best_of_many() -> None:
    scheme = VectorScheme(bits=2)
    gram = correlated_gram(16, 6)
    weight = random_weight(1, 16)
    factor = factorize_eights(gram, 1.0)
    scale = torch.full((1, 1), 0.03)
    tile = Refinement(weight, sweep(weight, scale, factor, scheme), scale, factor, scheme, StoredScales(scheme, None))
    tile.refit_scales_()
    errors = [
        quadratic_form(weight - scaled(tile.units, torch.full((1, 1), float(s)), scheme), factor.gram)
        for s in torch.linspace(0.5, 1.5, 101) * float(tile.scale)
    ]
    assert min(range(101), key=errors.__getitem__) == 50
