"""Groups of channels: cutting them is ignoring them, and a network that cannot be followed is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.vision.networks import NAMES, images, network
from torch import Tensor, nn
from torch.nn import functional

from fettle.errors import ModelError
from fettle.methods.filters.dependencies import channel_groups, cut, cut_checked, logits_of
from fettle.methods.filters.prune_filters import PruneFilters

EXAMPLE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def zero_channel_(group: Any, channel: int) -> None:
    """Makes a channel exactly nothing: the filter, its bias, its norm, and every weight that reads it."""
    for member in group.members:
        places = [p for p, root in zip(member.channels, member.roots, strict=True) if root == channel]
        weight = member.layer.weight.data
        for place in places:
            if member.side == "in":
                parts = getattr(member.layer, "groups", 1)
                rows = weight.shape[0] // parts
                part, column = divmod(place, weight.shape[1])
                weight[part * rows : (part + 1) * rows, column] = 0
                continue
            weight[place] = 0
            if member.layer.bias is not None:
                member.layer.bias.data[place] = 0


@pytest.mark.parametrize("name", NAMES)
def test_filters_that_are_zero_are_what_goes_and_no_logit_changes(name: str) -> None:
    made = network(name)
    before = 0
    for group in channel_groups(made, EXAMPLE[:1]):
        before += group.size
        positions = group.size // group.repeats
        for position in range(positions - positions // 2):  # the first half, which no tie would choose
            for part in range(group.repeats):
                zero_channel_(group, part * positions + position)
    with torch.no_grad():
        expected = logits_of(made, EXAMPLE)
    rounds = PruneFilters(sparsity=0.5).prune_network(made, EXAMPLE[:1])
    with torch.no_grad():
        found = logits_of(made, EXAMPLE)
    assert expected.std() > 1e-4  # a network that says nothing would prove nothing
    assert rounds[0].removed >= before // 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_that_makes_channels_is_in_one_group_and_the_classes_in_none(name: str) -> None:
    made = network(name)
    groups = channel_groups(made, EXAMPLE[:1])
    makers = [m.name for group in groups for m in group.members if m.side in ("out", "depthwise")]
    convolutions = {path for path, layer in made.named_modules() if isinstance(layer, nn.Conv2d)}
    assert len(makers) == len(set(makers)) and set(makers) == convolutions
    cut_all = {group.name: list(range(group.size // 2)) for group in groups if group.repeats == 1}
    cut_checked(made, groups, cut_all, EXAMPLE[:1])
    assert logits_of(made, EXAMPLE).shape == (2, 10)


class Mixer(nn.Module):
    """Two convolutions, with something between them."""

    def __init__(self, between: Any, parameter: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(8, 1, 1)) if parameter else None
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(functional.relu(self.first(x)))
        x = x if self.scale is None else x * self.scale
        return self.head(functional.relu(self.second(x)).mean((2, 3)))


def test_a_network_that_moves_channels_unseen_is_refused_before_anything_is_written() -> None:
    made = Mixer(lambda x: x.roll(1, dims=1))  # autograd names it like any elementwise operation
    groups = channel_groups(made, EXAMPLE[:1])
    first = next(group for group in groups if group.name == "first")
    with pytest.raises(ModelError, match="not traced rightly"):
        cut_checked(made, [first], {"first": [0, 1, 2]}, EXAMPLE[:1])


def test_the_check_passes_where_the_tracing_is_right() -> None:
    made = Mixer(lambda x: functional.max_pool2d(x, 2))
    reference = copy.deepcopy(made)
    group = next(g for g in channel_groups(made, EXAMPLE[:1]) if g.name == "first")
    cut_checked(made, [group], {"first": [0, 5]}, EXAMPLE[:1])
    kept = [1, 2, 3, 4, 6, 7]
    assert torch.equal(made.first.weight, reference.first.weight[kept])
    assert torch.equal(made.second.weight, reference.second.weight[:, kept])


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (Mixer(lambda x: x, parameter=True), "parameters outside of layers"),
        (Mixer(nn.GroupNorm(2, 8)), "GroupNorm"),
        (Mixer(lambda x: x.nonexistent), "cannot be traced"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.ReLU(), nn.Linear(4, 2)), "no convolution"),
    ],
)
def test_what_cannot_be_followed_says_why(made: nn.Module, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        channel_groups(made, EXAMPLE[:1])


def test_a_flattened_image_loses_all_positions_of_a_channel() -> None:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 6, 3, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5))
    weight = made[3].weight.detach().clone().view(5, 6, 16)
    (group,) = channel_groups(made, EXAMPLE[:1])
    cut(group, [1, 4])
    assert torch.equal(made[3].weight, weight[:, [0, 2, 3, 5]].flatten(1))


def test_images_are_drawn_alike_every_time() -> None:
    first, second = images(20), images(20)
    assert torch.equal(first.images, second.images) and first.labels is not None
    assert sorted(first.labels.tolist()) == sorted(list(range(10)) * 2)
