"""GPTQ against the naive update with an explicit inverse, and what every option promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.quantize.problems import correlated_gram, random_weight
from torch import Tensor

from fettle.errors import NonFiniteError
from fettle.methods.quantize import sweep as module
from fettle.methods.quantize.errors import output_error
from fettle.methods.quantize.gptq import Gptq, GptqOptions, gptq
from fettle.methods.quantize.round_to_nearest import round_to_nearest
from fettle.methods.quantize.sharing import choose_shared
from fettle.tensors import Scheme, quantize, uniform
from fettle.tensors.grid import from_levels

INT4 = Scheme(grid=uniform(4), granularity="group", group_size=16, zero_point=True, scale_dtype="float32")
SYMMETRIC3 = replace(INT4, grid=uniform(3), zero_point=False, scale_dtype="bfloat16")
BENT = Scheme(
    grid=from_levels("bent", [-1.0, -0.55, -0.3, -0.1, 0.0, 0.2, 0.5, 1.0]), granularity="group", group_size=16
)
ROW = replace(INT4, granularity="channel", group_size=None)
WHOLE = replace(INT4, granularity="tensor", group_size=None)


def naive(weight: Tensor, gram: Tensor, scheme: Scheme, *, activation_order: bool, damping: float = 0.01) -> Tensor:
    """Optimal Brain Quantization in the given order, as its authors write it: an explicit float64 inverse, one column
    rounded, the update of all that remain, one column and row removed from the inverse. Returns codes.
    """
    columns = weight.shape[1]
    exact = gram.double().clone()
    exact.diagonal().add_(damping * gram.diagonal().double().mean())
    inverse = torch.linalg.inv(exact)
    current = weight.double().clone()
    shared = choose_shared(weight, scheme, clip="none")
    scale, zero_point = shared.scale, shared.zero_point
    width = scheme.group_width(columns)
    renewed = not activation_order and scheme.granularity != "tensor"
    order = range(columns)
    if activation_order:
        order = sorted(range(columns), key=lambda c: -float(gram[c, c]))  # type: ignore[assignment]
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    for column in order:
        group = column // width
        if renewed and column % width == 0:
            part = replace(scheme, granularity="channel", group_size=None)
            renewed_group = choose_shared(current[:, column : column + width].float(), part, clip="none")
            scale[:, group] = renewed_group.scale[:, 0]
            if zero_point is not None and renewed_group.zero_point is not None:
                zero_point[:, group] = renewed_group.zero_point[:, 0]
        alone = replace(scheme, granularity="channel", group_size=None)
        of_group = scale[:, group : group + 1].expand(len(weight), 1)
        zero_of_group = None if zero_point is None else zero_point[:, group : group + 1].expand(len(weight), 1)
        rounded = quantize(current[:, column : column + 1].float(), of_group, zero_of_group, alone)
        codes[:, column] = rounded.codes[:, 0]
        error = (current[:, column] - rounded.dequantize()[:, 0].double()) / inverse[column, column]
        current -= torch.outer(error, inverse[column])
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0  # out of the game: only its own, already rounded, column is touched
    return codes


@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize("scheme", [INT4, SYMMETRIC3, BENT, ROW, WHOLE], ids=lambda s: s.describe())
@pytest.mark.parametrize("block", [128, 8, 5])
def test_codes_are_those_of_the_naive_update(
    activation_order: bool, scheme: Scheme, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    weight, gram = random_weight(6, 44), correlated_gram(44)
    found = gptq(weight, gram, scheme, GptqOptions(activation_order=activation_order))
    assert torch.equal(found.codes, naive(weight, gram, scheme, activation_order=activation_order))


def test_tiles_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = random_weight(11, 44), correlated_gram(44)
    for activation_order in (True, False):
        options = GptqOptions(activation_order=activation_order)
        monkeypatch.undo()
        whole = gptq(weight, gram, INT4, options)
        monkeypatch.setattr(module, "ROW_TILE", 4)
        monkeypatch.setattr(module, "TILE_WEIGHTS", 0)
        tiled = gptq(weight, gram, INT4, options)
        assert torch.equal(whole.codes, tiled.codes)
        torch.testing.assert_close(whole.scale, tiled.scale)  # sums of another length may round differently


def test_the_sweep_knows_its_own_error() -> None:
    weight, gram = random_weight(9, 44), correlated_gram(44)
    factor = module.factorize(gram, damping=0.01, activation_order=True)
    solution = module.solve(weight, factor, INT4, clip="none", activation_order=True)
    difference = weight - solution.quantized.dequantize()
    damped = gram + factor.damping * torch.eye(44)
    torch.testing.assert_close(solution.errors, ((difference @ damped) * difference).sum(1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheme", [INT4, ROW, WHOLE], ids=lambda s: s.describe())
def test_the_better_of_two_is_no_worse_than_either(scheme: Scheme) -> None:
    weight, gram = random_weight(20, 44), correlated_gram(44)
    error = {
        clip: output_error(weight, gptq(weight, gram, scheme, GptqOptions(clip=clip, damping=1e-6)), gram)
        for clip in ("none", "search", "best")
    }
    assert error["best"] <= min(error["none"], error["search"]) * (1 + 1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_every_option_lowers_the_error_of_the_outputs(bits: int, asymmetric: bool) -> None:
    scheme = Scheme(
        grid=uniform(bits), granularity="group", group_size=32, zero_point=asymmetric, scale_dtype="bfloat16"
    )
    totals = dict.fromkeys(("nearest", "in order", "plain", "best", "refined"), 0.0)
    for seed in range(4):
        weight, gram = random_weight(32, 100, seed), correlated_gram(100, seed)
        tried = {
            "nearest": round_to_nearest(weight, scheme),
            "in order": gptq(weight, gram, scheme, GptqOptions(activation_order=False)),
            "plain": gptq(weight, gram, scheme),
            "best": gptq(weight, gram, scheme, GptqOptions(clip="best")),
            "refined": gptq(weight, gram, scheme, GptqOptions(clip="best", refine_passes=2)),
        }
        for name, compressed in tried.items():
            totals[name] += output_error(weight, compressed, gram)
    assert totals["in order"] < 0.5 * totals["nearest"]
    assert totals["plain"] < 0.5 * totals["nearest"]
    assert totals["best"] < 0.97 * totals["plain"]
    assert totals["refined"] < 0.97 * totals["best"]


def test_defaults_are_the_best_that_was_measured() -> None:
    method = Gptq()
    assert (method.activation_order, method.clip, method.refine_passes) == (True, "best", 2)
    weight, gram = random_weight(8, 40), correlated_gram(40)
    expected = gptq(weight, gram, method.scheme("float32"), GptqOptions(clip="best", refine_passes=2, correction=0.5))
    assert torch.equal(method.compress(weight, {"gram": gram}, dtype="float32").codes, expected.codes)


def test_an_identity_gram_leaves_round_to_nearest() -> None:
    weight = random_weight(5, 70)
    assert torch.equal(gptq(weight, torch.eye(70), INT4).codes, round_to_nearest(weight, INT4).codes)


def test_dead_columns_are_rounded_and_disturb_nobody() -> None:
    weight, gram = random_weight(5, 40), correlated_gram(40)
    dead = [3, 17, 39]
    gram[dead], gram[:, dead] = 0, 0
    found = gptq(weight, gram, INT4)
    nearest = quantize(weight, found.scale, found.zero_point, INT4)
    assert torch.equal(found.codes[:, dead], nearest.codes[:, dead])
    changed = weight.clone()
    changed[:, dead] *= 0.5
    alive = [column for column in range(40) if column not in dead]
    shared = choose_shared(weight, INT4, clip="none")
    again = choose_shared(changed, INT4, clip="none")
    if torch.equal(shared.scale, again.scale):
        assert torch.equal(gptq(changed, gram, INT4).codes[:, alive], found.codes[:, alive])


def test_a_zero_gram_is_round_to_nearest() -> None:
    weight = random_weight(5, 40)
    assert torch.equal(gptq(weight, torch.zeros(40, 40), INT4).codes, round_to_nearest(weight, INT4).codes)


def test_damping_grows_until_the_factor_exists_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    strong = torch.randn(2, 30, generator=torch.Generator().manual_seed(0)) * 100
    gram = strong.T @ strong  # rank 2: without damping float32 finds a negative pivot
    assert module.factorize(gram, damping=0.0, activation_order=True).damping > 0
    assert "not positive definite" in caplog.text
    found = gptq(random_weight(4, 30), gram, INT4, GptqOptions(damping=0.0))
    assert bool(torch.isfinite(found.dequantize()).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gram_that_is_no_number_is_refused(bad: float) -> None:
    gram = correlated_gram(40)
    gram[5, :] = bad
    gram[:, 5] = bad
    with pytest.raises(NonFiniteError, match="gram"):
        gptq(random_weight(4, 40), gram, INT4)


def test_a_matrix_that_is_no_gram_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="not positive definite"):
        gptq(random_weight(4, 8), torch.eye(8) - 2 * torch.ones(8, 8) * (1 - torch.eye(8)), INT4)


def test_the_correction_gives_the_original_outputs_back() -> None:
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(300, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    drifted = original * 0.9 + 0.3 * original.roll(1, dims=1)  # a linear move: it can be made up for
    weight, gram = random_weight(12, 40), drifted.T @ drifted
    drift = (original - drifted).T @ drifted
    scheme = replace(INT4, grid=uniform(8))
    wanted = original @ weight.T

    def loss(correction: float) -> float:
        found = gptq(weight, gram, scheme, GptqOptions(correction=correction, damping=1e-4), drift)
        return float((drifted @ found.dequantize().T - wanted).square().mean() / wanted.square().mean())

    assert loss(1.0) < 0.01 * loss(0.0)
    assert loss(1.0) < loss(0.5) < loss(0.0)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_one_scale_for_a_row_or_all(granularity: Any) -> None:
    scheme = Scheme(grid=uniform(4), granularity=granularity, zero_point=True, scale_dtype="float16")
    weight, gram = random_weight(9, 150), correlated_gram(150)
    found = gptq(weight, gram, scheme, GptqOptions(clip="search", refine_passes=2))
    assert tuple(found.scale.shape) == scheme.scale_shape((9, 150))
    assert output_error(weight, found, gram) < 0.6 * output_error(weight, round_to_nearest(weight, scheme), gram)
