"""The native kernels against the torch reference: every format, odd sizes, all instruction sets of this processor."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from tests.tensors.test_scheme import random_quantized
from torch import Tensor

from fettle.errors import CheckpointError
from fettle.kernels import native
from fettle.tensors import Scheme, SparseScheme, uniform
from fettle.tensors.grid import Grid
from fettle.tensors.levels import named
from fettle.tensors.packed import PackedTensor, can_stay_packed
from fettle.tensors.quantized import QuantizedTensor

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="the native data plane is not built")

SHAPES = [(1, 1), (13, 172), (29, 640)]
GRIDS = [
    named("binary"), named("ternary"), *map(uniform, range(2, 9)), named("normal_float", 4),
    named("normal_float", 3), named("float", 4), named("power_of_two", 4),
    named("normal_float", 6), named("float", 8), named("learned", 3),
]  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> Any:
    return native.plane().Pool(2)


def kernels() -> list[str]:
    there: list[str] = native.plane().features()["available"]
    return there


def scheme_of(grid: Grid, group: int | None, zero_point: bool = False, scale: str = "float32") -> Scheme:
    return Scheme(
        grid=grid,
        granularity="channel" if group is None else "group",
        group_size=group,
        zero_point=zero_point,
        scale_dtype=scale,
    )


def units_of(grid: Grid) -> tuple[Tensor, float, float]:
    """Level → unit as integer kernels have it [2**bits], the unit of zero, and a unit's size; see native/formats."""
    levels = np.array(grid.levels, np.float32)
    gaps = np.diff(levels)
    if np.array_equal(levels[0] + gaps[0] * np.arange(len(levels), dtype=np.float32), levels):
        return torch.arange(256).float(), float(-levels[0] / gaps[0]), float(gaps[0])
    span, size = levels[-1] - levels[0], gaps.min()
    counts = (levels - levels[0]) / size
    if not (span <= size * 127 and np.array_equal(counts, np.rint(counts))):
        size = span / np.float32(127)
    units = torch.tensor(np.floor((levels - levels[0]) / size + 0.5))
    return torch.cat((units, units[-1:].expand(256 - len(units)))), float(-levels[0] / size), float(size)


def integer_reference(weight: QuantizedTensor, inputs: Tensor, block: int) -> Tensor:
    """What the integer kernels compute, in float64 but for the rounding of the inputs, which is theirs to the bit."""
    width = weight.scheme.group_width(weight.shape[1])
    units, zero, size = units_of(weight.scheme.grid)
    total = torch.zeros(len(inputs), weight.shape[0], dtype=torch.float64)
    for group in range(weight.scale.shape[1]):
        for start in range(group * width, min((group + 1) * width, weight.shape[1]), block):
            columns = slice(start, min(start + block, (group + 1) * width, weight.shape[1]))
            part = inputs[:, columns]
            top = part.abs().amax(1, keepdim=True)
            codes = (part * torch.where(top > 0, torch.tensor(127.0) / top, 0)).round()
            zeros = (
                torch.full((1, 1), zero)
                if weight.zero_point is None
                else units[weight.zero_point[:, group : group + 1].long()]
            )
            centred = (units[weight.codes[:, columns].long()] - zeros).double()  # [out, n]
            product = codes.double() @ centred.T
            scales = weight.scale[:, group].double() * size
            total += product * scales * (top / 127).double()
    return total * (1.0 if weight.tensor_scale is None else 1 / float(weight.tensor_scale))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.name}{grid.bits}")
def test_float_inputs_give_the_reference(grid: Grid, shape: tuple[int, int], pool: Any) -> None:
    for group, scale in ((32, "float32"), (16, "bfloat16"), (24, "float16"), (None, "float32"), (128, "float8_e4m3fn")):
        zero_point = grid.is_uniform and group == 24
        weight = random_quantized(scheme_of(grid, group, zero_point, scale), shape)
        matrix = native.coded_matrix(weight, pool)
        for tokens in (1, 5):
            inputs = torch.randn(tokens, shape[1])
            dense = weight.dequantize()
            expected = inputs.double() @ dense.double().T
            bound = 2e-6 * (inputs.abs() @ dense.abs().T) + 1e-6  # a sum in float32 errs by its terms' size
            for name in kernels():
                outputs = torch.from_numpy(matrix.multiply(inputs.numpy(), pool, False, name))
                assert ((outputs - expected).abs() <= bound).all(), (group, scale, name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "grid",
    [g for g in GRIDS if not g.is_learned and (g.bits <= 4 or g.is_uniform)],
    ids=lambda grid: f"{grid.name}{grid.bits}",
)
def test_integer_inputs_give_the_sums_of_rounded_inputs(grid: Grid, shape: tuple[int, int], pool: Any) -> None:
    torch.manual_seed(0)
    for group, scale in (
        (32, "float32"),
        (16, "bfloat16"),
        (24, "float16"),
        (None, "float32"),
        (128, "float8_e4m3fn"),
        (64, "float32"),
    ):
        zero_point = grid.is_uniform and group in (24, 64)
        weight = random_quantized(scheme_of(grid, group, zero_point, scale), shape)
        matrix = native.coded_matrix(weight, pool)
        found = []
        for tokens in (1, 3, 5, 9):
            inputs = torch.randn(tokens, shape[1])
            inputs[0] *= 0 if tokens == 3 else 1
            expected = integer_reference(weight, inputs, matrix.block)
            size = integer_reference(weight, inputs, matrix.block).abs().max()
            for name in kernels():
                outputs = torch.from_numpy(matrix.multiply(inputs.numpy(), pool, True, name))
                found.append((outputs - expected).abs().max() / (size + 1e-3))
        assert max(found) < 3e-5, (group, scale, max(found))


