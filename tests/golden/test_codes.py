"""The codes of one small fixed matrix, pinned for each method: a change of results is a decision, not an accident."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fettle.methods.registry import METHODS, from_fields
from fettle.tensors import MaskedTensor, QuantizedTensor, Scheme
from fettle.tensors.masked import MaskedScheme
from fettle.tensors.vectors import VectorTensor

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


# ten weights a row are two codes; the second reaches beyond the row
GOLDEN_VECTORS: dict[str, list[list[list[int]]]] = {
    "residual_codebooks": [[[9580, 110], [25135, 104]], [[31817, 190], [44783, 122]], [[5014, 85], [51775, 216]]]
}


@pytest.mark.parametrize("name", GOLDEN_VECTORS)
def test_vector_codes_are_pinned(name: str) -> None:
    method = from_fields(name, {"bits": 3, "scale_dtype": "float16"})
    found = method.compress(WEIGHT, {kind: inputs()[kind] for kind in method.statistics}, dtype="float32")
    assert isinstance(found, VectorTensor)
    assert found.codes.tolist() == GOLDEN_VECTORS[name]


QUANTIZERS = [  # factors have a scheme too, of no bits
    name
    for name, cls in METHODS.items()
    if isinstance(cls().scheme("float32"), Scheme) and ".quantize." in cls.__module__
]
PRUNERS = [name for name, cls in METHODS.items() if isinstance(cls().scheme("float32"), MaskedScheme)]
PRUNED: dict[str, list[str]] = {  # a dot for what went, the code of what stayed
    "activation_sparsity": ["..7.056.70", "...0570..7", "...7104707"],
    "magnitude": [".07.0.7.70", ".7.0570..7", "55.7.0.70."],
    "sparsegpt": [".07.067.70", ".7.0.70..7", ".4.7.0370."],
    "taylor": ["..7.056.70", "37.0.70..7", "4..71047.."],
    "wanda": [".07.0.7.70", ".7.0570..7", "55.7.0.70."],
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_codes_are_pinned(name: str) -> None:
    assert name in GOLDEN, f"pin the codes of {name} here"
    method = from_fields(
        name, {"bits": 3, "group_size": 4, "asymmetric": True, "scale_dtype": "float32"} | FIELDS.get(name, {})
    )
    found = method.compress(WEIGHT, {kind: inputs()[kind] for kind in method.statistics}, dtype="float32")
    assert isinstance(found, QuantizedTensor)
    assert ["".join(map(str, row)) for row in found.codes.tolist()] == GOLDEN[name]


@pytest.mark.parametrize("name", PRUNERS)
def test_masks_and_their_codes_are_pinned(name: str) -> None:
    assert name in PRUNED, f"pin the mask of {name} here"
    method = from_fields(
        name, {"sparsity": 0.4, "bits": 3, "group_size": 4, "asymmetric": True, "scale_dtype": "float32"}
    )
    gram = inputs()["gram"]
    known = {
        **inputs(), "squared_norm": gram.diagonal().clone(), "active_share": torch.arange(1.0, 11) / 10,
        "gradient": torch.arange(30.0).remainder(7).view(3, 10),
    }  # fmt: skip
    found = method.compress(WEIGHT, {kind: known[kind] for kind in method.needs()}, dtype="float32")
    assert isinstance(found, MaskedTensor) and isinstance(found.values, QuantizedTensor)
    told = zip(found.values.codes.tolist(), found.kept.tolist(), strict=True)
    rows = ["".join(str(c) if k else "." for c, k in zip(codes, kept, strict=True)) for codes, kept in told]
    assert rows == PRUNED[name]
