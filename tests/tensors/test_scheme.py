"""Schemes: bytes to the byte, what cannot be, round trips."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fettle.errors import RecipeError
from fettle.tensors import QuantizedTensor, Scheme, SparseScheme, SparseTensor, uniform
from fettle.tensors.levels import GridName, named
from fettle.tensors.remainder import RemainderScheme
from fettle.tensors.scheme import SCALE_DTYPES

INT4 = Scheme(grid=uniform(4), granularity="group", group_size=32, zero_point=True, scale_dtype="bfloat16")


@st.composite
def schemes(draw: st.DrawFn, *, uniform_only: bool = False) -> Scheme:
    granularity: Any = draw(st.sampled_from(["tensor", "channel", "group"]))
    name = "uniform" if uniform_only else draw(st.sampled_from(get_args(GridName)))
    grid = named(name, draw(st.integers(2, 8)) if name == "uniform" else None)
    wide = ["float16", "bfloat16", "float32"]
    return Scheme(
        grid=grid,
        granularity=granularity,
        group_size=draw(st.integers(1, 70)) if granularity == "group" else None,
        zero_point=draw(st.booleans()) if grid.is_uniform else False,
        scale_dtype=draw(st.sampled_from(wide if grid.is_learned else list(SCALE_DTYPES))),
    )


def random_quantized(scheme: Scheme, shape: tuple[int, int], seed: int = 0) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    scale_shape, top = scheme.scale_shape(shape), 2**scheme.grid.bits
    zero_point = torch.randint(0, top, scale_shape, dtype=torch.uint8, generator=generator)
    scale = (torch.rand(scale_shape, generator=generator) + 0.01).to(scheme.torch_scale_dtype).to(scheme.value_dtype)
    levels = None
    if scheme.grid.is_learned:
        levels = torch.randn(*scale_shape, top, generator=generator).to(scheme.value_dtype).sort(dim=-1).values
        scale = torch.ones_like(scale)
    alone = QuantizedTensor(
        codes=torch.randint(0, scheme.grid.level_count, shape, dtype=torch.uint8, generator=generator),
        scale=scale,
        zero_point=zero_point if scheme.zero_point else None,
        scheme=scheme.codes_alone,
        levels=levels,
        tensor_scale=torch.rand(1, generator=generator) + 0.1 if scheme.has_tensor_scale else None,
    )
    return alone if scheme.remainder is None else with_remainder(alone, scheme.remainder, seed)


def with_remainder(alone: QuantizedTensor, scheme: RemainderScheme, seed: int = 0) -> QuantizedTensor:
    """The same codes with a random remainder beside them."""
    generator = torch.Generator().manual_seed(seed + 1)
    whole, (rows, columns) = replace(alone.scheme, remainder=scheme), alone.shape
    state = {}
    for name, (dtype, dimensions) in whole.remainder_spec(alone.shape).items():
        if dtype.is_floating_point:
            state[name] = torch.randn(dimensions, generator=generator).to(dtype)
    remainder = None
    if isinstance(scheme, SparseScheme) and state:
        places = torch.randperm(rows * columns, generator=generator)[: scheme.count(alone.shape)].sort().values
        remainder = SparseTensor.at(places, state["weight_sparse_values"], alone.shape)
    elif state:
        remainder = scheme.from_state(state, alone.shape)
    return replace(alone, scheme=whole, remainder=remainder)


@given(scheme=schemes(), rows=st.integers(1, 40), columns=st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_stored_bytes_are_the_bytes_of_the_file(scheme: Scheme, rows: int, columns: int) -> None:
    shape = (rows, columns)
    storages = ["pack-quantized"] + (["int-quantized"] if scheme.grid == uniform(8) else [])
    for storage in storages:
        state = random_quantized(scheme, shape).to_state(storage)
        blob = save(state)
        payload = len(blob) - 8 - int.from_bytes(blob[:8], "little")
        assert payload == scheme.stored_bytes(shape, storage)
        assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == scheme.state_spec(shape, storage)
        assert scheme.bits_per_weight(shape, storage) == 8 * payload / (rows * columns)


@given(scheme=schemes())
def test_plain_values_and_back(scheme: Scheme) -> None:
    assert Scheme.from_dict(scheme.to_dict()) == scheme


def test_bits_per_weight_counts_scales_and_zero_points() -> None:
    assert INT4.bits_per_weight((1024, 1024)) == pytest.approx(4 + (16 + 4) / 32 + 128 / 1024**2)


def test_a_last_group_may_be_shorter() -> None:
    assert INT4.group_count(172) == 6
    assert INT4.scale_shape((64, 172)) == (64, 6)
    assert INT4.group_count(7) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": None}, "allowed: integers from 1"),
        ({"granularity": "channel"}, "leave it out"),
        ({"granularity": "row", "group_size": None}, "Allowed: channel, group, tensor"),
        ({"scale_dtype": "float64"}, "unknown scale_dtype 'float64'"),
    ],
)
def test_parts_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        replace(INT4, **change).validate()


def test_unknown_keys_and_storages_offer_the_nearest_spelling() -> None:
    with pytest.raises(RecipeError, match="did you mean 'group_size'"):
        Scheme.from_dict(INT4.to_dict() | {"groupsize": 3})
    with pytest.raises(RecipeError, match="did you mean 'pack-quantized'"):
        INT4.stored_bytes((4, 4), "packed-quantized")
    with pytest.raises(RecipeError, match="8 bits"):
        INT4.stored_bytes((4, 4), "int-quantized")


def test_describe() -> None:
    assert INT4.describe() == "int4, group 32, zero point, bfloat16 scale"
