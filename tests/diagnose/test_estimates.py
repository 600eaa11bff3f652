"""The estimates against formulas by hand and against what the model does."""

from __future__ import annotations

import math

import pytest
import torch

from fettle.diagnose.channels import OUTLIER_RATIO, activation_facts, channel_facts, weight_saliency
from fettle.diagnose.estimates import Activations, second_order, signal_to_noise_db, spearman


def test_signal_to_noise_by_hand() -> None:
    signal, error = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.3, 0.4]])
    assert signal_to_noise_db(signal, error) == pytest.approx(20.0)  # a tenth of the amplitude
    assert signal_to_noise_db(signal, torch.zeros(1, 2)) == math.inf
    assert signal_to_noise_db(torch.zeros(1, 2), error) == -math.inf


def test_second_order_is_the_sum_over_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, gradients = torch.randn(5, 3, generator=generator), torch.randn(2, 5, 4, generator=generator)
    difference = torch.randn(4, 3, generator=generator)
    kl, gram = second_order(difference, Activations(inputs=inputs, gradients=gradients, tokens=10))
    by_hand = sum(
        0.5 * float(gradients[d, t] @ difference @ inputs[t]) ** 2 / 2 / 10 for d in range(2) for t in range(5)
    )
    assert kl == pytest.approx(by_hand, rel=1e-5)
    assert gram == pytest.approx(float(torch.trace(difference @ (inputs.T @ inputs) @ difference.T)) / 10, rel=1e-5)


def test_second_order_is_the_kl_of_a_single_layer() -> None:
    """Where the linear's outputs are the logits, many draws of labels give the KL of a small change."""
    generator = torch.Generator().manual_seed(1)
    inputs, weight = torch.randn(40, 6, generator=generator), torch.randn(9, 6, generator=generator)
    difference = 1e-2 * torch.randn(9, 6, generator=generator)
    log_p = torch.log_softmax(inputs @ weight.T, dim=-1)
    labels = torch.stack([torch.multinomial(log_p.exp(), 1, generator=generator)[:, 0] for _ in range(4000)])
    gradients = log_p.exp() - torch.nn.functional.one_hot(labels, 9).float()  # [draws, tokens, out]
    kl, _ = second_order(difference, Activations(inputs=inputs, gradients=gradients, tokens=40))
    log_q = torch.log_softmax(inputs @ (weight + difference).T, dim=-1)
    exact = float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())
    assert kl == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize(
    ("first", "second", "rank"),
    [
        ([1, 2, 3], [10, 20, 90], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 2, 3], [1, 2, 3, 4], 0.9486832980505138),
        ([1, 1, 1], [1, 2, 3], None),
        ([1, 2], [1, 2], None),
    ],
)
def test_spearman(first: list[float], second: list[float], rank: float | None) -> None:
    found = spearman(first, second)
    assert found is None if rank is None else found == pytest.approx(rank)


def test_an_outlier_channel_is_named() -> None:
    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    inputs[7, 5] = 100.0
    found = activation_facts(inputs)
    assert found["outlier_channels"] == 1
    assert found["activations"][0]["channel"] == 5
    assert found["activations"][0]["ratio"] > OUTLIER_RATIO


def test_saliency_is_the_estimate_of_losing_one_weight() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(4, 3, generator=generator)
    seen = Activations(
        inputs=torch.randn(8, 3, generator=generator), gradients=torch.randn(1, 8, 4, generator=generator), tokens=8
    )
    lost = torch.zeros(4, 3)
    lost[2, 1] = -weight[2, 1]
    assert float(weight_saliency(weight, seen)[2, 1]) == pytest.approx(second_order(lost, seen)[0], rel=1e-5)
    facts = channel_facts(weight, seen)
    assert 0 < facts["top_weights_share"] <= 1
    scores = [channel["score"] for channel in facts["input_channels"]]
    assert scores == sorted(scores, reverse=True)
