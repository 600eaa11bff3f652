"""Histograms that grow, and observers against their formulas on all inputs at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fettle.methods.quantize.histogram import SIDE, Histogram
from fettle.methods.quantize.observers import OBSERVERS, entropy, minmax, moving_average, mse, observe, percentile
from fettle.methods.statistics import STATISTICS
from fettle.tensors import Activations
from fettle.tensors.activations import InputQuantizer, InputScale
from fettle.workers import Workers

SYMMETRIC = Activations(dynamic=False, granularity="tensor")
ASYMMETRIC = Activations(dynamic=False, granularity="tensor", zero_point=True)
BOTH = pytest.mark.parametrize("activations", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])


def windows(seed: int = 0) -> list[Tensor]:
    """Six windows, each larger than the one before, the fourth with an outlier."""
    generator = torch.Generator().manual_seed(seed)
    found = [(torch.randn(50, 40, generator=generator) + 0.5) * 1.7**number for number in range(6)]
    found[3][7, 7] = 300.0
    return found


def seen(inputs: list[Tensor]) -> Histogram:
    histogram = Histogram()
    for window in inputs:
        histogram.add_(window)
    return histogram


def test_counts_are_those_of_a_histogram_that_knew_its_reach() -> None:
    inputs = [torch.zeros(3, 40), torch.full((2, 2), 1e-20), *windows()]
    histogram = seen(inputs)
    everything = torch.cat([window.flatten() for window in inputs])
    assert histogram.reach == 512
    bins = (everything.double() * SIDE / 512).floor().long() + SIDE
    expected = torch.bincount(bins, minlength=2 * SIDE)
    expected_low, expected_high = (float(end) for end in everything.aminmax())
    assert (histogram.low, histogram.high) == (expected_low, expected_high)
    near = histogram.centres.abs() < 512 / SIDE  # what was zero before there was a reach stays beside zero
    assert torch.equal(histogram.counts[~near], expected[~near])
    assert int(histogram.counts.sum()) == len(everything)


def test_the_order_and_the_batches_change_only_the_averages() -> None:
    one, other = seen(windows()), seen(windows()[::-1])
    assert torch.equal(one.counts, other.counts)
    assert one.average_high != other.average_high
    kind = STATISTICS["input_range"]
    with Workers(2) as workers:
        states = [kind.start(40), kind.start(40)]
        kind.add_(states[0], windows(), workers)
        for window in windows():
            kind.add_(states[1], [window], workers)
    assert torch.equal(kind.finish(states[0]), kind.finish(states[1]))
    assert kind.memory_bytes(40) < 2**20
    assert kind.finish(kind.start(40)).shape == kind.neutral(40).shape


def test_a_packed_histogram_comes_back() -> None:
    one = seen(windows())
    other = Histogram.from_tensor(one.to_tensor())
    assert torch.equal(one.counts, other.counts)
    assert torch.equal(one.to_tensor(), other.to_tensor())


def test_what_is_no_number_leaves_its_mark() -> None:
    histogram = seen([*windows()[:2], torch.tensor([[1.0, float("inf")]]), *windows()[2:]])
    assert not bool(torch.isfinite(histogram.to_tensor()).all())


def test_minmax_and_moving_average_are_their_formulas() -> None:
    inputs = windows()
    assert minmax(seen(inputs), SYMMETRIC) == (min(float(w.min()) for w in inputs), 300.0)
    low, high = float(inputs[0].min()), float(inputs[0].max())
    for window in inputs[1:]:
        low += 0.01 * (float(window.min()) - low)
        high += 0.01 * (float(window.max()) - high)
    assert moving_average(seen(inputs), SYMMETRIC) == pytest.approx((low, high))


def test_percentile_is_the_quantile_of_all_inputs() -> None:
    inputs = torch.randn(100, 1000, generator=torch.Generator().manual_seed(3)) + 0.2
    inputs[0, 0] = 50.0
    low, high = percentile(seen([inputs]), ASYMMETRIC)
    bin_width = 64 / SIDE
    assert int((inputs < low).sum()) <= 5 <= int((inputs < low + bin_width).sum())  # of 100,000, on either side
    assert int((inputs > high).sum()) <= 5 <= int((inputs > high - bin_width).sum())
    positive = percentile(seen([inputs.abs()]), ASYMMETRIC)
    assert positive[0] == 0.0


@BOTH
def test_mse_is_the_best_part_by_brute_force(activations: Activations) -> None:
    inputs = torch.cat([window.flatten() for window in windows()])
    low, high = float(inputs.min()), float(inputs.max())

    def error(part: float) -> float:
        fixed = InputScale.spanning(part * low, part * high, activations, torch.float32)
        return float((InputQuantizer(activations=activations, fixed=fixed)(inputs) - inputs).square().sum())

    found = mse(seen(windows()), activations)
    best = min(error(part / 100) for part in range(1, 101))
    assert error(found[1] / high) <= best * 1.01


@BOTH
def test_entropy_cuts_a_lonely_outlier_off_and_keeps_what_is_even(activations: Activations) -> None:
    bulk = torch.randn(200, 500, generator=torch.Generator().manual_seed(4))
    lonely = bulk.clone()
    lonely[0, 0] = 400.0
    high = entropy(seen([lonely]), activations)[1]
    assert high < 200
    even = torch.linspace(-1, 1, 100_001).reshape(1, -1)
    assert entropy(seen([even]), activations)[1] > 0.9


@BOTH
@pytest.mark.parametrize("name", OBSERVERS)
def test_every_observer_gives_a_scale_for_every_histogram(name: str, activations: Activations) -> None:
    for inputs in ([], [torch.zeros(4, 4)], [torch.full((4, 4), -2.0)], windows(), [torch.full((1, 1), 1e-30)]):
        fixed = observe(seen(inputs).to_tensor(), name, activations, torch.bfloat16)
        assert float(fixed.scale) > 0
        assert fixed.scale.dtype == torch.bfloat16
        assert (fixed.zero_point is not None) == activations.zero_point


@pytest.mark.parametrize("share", [0.01, 0.04])
def test_the_share_that_is_kept_apart_lies_outside_the_range(share: float) -> None:
    everything = torch.cat([window.flatten() for window in windows()])
    histogram = seen(windows())
    activations = Activations(dynamic=False, granularity="tensor", zero_point=True, outliers=share)
    fixed = observe(histogram.to_tensor(), "mse", activations, torch.float32)
    apart = InputQuantizer(activations=activations, fixed=fixed).beyond(everything)
    assert apart is not None
    assert float((apart != 0).float().mean()) == pytest.approx(share, rel=0.2)
