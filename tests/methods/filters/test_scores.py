"""Scores against Torch-Pruning's own, and against what the loss really does."""

from __future__ import annotations

import pytest
import torch
import torch_pruning
from tests.vision.networks import images, network
from torch import nn
from torch.nn import functional

from fettle.errors import RecipeError
from fettle.methods.filters.dependencies import channel_groups
from fettle.methods.filters.scores import ImageBatch, ScoreName, comparable, group_scores

EXAMPLE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
DATA = images(40)


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "regnet"])
@pytest.mark.parametrize(("score", "power"), [("l1", 1), ("l2", 2)])
def test_magnitudes_are_those_of_torch_pruning(name: str, score: ScoreName, power: int) -> None:
    made = network(name)
    groups = channel_groups(made, EXAMPLE)
    theirs = torch_pruning.importance.GroupMagnitudeImportance(p=power, group_reduction="sum", normalizer=None)
    found = group_scores(made, groups, score, None)
    for group in groups:
        if group.repeats > 1 or any(member.side == "depthwise" for member in group.members):
            continue  # theirs leaves depthwise filters out, and gives every group of a convolution the sum over all
        expected = theirs(group.handle).double()
        torch.testing.assert_close(found[group.name] ** (2 if score == "l2" else 1), expected, rtol=1e-5, atol=1e-6)


def test_batch_norm_scale_is_that_of_torch_pruning() -> None:
    made = network("vgg16_bn")
    groups = [g for g in channel_groups(made, EXAMPLE) if any(m.side == "norm" for m in g.members)]
    theirs = torch_pruning.importance.BNScaleImportance(group_reduction="sum", normalizer=None)
    found = group_scores(made, groups, "batch_norm", None)
    for group in groups:
        torch.testing.assert_close(found[group.name], theirs(group.handle).double(), rtol=1e-6, atol=1e-7)


def test_activation_is_the_mean_of_what_is_read() -> None:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3920, 2))
    first, second = sorted(channel_groups(made, EXAMPLE), key=lambda group: group.name)
    found = group_scores(made, [first, second], "activation", DATA)
    read = functional.relu(made[0](DATA.images)).double()
    torch.testing.assert_close(found["0"], read.mean((0, 2, 3)).detach())
    flat = functional.relu(made[2](functional.relu(made[0](DATA.images)))).double()
    torch.testing.assert_close(found["2"], flat.mean(0).flatten(1).sum(1).detach())  # a position each


def test_taylor_and_hessian_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    (group,) = channel_groups(made, EXAMPLE)
    few = ImageBatch(DATA.images[:6], DATA.labels[:6])
    gradients = []
    for image, label in zip(few.images, few.labels, strict=True):
        loss = functional.cross_entropy(made(image[None]), label[None])
        gradients.append(torch.autograd.grad(loss, (made[0].weight, made[0].bias, made[3].weight)))
    weights = (made[0].weight, made[0].bias, made[3].weight)
    mean = [torch.stack(parts).double().mean(0) for parts in zip(*gradients, strict=True)]
    fisher = [torch.stack(parts).double().square().mean(0) for parts in zip(*gradients, strict=True)]

    def by_channel(parts: list[torch.Tensor]) -> torch.Tensor:
        return parts[0].flatten(1).sum(1) + parts[1] + parts[2].view(10, 4, 64).sum((0, 2))

    taylor = by_channel([(w * g).abs() for w, g in zip(weights, mean, strict=True)])
    hessian = by_channel([0.5 * w.double().square() * f for w, f in zip(weights, fisher, strict=True)])
    torch.testing.assert_close(group_scores(made, [group], "taylor", few)["0"], taylor.detach(), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(group_scores(made, [group], "hessian", few)["0"], hessian.detach(), rtol=1e-4, atol=1e-8)


def test_scores_are_ranked_across_groups_by_their_means_but_losses_as_they_are() -> None:
    scores = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([10.0, 30.0]), "c": torch.zeros(2)}
    assert torch.equal(comparable(scores, "l2")["a"], comparable(scores, "l2")["b"])
    assert torch.equal(comparable(scores, "l2")["c"], torch.zeros(2))
    assert comparable(scores, "taylor") == scores


@pytest.mark.parametrize(
    ("score", "data", "said"),
    [
        ("taylor", None, "give --images"),
        ("hessian", ImageBatch(DATA.images), "no labels"),
        ("activation", None, "looks at images"),
        ("batch_norm", None, "choose another score"),
    ],
)
def test_data_that_is_missing_is_named(score: ScoreName, data: ImageBatch | None, said: str) -> None:
    made = network("vgg16")  # no batch norms
    with pytest.raises(RecipeError, match=said):
        group_scores(made, channel_groups(made, EXAMPLE), score, data)
