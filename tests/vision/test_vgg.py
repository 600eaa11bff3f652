"""The head of a VGG over maps that are smaller than its kernel."""

from __future__ import annotations

import torch
from torch.nn import functional

from fettle.vision.vgg import _WideLayers


def test_a_small_map_is_spread_to_the_kernel_along_its_short_side_alone() -> None:
    torch.manual_seed(0)
    head = _WideLayers(channels=2, width=4, kernel=3, drop_rate=0.0)
    x = torch.randn(1, 2, 2, 5)
    made = head(x)
    assert made.shape == (1, 4, 1, 3)  # and not [1, 4, 3, 3]
    spread = functional.adaptive_avg_pool2d(x, (3, 5))
    assert torch.equal(made, functional.relu(head.fc2(functional.relu(head.fc1(spread)))))
    assert head(torch.randn(1, 2, 1, 1)).shape == (1, 4, 1, 1)
