"""Statistics: exact against a float64 product, the same bits however they are batched or threaded."""

from __future__ import annotations

import pytest
import torch

from fettle.methods import statistics
from fettle.methods.statistics import AbsoluteMaximum, AbsoluteMean, Drift, Gram
from fettle.workers import Workers


def windows(count: int = 5, in_features: int = 172, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(40 + i, in_features, generator=generator) for i in range(count)]


def gram_of(inputs: list[torch.Tensor], threads: int, batch: int) -> torch.Tensor:
    kind = Gram()
    state = kind.start(inputs[0].shape[1])
    with Workers(threads) as workers:
        for first in range(0, len(inputs), batch):
            kind.add_(state, inputs[first : first + batch], workers)
    assert state.tokens == sum(len(window) for window in inputs)
    return kind.finish(state)


@pytest.mark.parametrize("tile", [512, 50])
def test_a_gram_is_the_product_and_symmetric(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "TILE", tile)
    inputs = windows()
    gram = gram_of(inputs, 1, 5)
    exact = torch.cat(inputs).double()
    torch.testing.assert_close(gram.double(), exact.T @ exact, rtol=1e-4, atol=1e-3)
    assert torch.equal(gram, gram.T)


def test_threads_and_batches_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "TILE", 64)
    inputs = windows(in_features=200)
    first = gram_of(inputs, 1, 5)
    for threads, batch in ((2, 5), (2, 1), (1, 2)):
        assert torch.equal(gram_of(inputs, threads, batch), first)


def test_narrow_inputs_are_summed_wide_and_left_alone() -> None:
    inputs = [window.bfloat16() for window in windows(2)]
    copies = [window.clone() for window in inputs]
    gram = gram_of(inputs, 1, 2)
    assert gram.dtype == torch.float32
    assert torch.equal(gram, gram_of([window.float() for window in inputs], 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_empty_windows_add_nothing() -> None:
    inputs = windows(2)
    assert torch.equal(gram_of([inputs[0], inputs[0][:0], inputs[1]], 1, 3), gram_of(inputs, 1, 2))


def test_drift_is_the_product_of_the_move_and_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "TILE", 50)
    pairs = [torch.stack([a, b]) for a, b in zip(windows(), windows(seed=1), strict=True)]
    found = []
    for threads in (1, 2):
        state = Drift().start(172)
        with Workers(threads) as workers:
            Drift().add_(state, pairs, workers)
        found.append(Drift().finish(state))
    expected = sum(
        ((pair[0] - pair[1]).T.double() @ pair[1].double() for pair in pairs), torch.zeros(172, 172).double()
    )
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("kind", [AbsoluteMean(), AbsoluteMaximum()])
def test_channel_figures_are_exact_however_they_are_batched(kind: AbsoluteMean) -> None:
    inputs = [window.bfloat16() for window in windows()]
    everything = torch.cat(inputs).double().abs()
    expected = everything.amax(0) if isinstance(kind, AbsoluteMaximum) else everything.mean(0)
    found = []
    for batch in (1, 2, 5):
        state = kind.start(172)
        with Workers(2) as workers:
            for first in range(0, len(inputs), batch):
                kind.add_(state, [*inputs[first : first + batch], inputs[0][:0]], workers)
        assert state.tokens == len(everything)
        found.append(kind.finish(state))
        assert found[-1].dtype == torch.float32
    torch.testing.assert_close(found[0], expected.float(), rtol=1e-6, atol=0)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(kind.neutral(3), torch.ones(3))


@pytest.mark.parametrize("kind", [Gram(), Drift()])
def test_memory_is_what_the_state_holds(kind: Gram | Drift) -> None:
    assert kind.start(33).total.nbytes == kind.memory_bytes(33) == kind.neutral(33).nbytes
