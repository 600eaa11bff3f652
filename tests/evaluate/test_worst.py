"""Worst tokens and the histogram."""

from __future__ import annotations

import torch

from fettle.evaluate.worst import EDGES, kl_histogram


def test_every_token_is_in_one_bin_of_the_histogram():
    kl = torch.tensor([0.0, 1e-9, 1e-6, 0.5, 0.5, 99.0, 1e6], dtype=torch.float64)
    found = kl_histogram(kl)
    assert found["edges"] == EDGES
    assert sum(found["counts"]) == len(kl)
    low = next(i for i, edge in enumerate(EDGES) if edge > 0.5) - 1
    assert EDGES[low] <= 0.5 < EDGES[low + 1]
    assert found["counts"][low] == 2
    assert found["counts"][0] == 2  # below 1e-6
    assert found["counts"][-1] == 2  # the last bin has no upper end
