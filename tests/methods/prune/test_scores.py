"""The scores of magnitude, Wanda, activation sparsity and Taylor, by hand; their statistics, against plain sums."""

from __future__ import annotations

import pytest
import torch

from fettle.methods.registry import from_fields
from fettle.methods.statistics import STATISTICS
from fettle.tensors.masked import MaskedTensor
from fettle.workers import Workers

WEIGHT = torch.tensor([[1.0, -2.0, 3.0, 4.0], [4.0, 3.0, 2.0, -1.0]])


@pytest.mark.parametrize(
    ("name", "fields", "statistics", "kept"),
    [
        ("magnitude", {}, {}, [[0, 0, 1, 1], [1, 1, 0, 0]]),
        (
            "wanda",
            {"pattern": "row"},
            {"squared_norm": torch.tensor([100.0, 1.0, 1.0, 0.01])},
            [[1, 0, 1, 0], [1, 1, 0, 0]],
        ),
        (
            "wanda",
            {},
            {"squared_norm": torch.tensor([1.0, 1.0, 0.0, 0.0])},
            [[1, 1, 0, 0], [1, 1, 0, 0]],
        ),
        ("activation_sparsity", {}, {"active_share": torch.tensor([1.0, 1.0, 0.1, 0.1])}, [[1, 1, 0, 0], [1, 1, 0, 0]]),
        ("taylor", {}, {"gradient": torch.tensor([[9.0, 0, 9, 0], [9, 0, 9, 0]])}, [[1, 0, 1, 0], [1, 0, 1, 0]]),
    ],
)  # fmt: skip
def test_what_stays(name: str, fields: dict, statistics: dict, kept: list) -> None:  # type: ignore[type-arg]
    found = from_fields(name, fields).compress(WEIGHT, statistics, dtype="float32")
    assert isinstance(found, MaskedTensor)
    assert found.kept.int().tolist() == kept
    assert torch.equal(found.dequantize(), WEIGHT * found.kept)


def test_squared_norms_and_active_shares_are_plain_sums() -> None:
    windows = [torch.randn(40 + i, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    every = torch.cat(windows).double()
    expected = {
        "squared_norm": every.square().sum(0),
        "active_share": (every.abs() > every.abs().mean(1, keepdim=True)).double().mean(0),
    }
    for name, exact in expected.items():
        found = []
        for threads, batch in ((1, 3), (2, 1)):
            kind = STATISTICS[name]
            state = kind.start(12)
            with Workers(threads) as workers:
                for first in range(0, 3, batch):
                    kind.add_(state, windows[first : first + batch], workers)
            found.append(kind.finish(state))
        assert torch.equal(found[0], found[1])
        torch.testing.assert_close(found[0].double(), exact, rtol=1e-5, atol=1e-6)
