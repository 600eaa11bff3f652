"""What groups share is chosen where the weight is."""

from __future__ import annotations

import torch

from fettle.methods.quantize.sharing import column_importance
from fettle.tensors.grid import uniform
from fettle.tensors.scheme import Scheme


def test_equal_importance_lies_beside_the_weight() -> None:
    scheme = Scheme(grid=uniform(4), granularity="group", group_size=8)
    found = column_importance(None, torch.empty(4, 12, device="meta"), scheme)
    assert found.device == torch.device("meta")
    plain = column_importance(None, torch.empty(4, 12), scheme)
    assert plain.flatten().tolist() == [1.0] * 12 + [0.0] * 4  # a short group is filled with nothing
