"""The compressed weight: against compressed-tensors' own decompression, by brute force, and in round trips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.tensors.test_scheme import random_quantized, schemes

from fettle.errors import CheckpointError
from fettle.tensors import QuantizedTensor, Scheme, quantize, quantized, uniform
from fettle.tensors.grid import from_levels, learned
from fettle.tensors.levels import named


def standard_scheme(scheme: Scheme) -> QuantizationScheme:
    arguments = QuantizationArgs(
        num_bits=scheme.grid.bits,
        type="int",
        strategy=scheme.granularity,
        group_size=scheme.group_size,
        symmetric=not scheme.zero_point,
    )
    return QuantizationScheme(targets=["Linear"], weights=arguments)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize(
    ("granularity", "group_size", "shape"),
    [("group", 32, (7, 96)), ("group", 1, (3, 5)), ("channel", None, (7, 172)), ("tensor", None, (5, 33))],
)
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_values_are_bit_for_bit_the_standards(
    bits: int, zero_point: bool, granularity: Any, group_size: int | None, shape: tuple[int, int], scale_dtype: str
) -> None:
    scheme = Scheme(
        grid=uniform(bits),
        granularity=granularity,
        group_size=group_size,
        zero_point=zero_point,
        scale_dtype=scale_dtype,
    )
    ours = random_quantized(scheme, shape)
    theirs = PackedQuantizationCompressor.decompress(ours.to_state(), standard_scheme(scheme))["weight"]
    values = ours.dequantize(scheme.torch_scale_dtype)
    assert theirs.dtype == values.dtype
    assert torch.equal(theirs, values)
    assert torch.equal(ours.dequantize(), theirs.float())
    if bits == 8:
        state = ours.to_state("int-quantized")
        assert torch.equal(IntQuantizationCompressor.decompress(state, standard_scheme(scheme))["weight"], values)


def test_a_short_last_group_by_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = Scheme(grid=uniform(3), granularity="group", group_size=32, zero_point=True, scale_dtype="float32")
    ours = random_quantized(scheme, (7, 172))
    assert ours.zero_point is not None
    expected = torch.empty(7, 172)
    for row in range(7):
        for column in range(172):
            group = column // 32
            difference = int(ours.codes[row, column]) - int(ours.zero_point[row, group])
            expected[row, column] = difference * ours.scale[row, group]
    assert torch.equal(ours.dequantize(), expected)
    monkeypatch.setattr(quantized, "TILE_WEIGHTS", 400)
    assert torch.equal(ours.dequantize(), expected)


@given(scheme=schemes(), rows=st.integers(1, 9), columns=st.integers(1, 80), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_state_and_back(scheme: Scheme, rows: int, columns: int, seed: int) -> None:
    ours = random_quantized(scheme, (rows, columns), seed)
    for storage in ["pack-quantized"] + (["int-quantized"] if scheme.grid == uniform(8) else []):
        state = ours.to_state(storage)
        back = QuantizedTensor.from_state(state, scheme, storage)
        for name in ("codes", "scale", "zero_point", "levels", "tensor_scale"):
            one, other = getattr(back, name), getattr(ours, name)
            assert (one is None) == (other is None), name
            assert one is None or (one.dtype == other.dtype and torch.equal(one, other)), name
        assert torch.equal(back.dequantize(), ours.dequantize())
        assert ours.nbytes(storage) == sum(tensor.nbytes for tensor in state.values())


@given(scheme=schemes(uniform_only=True), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_quantizing_values_on_the_grid_gives_their_codes(scheme: Scheme, seed: int) -> None:
    assume(
        scheme.grid.bits < 8 or scheme.scale_dtype != "bfloat16"
    )  # eight bits of mantissa round 255 steps to a neighbour
    assume(not scheme.has_tensor_scale)  # `in_tensor_units` divides by it before
    ours = random_quantized(scheme, (5, 41), seed)
    again = quantize(ours.dequantize(), ours.scale, ours.zero_point, scheme)
    assert torch.equal(again.codes, ours.codes)


def test_no_code_is_nearer_than_the_chosen_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for grid in (uniform(3), from_levels("bent", [-1.0, -0.4, -0.1, 0.0, 0.1, 0.3, 0.6, 1.0])):
        scheme = Scheme(grid=grid, granularity="group", group_size=8)
        weight = torch.randn(6, 20, generator=generator)
        scale = torch.rand(6, 3, generator=generator) + 0.2
        chosen = quantize(weight, scale, None, scheme)
        values = grid.table() * scale.repeat_interleave(8, dim=1)[:, :20].unsqueeze(-1)  # [6, 20, levels]
        best = (values - weight.unsqueeze(-1)).abs().min(dim=-1).values
        assert torch.allclose((chosen.dequantize() - weight).abs(), best, atol=1e-6)


def test_learned_values_are_looked_up_in_each_groups_own_table() -> None:
    scheme = Scheme(grid=learned(2), granularity="group", group_size=3)
    levels = torch.tensor(
        [[[-1.0, 0.0, 0.5, 2.0], [1.0, 2.0, 3.0, 4.0]], [[-4.0, -3.0, 3.0, 4.0], [0.0, 0.1, 0.2, 9.0]]]
    )
    weight = torch.tensor([[1.9, -0.6, 0.2, 3.6, 0.0], [-3.4, 0.1, 9.0, 0.16, 5.0]])
    found = quantize(weight, torch.ones(2, 2), None, scheme, levels=levels)
    assert found.codes.tolist() == [[3, 0, 1, 3, 0], [1, 2, 3, 2, 3]]
    assert found.dequantize().tolist() == [[2.0, -1.0, 0.0, 4.0, 1.0], [-3.0, 3.0, 4.0, pytest.approx(0.2), 9.0]]


def test_a_code_without_a_level_is_found() -> None:
    scheme = Scheme(grid=named("ternary"), granularity="channel")
    state = random_quantized(scheme, (2, 9)).to_state()
    state["weight_packed"] = torch.full_like(state["weight_packed"], -1)
    with pytest.raises(CheckpointError, match=r"a code is 3, and ternary 2 bits.* has 3 levels"):
        QuantizedTensor.from_state(state, scheme)


def test_quantize_leaves_its_arguments_alone() -> None:
    scheme = Scheme(grid=uniform(4), granularity="channel", zero_point=True)
    weight, scale = torch.randn(3, 10), torch.full((3, 1), 0.3)
    zero_point = torch.full((3, 1), 7, dtype=torch.uint8)
    copies = weight.clone(), scale.clone(), zero_point.clone()
    quantize(weight, scale, zero_point, scheme)
    assert all(torch.equal(a, b) for a, b in zip((weight, scale, zero_point), copies, strict=True))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight_scale", None, "weight_scale is missing"),
        ("weight_scale", torch.zeros(7, 2), r"weight_scale is torch.float32 \[7, 2\]"),
        ("weight_scale", torch.zeros(7, 6, dtype=torch.float16), "torch.float16"),
        ("weight_packed", torch.zeros(7, 3, dtype=torch.int32), "weight_packed"),
        ("weight_shape", torch.tensor([7, 172, 1]), "matrix"),
        ("weight_shape", torch.tensor([-7, 172]), "matrix"),
        ("weight_shape", torch.tensor([7, 180]), "weight_packed"),
    ],
)
def test_damaged_states_are_refused(name: str, value: torch.Tensor | None, message: str) -> None:
    scheme = Scheme(grid=uniform(4), granularity="group", group_size=32)
    state = random_quantized(scheme, (7, 172)).to_state()
    if value is None:
        del state[name]
    else:
        state[name] = value
    with pytest.raises(CheckpointError, match=message):
        QuantizedTensor.from_state(state, scheme)
