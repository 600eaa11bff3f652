"""What stands beside the codes: sums by the formula, bytes of the file, damage by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tests.tensors.test_scheme import random_quantized, schemes, with_remainder
from torch import Tensor

from fettle.errors import CheckpointError, RecipeError
from fettle.tensors import FactoredScheme, FactoredTensor, QuantizedTensor, Scheme, SparseScheme, SparseTensor, uniform
from fettle.tensors.sparse import index_dtype

INT3 = Scheme(grid=uniform(3), granularity="group", group_size=32, zero_point=True, scale_dtype="bfloat16")
SPARSE = replace(INT3, remainder=SparseScheme(share=0.05))
FACTORED = replace(INT3, remainder=FactoredScheme(rank=4))

remainders = st.one_of(
    st.builds(SparseScheme, share=st.floats(1e-4, 0.05)), st.builds(FactoredScheme, rank=st.integers(1, 12))
)


@given(
    scheme=schemes(), remainder=remainders, rows=st.integers(1, 40), columns=st.integers(1, 300), seed=st.integers(0, 9)
)
@settings(max_examples=80, deadline=None)
def test_bytes_and_state_and_back(scheme: Scheme, remainder: Any, rows: int, columns: int, seed: int) -> None:
    shape, scheme = (rows, columns), replace(scheme, remainder=remainder)
    assert Scheme.from_dict(scheme.to_dict()) == scheme
    ours = random_quantized(scheme, shape, seed)
    for storage in ["pack-quantized"] + (["int-quantized"] if scheme.grid == uniform(8) else []):
        state = ours.to_state(storage)
        blob = save(state)
        assert len(blob) - 8 - int.from_bytes(blob[:8], "little") == scheme.stored_bytes(shape, storage)
        assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == scheme.state_spec(shape, storage)
        back = QuantizedTensor.from_state(state, scheme, storage)
        again = back.to_state(storage)
        assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
        assert torch.equal(back.dequantize(), ours.dequantize())


@pytest.mark.parametrize("share", [0.01, 0.05])
@pytest.mark.parametrize("shape", [(1, 100), (7, 172), (33, 300), (300, 33)], ids=str)
def test_a_sparse_remainder_is_added_where_it_says(share: float, shape: tuple[int, int]) -> None:
    ours = random_quantized(replace(INT3, remainder=SparseScheme(share=share)), shape)
    expected = replace(ours, remainder=None).dequantize()
    assert isinstance(ours.remainder, SparseTensor)
    offsets, columns = ours.remainder.offsets.tolist(), ours.remainder.columns.tolist()
    assert offsets[-1] == int(share * shape[0] * shape[1]) == len(columns)
    for row in range(shape[0]):
        for entry in range(offsets[row], offsets[row + 1]):
            expected[row, columns[entry]] += ours.remainder.values[entry].float()
    assert torch.equal(ours.dequantize(), expected)
    middle = slice(shape[0] // 3, shape[0] - 1)
    assert torch.equal(ours.dequantize_tile(middle), expected[middle])


@pytest.mark.parametrize("shape", [(1, 1), (7, 172), (300, 3)], ids=str)
def test_factors_are_multiplied_and_added(shape: tuple[int, int]) -> None:
    ours = random_quantized(FACTORED, shape)
    assert isinstance(ours.remainder, FactoredTensor)
    assert ours.remainder.left.shape == (shape[0], min(4, *shape))
    product = ours.remainder.left.double() @ ours.remainder.right.double()
    expected = replace(ours, remainder=None).dequantize().double() + product
    assert torch.allclose(ours.dequantize().double(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [
        ((8, 256), (torch.uint8, torch.uint8)), ((8, 257), (torch.int16, torch.uint8)),
        ((600, 256), (torch.uint8, torch.int16)), ((2, 40000), (torch.int32, torch.int16)),
        ((4000, 1000), (torch.int16, torch.int32)),
    ],
)  # fmt: skip
def test_places_take_the_narrowest_integers(shape: tuple[int, int], dtypes: tuple[torch.dtype, ...]) -> None:
    spec = SPARSE.state_spec(shape)
    assert (spec["weight_sparse_columns"][0], spec["weight_sparse_offsets"][0]) == dtypes
    assert index_dtype(255) == torch.uint8 and index_dtype(32768) == torch.int32


def test_a_weight_too_small_for_an_outlier_stores_none() -> None:
    small = random_quantized(SPARSE, (3, 6))
    assert small.remainder is None
    assert small.to_state().keys() == random_quantized(INT3, (3, 6)).to_state().keys()
    assert SPARSE.stored_bytes((3, 6)) == INT3.stored_bytes((3, 6))


def test_bits_by_hand() -> None:
    entries = 0.05 * (16 + 16) + 32 * 1025 / 1024**2  # values, columns, offsets
    assert SPARSE.bits_per_weight((1024, 1024)) - INT3.bits_per_weight((1024, 1024)) == pytest.approx(entries, abs=1e-4)
    assert FACTORED.bits_per_weight((1024, 512)) - INT3.bits_per_weight((1024, 512)) == 16 * 4 * (1 / 1024 + 1 / 512)


def test_values_have_16_bits_and_factors_the_scales_type() -> None:
    for dtype, sparse, factor in (
        ("float16", torch.float16, torch.float16),
        ("float32", torch.bfloat16, torch.float32),
        ("float8_e4m3fn", torch.bfloat16, torch.bfloat16),
    ):
        assert replace(SPARSE, scale_dtype=dtype).state_spec((64, 64))["weight_sparse_values"][0] == sparse
        assert replace(FACTORED, scale_dtype=dtype).state_spec((64, 64))["weight_factor_left"][0] == factor


@pytest.mark.parametrize(
    ("name", "damage", "match"),
    [
        ("weight_sparse_columns", lambda t: t.index_fill(0, torch.tensor([3]), 172), "column 172 of 172"),
        ("weight_sparse_columns", lambda t: t.flip(0), "does not ascend"),
        ("weight_sparse_offsets", lambda t: t.flip(0), "must ascend from 0"),
        ("weight_sparse_offsets", lambda t: t + 1, "must ascend from 0"),
        ("weight_sparse_offsets", lambda t: t.index_fill(0, torch.tensor([2]), 59), "must ascend from 0"),
        ("weight_sparse_offsets", lambda t: t.long(), "weight_sparse_offsets is torch.int64"),
        ("weight_sparse_values", lambda t: t[1:], r"weight_sparse_values is torch.bfloat16 \[59\]"),
    ],
)
def test_damaged_places_are_named(name: str, damage: Any, match: str) -> None:
    state = random_quantized(SPARSE, (7, 172)).to_state()
    assert len(state["weight_sparse_values"]) == 60
    with pytest.raises(CheckpointError, match=match):
        QuantizedTensor.from_state({**state, name: damage(state[name])}, SPARSE)


def test_negative_columns_are_named() -> None:
    state = random_quantized(SPARSE, (7, 300)).to_state()
    columns: Tensor = state["weight_sparse_columns"].clone()
    columns[0] = -1
    with pytest.raises(CheckpointError, match="column -1 of 300"):
        QuantizedTensor.from_state({**state, "weight_sparse_columns": columns}, SPARSE)


@pytest.mark.parametrize("name", ["weight_factor_left", "weight_factor_right"])
def test_damaged_factors_are_named(name: str) -> None:
    state = random_quantized(FACTORED, (7, 172)).to_state()
    with pytest.raises(CheckpointError, match=name):
        QuantizedTensor.from_state({**state, name: state[name].T}, FACTORED)
    del state[name]
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        QuantizedTensor.from_state(state, FACTORED)


@pytest.mark.parametrize(
    ("remainder", "match"),
    [
        ({"kind": "sparse", "share": 0.06}, "at most 0.05"),
        ({"kind": "sparse", "share": 0}, "above 0"),
        ({"kind": "factored", "rank": 0}, "integers from 1"),
        ({"kind": "factored", "rank": 2.0}, "integers from 1"),
        ({"kind": "facored", "rank": 2}, "did you mean 'factored'"),
        ({"kind": "factored"}, "rank"),
        ({"kind": "sparse", "share": 0.01, "rank": 3}, "rank"),
    ],
)
def test_what_cannot_be_is_refused(remainder: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        Scheme.from_dict({**INT3.to_dict(), "remainder": remainder})


def test_describe() -> None:
    assert SPARSE.describe() == INT3.describe() + ", 5% outliers"
    assert FACTORED.describe() == INT3.describe() + ", rank 4"
    assert with_remainder(random_quantized(INT3, (4, 40)), FactoredScheme(rank=4)).scheme == FACTORED
