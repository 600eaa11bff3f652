"""The codes of one small fixed matrix, pinned for each method: a change of results is a decision, not an accident."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fettle.methods.registry import METHODS, from_fields

# 3 rows of 10 weights in sixteenths, and inputs of small integers: exact in every type, the same on every machine.
WEIGHT = torch.tensor(
    [
        [3, -7, 12, 1, -16, 5, 9, -2, 14, -11],
        [-4, 8, 2, -13, 6, 15, -9, 0, -1, 10],
        [7, 7, -3, 11, -5, -8, 4, 13, -15, 2],
    ]
).div(16)
INPUTS = torch.tensor(
    [[(row * 5 + column * column * 3 + row * column) % 11 - 5 for column in range(10)] for row in range(24)]
)

GOLDEN: dict[str, list[str]] = {
    "awq": ["4073057370", "3750570307", "6607104707"],  # its solver's: without a block nothing is rescaled
    "gptq": ["4173056470", "3750570306", "5407214707"],
    "hqq": ["4173056470", "3750570307", "6607104707"],
    "learned_rounding": ["4173056470", "3750570306", "5407214707"],  # its start, GPTQ's: a tuner wants a block
    "low_rank_correction": ["4173056470", "3750570306", "5407214707"],
    "round_to_nearest": ["4073057370", "3750570307", "6607104707"],
    "smoothquant": ["4073057370", "3750570307", "6607104707"],  # the nearest ones, for the same reason
    "sparse_outliers": ["4173047070", "3750570306", "5407214707"],
}
FIELDS: dict[str, dict[str, float]] = {"sparse_outliers": {"outliers": 0.05}}  # one of thirty weights


def inputs() -> dict[str, Tensor]:
    return {"gram": (INPUTS.T @ INPUTS).float(), "drift": torch.zeros(10, 10)}


@pytest.mark.parametrize("name", [n for n, cls in METHODS.items() if ".quantize." in cls.__module__])
def test_codes_are_pinned(name: str) -> None:
    assert name in GOLDEN, f"pin the codes of {name} here"
    method = from_fields(
        name, {"bits": 3, "group_size": 4, "asymmetric": True, "scale_dtype": "float32"} | FIELDS.get(name, {})
    )
    found = method.compress(WEIGHT, {kind: inputs()[kind] for kind in method.statistics}, dtype="float32")
    assert ["".join(map(str, row)) for row in found.codes.tolist()] == GOLDEN[name]
