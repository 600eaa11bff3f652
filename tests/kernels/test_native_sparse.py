"""Pruned weights on the native plane: what stayed, at odd sizes, in every layout that skips, and when it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fettle.kernels import native
from fettle.kernels.native_sparse import dense_twin, masked_matrix, sparse_matrix
from fettle.tensors import MaskedScheme, MaskedTensor, Scheme, uniform
from fettle.tensors.grid import Grid
from fettle.tensors.levels import named
from fettle.tensors.quantized import QuantizedTensor

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="the native data plane is not built")

SHAPES = [(1, 1), (13, 172), (19, 641)]
GRIDS = [named("ternary"), *map(uniform, (2, 4, 5, 8)), named("normal_float", 4), named("float", 4)]
SPARSITIES = (0.3, 0.75, 0.97)


@pytest.fixture(scope="module")
def pool() -> Any:
    return native.plane().Pool(2)


def kernels() -> list[str]:
    best: str = native.plane().features()["instructions"]
    return ["portable", best] if best != "portable" else [best]


def pruned(
    grid: Grid | None,
    shape: tuple[int, int],
    sparsity: float,
    group: int | None = None,
    dtype: str = "float32",
    zero_point: bool = False,
    seed: int = 0,
) -> MaskedTensor:
    """Random codes (or numbers, without a grid) of which a random share went; the first row lost everything."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) >= sparsity
    kept[0] = shape == (1, 1)
    if grid is None:
        scheme = MaskedScheme(pattern="layer", sparsity=sparsity, value_dtype=dtype)
        return MaskedTensor.of(torch.randn(shape, generator=generator), kept, scheme)
    codes = Scheme(
        grid=grid,
        granularity="channel" if group is None else "group",
        group_size=group,
        scale_dtype=dtype,
        zero_point=zero_point,
    )
    groups = codes.scale_shape(shape)
    top = len(grid.levels)
    found = QuantizedTensor(
        codes=torch.randint(top, shape, generator=generator).to(torch.uint8),
        scale=(torch.rand(groups, generator=generator) + 0.5).to(codes.value_dtype),
        zero_point=torch.randint(top, groups, generator=generator).to(torch.uint8) if zero_point else None,
        levels=None,
        scheme=codes,
    )
    return MaskedTensor.of_codes(found, kept, MaskedScheme(pattern="layer", sparsity=sparsity, values=codes))


def close_to(outputs: Tensor, inputs: Tensor, dense: Tensor, slack: float) -> bool:
    """Within `slack` of the size of a sum's terms."""
    expected = inputs.double() @ dense.double().T
    bound = slack * (inputs.abs() @ dense.abs().T) + 1e-6
    return bool(((outputs - expected).abs() <= bound).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.name}{grid.bits}")
def test_codes_give_the_dense_products(grid: Grid, shape: tuple[int, int], pool: Any) -> None:
    for group, scale, sparsity in zip((32, None, 128), ("float16", "float32", "bfloat16"), SPARSITIES, strict=True):
        weight = pruned(grid, shape, sparsity, group, scale)
        sparse, dense = sparse_matrix(weight, pool), weight.dequantize()
        assert sparse is not None
        for name in kernels():
            for tokens in (1, 7, 9):
                inputs = torch.randn(tokens, shape[1])
                exact = torch.from_numpy(sparse.multiply(inputs.numpy(), pool, False, name))
                assert close_to(exact, inputs, dense, 2e-6), (group, name, tokens)
                rounded = torch.from_numpy(sparse.multiply(inputs.numpy(), pool, True, name))
                off = 0.0065 * dense.abs().sum(1)  # bytes for inputs, values not rounded to bfloat16; units of 7 bits
                if grid.name not in ("uniform", "ternary"):
                    off += float(weight.values.scale.max()) * max(grid.levels) / 254 * weight.kept.sum(1)
                bound = off * float(inputs.abs().max()) + 1e-6
                assert ((rounded - inputs @ dense.T).abs() <= bound).all(), (group, name, tokens)
            for row in {0, shape[0] - 1}:
                assert torch.equal(torch.from_numpy(sparse.row(row, name))[0], dense[row])


