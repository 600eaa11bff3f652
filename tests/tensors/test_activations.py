"""Quantized inputs against compressed-tensors' own arithmetic, and their round trips."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp, generate_gparam
from torch import Tensor, nn

from fettle.errors import CheckpointError, RecipeError
from fettle.tensors import Activations, Scheme, quantize, uniform
from fettle.tensors.activations import InputQuantizer, InputScale

SCHEME = Scheme(grid=uniform(8), granularity="channel", activations=Activations(dynamic=False, granularity="tensor"))


def some_inputs(*shape: int, seed: int = 0) -> Tensor:
    """Skewed, with an outlier and a token of zeros."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.4
    values[..., 1, :] = 0
    values[..., 2, 3] = 37.5
    return values


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_dynamic_values_are_those_of_the_standard(bits: int, zero_point: bool, granularity: Any) -> None:
    args = QuantizationArgs(num_bits=bits, symmetric=not zero_point, strategy=granularity, dynamic=True)
    inputs = some_inputs(3, 7, 45)
    scale, point = compute_dynamic_scales_and_zp(inputs, args, nn.Module())
    activations = Activations(bits=bits, zero_point=zero_point, granularity=granularity)
    assert torch.equal(InputQuantizer(activations=activations)(inputs), fake_quantize(inputs, scale, point, args))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_point", [False, True])
def test_static_values_are_those_of_the_standard(bits: int, zero_point: bool) -> None:
    args = QuantizationArgs(num_bits=bits, symmetric=not zero_point, strategy="tensor")
    activations = Activations(dynamic=False, bits=bits, zero_point=zero_point, granularity="tensor")
    fixed = InputScale.spanning(-1.5, 4.0, activations, torch.bfloat16)
    assert (fixed.zero_point is not None) == zero_point
    inputs = some_inputs(3, 7, 45)
    point = None if fixed.zero_point is None else fixed.zero_point
    expected = fake_quantize(inputs, fixed.scale.float(), point, args)
    assert torch.equal(InputQuantizer(activations=activations, fixed=fixed)(inputs), expected)
    inside = inputs.clamp(-1.4, 3.9) if zero_point else inputs.clamp(-3.9, 3.9)
    error = (InputQuantizer(activations=activations, fixed=fixed)(inside) - inside).abs().max()
    assert float(error) <= float(fixed.scale) * (0.501 if zero_point else 0.6)


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_floats_are_those_of_the_standard(bits: int) -> None:
    args = QuantizationArgs(
        num_bits=bits, type="float", symmetric=True, strategy="group", group_size=32, dynamic=True,
        scale_dtype=torch.uint8, zp_dtype=torch.uint8,
    )  # fmt: skip
    inputs = some_inputs(3, 7, 96)
    inputs[0, 0, :32] = torch.arange(32) / 4  # ties of e2m1 at every step, and 7 and more: the next power of two
    inputs[0, 3] *= torch.logspace(-9, 9, 96)
    activations = Activations(bits=bits, granularity="group", grid="float")
    activations.validate()
    quantizer = InputQuantizer(activations=activations)
    with torch.compiler.set_stance("force_eager"):  # the standard compiles its rounding
        scale, point = compute_dynamic_scales_and_zp(inputs, args, nn.Module())
        expected = fake_quantize(inputs, scale, point, args)
    assert torch.equal(quantizer(inputs), expected)
    short = quantizer(inputs[..., :77])  # the last group has 13
    assert torch.equal(short[..., :64], expected[..., :64])
    padded = torch.nn.functional.pad(inputs[..., 64:77], (0, 19))
    assert torch.equal(short[..., 64:], quantizer(padded)[..., :13])
    assert torch.equal(quantizer(torch.zeros(2, 40)), torch.zeros(2, 40))
    assert bool(quantizer(torch.tensor([[1.0, float("nan")]])).isnan().any())
    assert Activations.from_dict(activations.to_dict()) == activations
    assert "MX, a group of 32" in activations.describe()


