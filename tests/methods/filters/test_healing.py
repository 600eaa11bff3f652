"""Batch norms measured again, and training that learns from labels, from the original, or from both."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.vision.networks import images, network
from torch import nn

from fettle.errors import NonFiniteError, RecipeError
from fettle.methods.filters.healing import FineTuning, fine_tune_, logits_for, recalibrate_
from fettle.methods.filters.prune_filters import PruneFilters
from fettle.methods.filters.scores import ImageBatch

DATA = images(40)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(392, 10),
    )  # fmt: skip


def test_a_recalibrated_norm_has_the_mean_and_variance_of_its_inputs() -> None:
    made = small()
    assert recalibrate_(made, DATA) == 1
    seen = made[0](DATA.images)  # [40, 8, 15, 15]: one batch
    torch.testing.assert_close(made[1].running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made[1].running_var, seen.transpose(0, 1).flatten(1).var(1), rtol=1e-4, atol=1e-5)
    assert made[1].momentum == 0.1 and not made.training


def test_one_image_leaves_the_norms_as_they_were() -> None:
    made = small()
    recalibrate_(made, DATA)
    before = copy.deepcopy(made.state_dict())
    assert recalibrate_(made, ImageBatch(DATA.images[:1])) == 0 and not made.training
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())


def test_training_lowers_the_loss_and_repeats_bit_for_bit() -> None:
    first, second = small(), small()
    losses = [fine_tune_(made, DATA, FineTuning(steps=30, rate=5e-3)) for made in (first, second)]
    assert losses[0] == losses[1] < 0.5 * 2.3
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_without_labels_it_learns_from_the_original() -> None:
    made = small()
    recalibrate_(made, DATA)
    teacher = logits_for(made, DATA)
    other = copy.deepcopy(made)
    with torch.no_grad():
        other[6].weight.mul_(0.5)
    before = (logits_for(other, DATA) - teacher).square().mean()
    fine_tune_(other, ImageBatch(DATA.images), FineTuning(steps=60, rate=3e-3), teacher)
    assert (logits_for(other, DATA) - teacher).square().mean() < 0.5 * before
    with pytest.raises(RecipeError, match="labels or an original"):
        fine_tune_(other, ImageBatch(DATA.images), FineTuning(steps=1))


def test_a_step_that_is_too_large_is_named() -> None:
    with pytest.raises(NonFiniteError, match="smaller heal_rate"):
        fine_tune_(small(), DATA, FineTuning(steps=20, rate=1e30))


def test_rounds_call_any_healer_and_reach_the_same_widths_as_one() -> None:
    called: list[int] = []
    made, once = network("vgg16_bn"), network("vgg16_bn")
    example = DATA.images[:1]
    rounds = PruneFilters(sparsity=0.5, rounds=3).prune_network(
        made, example, heal=lambda _, number: called.append(number)
    )
    PruneFilters(sparsity=0.5).prune_network(once, example)
    assert called == [0, 1, 2] and len(rounds) == 3
    assert [p.shape for p in made.parameters()] == [p.shape for p in once.parameters()]
    assert rounds[0].sparsity < rounds[1].sparsity < rounds[2].sparsity == 0.5


def test_healing_without_images_is_refused() -> None:
    with pytest.raises(RecipeError, match="give --images"):
        PruneFilters(heal_steps=5).prune_network(network("vgg16"), DATA.images[:1])
