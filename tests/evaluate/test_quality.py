"""The measures against sums by hand in float64."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from fettle.evaluate import quality
from fettle.evaluate.quality import measure_tokens


def test_two_predictions_by_hand():
    reference = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    logits = torch.log(torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]))
    found = measure_tokens(logits, torch.tensor([0, 2]), reference)
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert torch.allclose(found.kl, torch.tensor([expected, 0.0], dtype=torch.float64), atol=1e-7)
    assert found.kl[1] == 0
    assert torch.allclose(found.loss, torch.tensor([math.log(4), -math.log(0.8)], dtype=torch.float64), atol=1e-7)
    assert found.agreement.tolist() == [False, True]
    assert torch.allclose(found.probability_change, torch.tensor([-0.25, 0.0], dtype=torch.float64), atol=1e-7)


@given(st.integers(0, 10_000), st.integers(2, 300), st.integers(1, 9))
def test_kl_and_loss_against_float64(seed, vocabulary, tokens):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, vocabulary, generator=generator) * 4
    reference = logits + torch.randn(tokens, vocabulary, generator=generator)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    found = measure_tokens(logits, targets, reference)
    p, q = reference.double().softmax(-1), logits.double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    assert torch.allclose(found.kl, kl, rtol=1e-4, atol=1e-6)
    assert (found.kl >= 0).all()
    assert torch.allclose(found.loss, -q.gather(1, targets[:, None])[:, 0].log(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.predicted, logits.argmax(-1))


def test_a_model_against_itself_lost_nothing():
    logits = torch.randn(50, 1000) * 10
    found = measure_tokens(logits, torch.randint(0, 1000, (50,)), logits.clone())
    assert (found.kl == 0).all()
    assert (found.probability_change == 0).all()
    assert found.agreement.all()


def test_tiles_change_nothing(monkeypatch):
    logits, reference = torch.randn(2, 33, 70).unbind()
    targets = torch.randint(0, 70, (33,))
    whole = measure_tokens(logits, targets, reference)
    monkeypatch.setattr(quality, "TILE_LOGITS", 150)
    tiled = measure_tokens(logits, targets, reference)
    assert torch.equal(whole.kl, tiled.kl)
    assert torch.equal(whole.loss, tiled.loss)


def test_without_a_reference_there_is_no_kl():
    found = measure_tokens(torch.randn(4, 9), torch.zeros(4, dtype=torch.int64))
    assert found.kl is None
    assert len(found.loss) == 4