def test_groups_in_units_of_a_stored_scale_are_those_of_the_standard() -> None:
    args = QuantizationArgs(
        num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16, dynamic="local",
        scale_dtype=torch.float8_e4m3fn, zp_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    activations = Activations(bits=4, granularity="tensor_group", grid="float")
    activations.validate()
    seen = some_inputs(3, 7, 96)
    fixed = InputScale.spanning(float(seen.min()), float(seen.max()), activations, torch.bfloat16)
    assert torch.equal(fixed.scale, generate_gparam(seen.min(), seen.max()))
    inputs = some_inputs(3, 7, 96, seed=1)
    inputs[0, 0, :32] = torch.arange(32) / 4
    inputs[0, 3] *= torch.logspace(-9, 9, 96)  # scales below e4m3's least, and groups beyond all that was seen
    quantizer = InputQuantizer(activations=activations, fixed=fixed)
    with torch.compiler.set_stance("force_eager"):
        scale, point = compute_dynamic_scales_and_zp(inputs, args, nn.Module(), global_scale=fixed.scale)
        expected = fake_quantize(inputs, scale, point, args, global_scale=fixed.scale)
    assert torch.equal(quantizer(inputs), expected)
    assert float(quantizer(inputs).max()) < float(inputs.max())  # clipped
    short = quantizer(inputs[..., :77])  # the last group has 13
    assert torch.equal(short[..., :64], expected[..., :64])
    assert torch.equal(quantizer(torch.zeros(2, 40)), torch.zeros(2, 40))
    for bad in (float("nan"), float("inf")):
        assert not bool(quantizer(torch.tensor([[1.0, bad]])).isfinite().all())
    assert Activations.from_dict(activations.to_dict()) == activations
    assert "inputs float4 NV, a group of 16" in activations.describe()
    for largest in (0.0, 1e-38, 1e-36, 3e38):
        ends = torch.tensor([-largest, 0.0])
        found = InputScale.spanning(*ends.tolist(), activations, torch.float32).scale
        torch.testing.assert_close(found, generate_gparam(*ends), rtol=3e-7, atol=0)


@pytest.mark.parametrize("zero_point", [False, True])
def test_what_lies_beyond_the_codes_is_kept_apart(zero_point: bool) -> None:
    clipping = Activations(dynamic=False, zero_point=zero_point, granularity="tensor")
    fixed = InputScale.spanning(-1.0, 1.5, clipping, torch.float32)
    clipped = InputQuantizer(activations=clipping, fixed=fixed)
    keeping = InputQuantizer(activations=replace(clipping, outliers=0.01), fixed=fixed)
    inputs = torch.linspace(-3, 4, 700).reshape(7, -1)
    codes, scale, _ = keeping.codes(inputs)
    half = float(scale) / 2
    assert clipped.beyond(inputs) is None
    apart = keeping.beyond(inputs)
    assert apart is not None
    ends = (codes == -128) | (codes == 127)
    assert bool((apart[~ends] == 0).all()) and bool((apart != 0).any())
    torch.testing.assert_close(keeping(inputs), clipped(inputs) + apart)
    # every input is as near as a code inside, and as float16 says what is left outside
    assert float((keeping(inputs) - inputs).abs().max()) <= half * 1.001 + 4 * 2**-11
    assert float((clipped(inputs) - inputs).abs().max()) > 1
    huge = keeping(torch.tensor([[1e30, -1e30, 0.0]]))
    assert bool(huge.isfinite().all())
    assert bool(keeping(torch.tensor([[float("nan")]])).isnan().all())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"outliers": 0.2}, "allowed: numbers from 0 to 0.05"),
        ({"outliers": -0.1}, "allowed: numbers from 0"),
        ({"outliers": 0.01, "dynamic": True}, "beyond a stored range"),
        ({"outliers": 0.01, "grid": "float"}, "beyond a stored range"),
        ({"granularity": "group"}, "the MX formats' and goes with activation_grid: float"),
        ({"grid": "float", "bits": 4}, "floats of 4 bits come in groups alone"),
        ({"grid": "float", "bits": 6}, "of 8 bits, or e2m1, of 4"),
        ({"grid": "float", "granularity": "group"}, "stands inside the sum of a product"),
        ({"grid": "float", "bits": 4, "granularity": "tensor_group"}, "stands inside the sum of a product"),
        ({"grid": "float", "granularity": "tensor_group", "dynamic": True}, "the NV format's and goes with"),
        ({"granularity": "tensor_group", "dynamic": True}, "the NV format's and goes with"),
    ],
)
def test_inputs_that_cannot_be_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        Activations(**{"dynamic": False, "granularity": "tensor", **fields}).validate()


@pytest.mark.parametrize("zero_point", [False, True])
def test_tokens_are_independent(zero_point: bool) -> None:
    quantizer = InputQuantizer(activations=Activations(zero_point=zero_point))
    inputs = some_inputs(9, 33)
    alone = torch.stack([quantizer(token) for token in inputs])
    assert torch.equal(quantizer(inputs), alone)
    assert torch.equal(quantizer(inputs.reshape(3, 3, 33)).reshape(9, 33), alone)
    assert torch.equal(quantizer(inputs)[1], torch.zeros(33))


def test_a_scale_of_the_tensor_is_shared_by_its_tokens() -> None:
    quantizer = InputQuantizer(activations=Activations(granularity="tensor"))
    inputs = some_inputs(9, 33)
    assert len((quantizer(inputs) / float(inputs.abs().max() / 127.5)).round().unique()) < 50
    assert not torch.equal(quantizer(inputs)[:2], quantizer(inputs[:2]))