def test_a_token_does_not_depend_on_the_others(pool: Any) -> None:
    one = native.plane().Pool(1)
    for bits in (2, 4, 8):
        weight = random_quantized(scheme_of(uniform(bits), 32), (40, 320))
        matrix, inputs = native.coded_matrix(weight, pool), torch.randn(27, 320).numpy()
        for integer, name in itertools.product((True, False), kernels()):
            together = matrix.multiply(inputs, pool, integer, name)
            alone = np.concatenate([matrix.multiply(inputs[i : i + 1], pool, integer, name) for i in range(27)])
            assert np.array_equal(together, alone), (bits, name)
            chunks = [matrix.multiply(inputs[a:b], pool, integer, name) for a, b in ((0, 7), (7, 9), (9, 27))]
            assert np.array_equal(together, np.concatenate(chunks)), (bits, name)
            assert np.array_equal(together, matrix.multiply(inputs, one, integer, name)), (bits, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_are_multiplied_as_they_are(dtype: torch.dtype, pool: Any) -> None:
    for shape in SHAPES:
        values, inputs = torch.randn(shape).to(dtype), torch.randn(6, shape[1])
        matrix = native.dense_matrix(values, pool)
        for name in kernels():
            outputs = torch.from_numpy(matrix.multiply(inputs.numpy(), pool, True, name))
            torch.testing.assert_close(outputs, inputs @ values.float().T, rtol=1e-5, atol=1e-4)
            assert np.array_equal(matrix.row(shape[0] - 1, name)[0], values[-1].float().numpy())


@pytest.mark.parametrize("shape", [*SHAPES, (16, 96)], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.name}{grid.bits}")
def test_packed_codes_give_what_unpacked_ones_give(grid: Grid, shape: tuple[int, int], pool: Any) -> None:
    inputs = torch.randn(3, shape[1]).numpy()
    for group, scale in ((32, "float16"), (24, "float32"), (5, "bfloat16"), (None, "float32")):
        scheme = scheme_of(grid, group, grid.is_uniform and group == 24, scale)
        if not can_stay_packed(scheme, "pack-quantized") or not native.runs_as_codes(scheme):
            assert grid.is_learned or grid.bits > 4
            continue
        weight = random_quantized(scheme, shape)
        packed = PackedTensor.from_state(weight.to_state(), scheme)
        for integer in (True, False):
            expected = native.coded_matrix(weight, pool).multiply(inputs, pool, integer)
            assert np.array_equal(native.packed_matrix(packed, pool).multiply(inputs, pool, integer), expected)
        some = native.packed_matrix(packed.rows(slice(0, 1)), pool).multiply(inputs, pool, True)
        assert np.array_equal(some, native.coded_matrix(weight, pool).multiply(inputs, pool, True)[:, :1])


def test_a_code_without_a_level_is_damage(pool: Any) -> None:
    weight = random_quantized(scheme_of(named("ternary"), 32), (9, 64))
    state = weight.to_state()
    state["weight_packed"][8, 3] = -1  # codes of 3, and ternary has three levels
    with pytest.raises(CheckpointError, match="a code is 3, and there are 3 levels"):
        native.packed_matrix(PackedTensor.from_state(state, weight.scheme), pool)


def test_a_remainder_is_part_of_the_values(pool: Any) -> None:
    scheme = Scheme(grid=uniform(4), granularity="group", group_size=32, remainder=SparseScheme(share=0.1))
    weight, inputs = random_quantized(scheme, (9, 70)), torch.randn(3, 70)
    outputs = torch.from_numpy(native.coded_matrix(weight, pool).multiply(inputs.numpy(), pool, True))
    torch.testing.assert_close(outputs, inputs @ weight.dequantize().T, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_is_refused(pool: Any) -> None:
    plane = native.plane()
    with pytest.raises(ValueError, match="at least one row"):
        plane.dense(np.zeros((0, 3), np.float32), "float32", pool)
    matrix = plane.dense(np.zeros((2, 3), np.float32), "float32", pool)
    with pytest.raises(ValueError, match="inputs have 4 columns"):
        matrix.multiply(np.zeros((1, 4), np.float32), pool, False)
    with pytest.raises(ValueError, match="no kernels called"):
        matrix.multiply(np.zeros((1, 3), np.float32), pool, False, "sse9")
    with pytest.raises(ValueError, match="no row 2"):
        matrix.row(2)