@pytest.mark.parametrize("grid", [uniform(4), uniform(8), uniform(3)], ids=lambda grid: f"{grid.bits}")
def test_whole_units_are_summed_exactly(grid: Grid, pool: Any) -> None:
    """Equal steps: what the dense kernel of the same codes gives, up to how it takes its zero point off."""
    for group in (32, 96, None):
        weight = pruned(grid, (21, 384), 0.8, group)
        sparse, dense = sparse_matrix(weight, pool), dense_twin(weight, pool)
        assert sparse is not None
        inputs = torch.randn(5, 384).numpy()
        for name in kernels():
            found = torch.from_numpy(sparse.multiply(inputs, pool, True, name))
            torch.testing.assert_close(
                found, torch.from_numpy(dense.multiply(inputs, pool, True, name)), rtol=2e-5, atol=2e-4
            )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_give_the_dense_products(shape: tuple[int, int], dtype: str, pool: Any) -> None:
    for sparsity in (*SPARSITIES, 0.999):  # gaps of more than 255 columns among them
        weight = pruned(None, shape, sparsity, dtype=dtype)
        sparse, dense = sparse_matrix(weight, pool), weight.dequantize()
        assert sparse is not None
        for name in kernels():
            for tokens in (1, 6, 11):
                inputs = torch.randn(tokens, shape[1])
                for integer in (False, True):
                    outputs = torch.from_numpy(sparse.multiply(inputs.numpy(), pool, integer, name))
                    assert close_to(outputs, inputs, dense, 2e-6), (name, tokens)
            assert torch.equal(torch.from_numpy(sparse.row(shape[0] - 1, name))[0], dense[-1])


@pytest.mark.parametrize("weight", [(uniform(4), 32), (named("normal_float", 4), 64), (uniform(8), None), (None, None)])
def test_a_token_is_the_same_alone_and_among_many(weight: tuple[Grid | None, int | None], pool: Any) -> None:
    grid, group = weight
    sparse = sparse_matrix(pruned(grid, (37, 512), 0.75, group), pool)
    assert sparse is not None
    inputs = torch.randn(13, 512).numpy()
    for name in kernels():
        for integer in (False, True):
            together = sparse.multiply(inputs, pool, integer, name)
            for token in range(13):
                assert (sparse.multiply(inputs[token : token + 1], pool, integer, name) == together[token]).all()


def test_what_has_no_sparse_kernel_stays_codes(pool: Any) -> None:
    odd = [
        pruned(uniform(4), (16, 160), 0.75, 32, zero_point=True),
        pruned(uniform(4), (16, 160), 0.75, 16),
        pruned(named("binary"), (16, 160), 0.75, 32),
    ]
    for weight in odd:
        assert sparse_matrix(weight, pool) is None
        matrix, dense, inputs = masked_matrix(weight, pool), weight.dequantize(), torch.randn(2, 160)
        assert close_to(torch.from_numpy(matrix.multiply(inputs.numpy(), pool, False)), inputs, dense, 2e-6)
        assert (matrix.nbytes < 16 * 160 * 4 * 0.3) == (0.0 in weight.values.scheme.grid.levels)  # type: ignore[union-attr]


def test_what_is_read_is_the_smaller(pool: Any) -> None:
    for grid, group, pays in (
        (uniform(4), 128, 0.9),
        (uniform(8), 128, 0.75),
        (None, None, 0.5),
        (uniform(2), 128, 1.0),
    ):
        dtype = "bfloat16" if grid is None else "float16"
        for sparsity in (0.1, 0.9):
            weight = pruned(grid, (64, 1024), sparsity, group, dtype)
            chosen, dense = masked_matrix(weight, pool), dense_twin(weight, pool)
            assert (chosen.nbytes < dense.nbytes) == (sparsity >= pays), (grid, sparsity)


def test_some_rows_are_their_rows(pool: Any) -> None:
    for weight in (pruned(uniform(4), (24, 96), 0.9, 32), pruned(None, (24, 96), 0.9)):
        dense, inputs = weight.dequantize(), torch.randn(3, 96)
        for rows in (slice(8, 21), [1, 5, 6, 23]):
            matrix = masked_matrix(weight, pool, rows)
            assert matrix.rows == len(dense[rows])
            assert close_to(torch.from_numpy(matrix.multiply(inputs.numpy(), pool, False)), inputs, dense[rows], 2e-6)


def test_arrays_that_do_not_fit_are_refused(pool: Any) -> None:
    codes = torch.zeros(4, 64, dtype=torch.uint8).numpy()
    scales = torch.ones(4, 2).numpy()
    make = native.plane().sparse_codes
    with pytest.raises(ValueError, match="as large as its codes"):
        make(codes, codes[:3], 4, 32, scales, "float32", list(uniform(4).levels), 1.0, pool)
    with pytest.raises(ValueError, match="without zero"):
        make(codes, codes, 1, 32, scales, "float32", [-1.0, 1.0], 1.0, pool)
    with pytest.raises(ValueError, match="too narrow"):
        make(codes, codes, 4, 16, torch.ones(4, 4).numpy(), "float32", list(uniform(4).levels), 1.0, pool)
    with pytest.raises(ValueError, match="1 scales a row for 2 groups"):
        make(codes, codes, 4, 32, torch.ones(4, 1).numpy(), "float32", list(uniform(4).levels), 1.0, pool)