def test_no_inputs_zeros_and_what_is_no_number() -> None:
    quantizer = InputQuantizer(activations=Activations(zero_point=True))
    assert quantizer(torch.empty(0, 5)).shape == (0, 5)
    assert torch.equal(quantizer(torch.zeros(2, 5)), torch.zeros(2, 5))
    assert bool(quantizer(torch.tensor([[1.0, float("nan")]])).isnan().any())
    assert quantizer(torch.randn(2, 5).half()).dtype == torch.float16


def test_gradients_pass_straight_through() -> None:
    inputs = some_inputs(4, 6).requires_grad_()
    (InputQuantizer(activations=Activations(bits=4))(inputs) * 3).sum().backward()
    assert inputs.grad is not None
    assert torch.equal(inputs.grad, torch.full((4, 6), 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ends", [(0.0, 0.0), (0.0, 1e-30), (-3.0, 0.0), (2.0, 5.0)])
def test_a_stored_scale_is_positive_in_its_type(dtype: torch.dtype, ends: tuple[float, float]) -> None:
    for zero_point in (False, True):
        activations = Activations(dynamic=False, granularity="tensor", zero_point=zero_point)
        fixed = InputScale.spanning(*ends, activations, dtype)
        assert fixed.scale.dtype == dtype
        assert float(fixed.scale) > 0


@pytest.mark.parametrize("zero_point", [False, True])
def test_scheme_and_state_come_back(zero_point: bool) -> None:
    assert SCHEME.activations is not None
    apart = replace(SCHEME, activations=replace(SCHEME.activations, outliers=0.002))
    assert Scheme.from_dict(apart.to_dict()) == apart
    assert "0.2% kept apart" in apart.describe()
    scheme = replace(SCHEME, activations=replace(SCHEME.activations, zero_point=zero_point))
    assert Scheme.from_dict(scheme.to_dict()) == scheme
    assert "inputs int8 static" in scheme.describe()
    weight = torch.randn(5, 13)
    made = quantize(weight, torch.full((5, 1), 0.02), None, scheme)
    fixed = InputScale.spanning(-1.0, 2.0, scheme.activations or Activations(), torch.float32)
    made = replace(made, input_scale=fixed)
    for storage in ("pack-quantized", "int-quantized"):
        state = made.to_state(storage)
        back = type(made).from_state(state, scheme, storage)
        assert back.input_scale is not None
        assert torch.equal(back.input_scale.scale, fixed.scale)
        assert (back.input_scale.zero_point is None) == (not zero_point)
        assert sum(t.nbytes for t in state.values()) == made.nbytes(storage)
        plain = replace(scheme, activations=None)
        assert made.nbytes(storage) - plain.stored_bytes((5, 13), storage) == 4 + zero_point


def test_damaged_input_scales_are_refused() -> None:
    made = quantize(torch.randn(5, 13), torch.full((5, 1), 0.02), None, SCHEME)
    with pytest.raises(CheckpointError, match="input_scale is missing"):
        type(made).from_state(made.to_state(), SCHEME)
    for bad in (0.0, -1.0, float("nan")):
        state = {**made.to_state(), "input_scale": torch.tensor([bad])}
        with pytest.raises(CheckpointError, match="a scale is above 0"):
            type(made).from_state(state, SCHEME)


def test_the_unit_of_groups_is_stored_and_checked() -> None:
    activations = Activations(bits=4, granularity="tensor_group", grid="float")
    scheme = Scheme(grid=uniform(8), granularity="channel", activations=activations)
    assert scheme.has_input_scale
    assert Scheme.from_dict(scheme.to_dict()) == scheme
    fixed = InputScale.spanning(-1.0, 2.0, activations, torch.bfloat16)
    made = replace(quantize(torch.randn(5, 13), torch.full((5, 1), 0.02), None, scheme), input_scale=fixed)
    state = made.to_state()
    assert state["input_global_scale"].tolist() == [6 * 448 / 2]
    assert sum(t.nbytes for t in state.values()) == made.nbytes()
    back = type(made).from_state(state, scheme)
    assert back.input_quantizer is not None
    inputs = some_inputs(4, 13)
    assert torch.equal(back.input_quantizer(inputs), InputQuantizer(activations=activations, fixed=fixed)(inputs))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match=r"input_global_scale is .*a scale is above 0"):
            type(made).from_state({**state, "input_global_scale": torch.tensor([bad])}, scheme)
    with pytest.raises(CheckpointError, match="input_global_scale is missing"):
        type(made).from_state({name: t for name, t in state.items() if name != "input_global_scale"}, scheme)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"granularity": "channel"}, "inside the sum of a product"),
        ({"granularity": "row"}, "unknown activation_granularity 'row'"),
        ({"dynamic": False}, "nobody has seen yet"),
        ({"bits": 9}, "integers from 2 to 8"),
        ({"width": 8}, "unknown key of activations 'width'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_reason(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        Activations.from_dict(fields)
