"""Pruned weights: bits by hand, states there and back, bytes as stored, products as the dense ones, damage named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import linear

from fettle.errors import CheckpointError, RecipeError
from fettle.kernels import masked as kernel
from fettle.kernels.masked import masked_linear
from fettle.layers import QuantizedLinear
from fettle.methods.prune.selection import kept_by_score
from fettle.tensors import MaskedScheme, MaskedTensor, Scheme, uniform
from fettle.tensors.bitmask import pack_mask, unpack_mask
from fettle.tensors.levels import named
from fettle.tensors.patterns import parse_pattern
from fettle.tensors.quantized import QuantizedTensor
from fettle.tensors.weights import scheme_from_dict

CODES = Scheme(grid=uniform(3), granularity="group", group_size=20, zero_point=True, scale_dtype="bfloat16")
LEARNED = Scheme(grid=named("learned", 2), granularity="channel", scale_dtype="float16")
CASES: list[tuple[str, tuple[int, int], float, Scheme | None]] = [
    ("layer", (7, 172), 0.5, None),
    ("layer", (5, 33), 0.9, CODES),
    ("row", (6, 20), 0.3, CODES),
    ("2:4", (5, 172), 0.5, None),
    ("2:4", (5, 20), 0.5, CODES),
    ("4:8", (3, 40), 0.5, LEARNED),
    ("4x4", (8, 172), 0.5, None),
    ("2x5", (6, 40), 0.4, CODES),
    ("layer", (1, 1), 0.5, None),
]
every_case = pytest.mark.parametrize(("pattern", "shape", "sparsity", "codes"), CASES)


def pruned(pattern: str, shape: tuple[int, int], sparsity: float, codes: Scheme | None, seed: int = 0) -> MaskedTensor:
    generator = torch.Generator().manual_seed(seed)
    scheme = MaskedScheme(pattern=pattern, sparsity=sparsity, values=codes, value_dtype="bfloat16")
    weight = torch.randn(shape, generator=generator)
    kept = kept_by_score(weight.square(), scheme.shape_of_mask, sparsity)
    if codes is None:
        return MaskedTensor.of(weight, kept, scheme)
    rows, groups = codes.scale_shape(shape)
    found = QuantizedTensor(
        codes=torch.randint(0, 2**codes.grid.bits, shape, generator=generator).to(torch.uint8),
        scale=torch.ones(rows, groups, dtype=codes.value_dtype) * 0.25,
        zero_point=torch.full((rows, groups), 3, dtype=torch.uint8) if codes.zero_point else None,
        levels=torch.randn(rows, groups, 2**codes.grid.bits, generator=generator).to(codes.value_dtype)
        if codes.grid.is_learned
        else None,
        scheme=codes,
    )
    return MaskedTensor.of_codes(found, kept, scheme)


def test_bits_of_a_row_lie_from_the_least_significant_on() -> None:
    kept = torch.tensor([[1, 0, 1, 0, 0, 0, 0, 1, 1, 1]], dtype=torch.bool)
    assert pack_mask(kept, parse_pattern("layer")).tolist() == [[0b10000101, 0b11]]


def test_two_of_four_are_two_indices_of_two_bits() -> None:
    kept = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1, 1]], dtype=torch.bool)
    first, second, third = 0 | 3 << 2, 1 | 2 << 2, 2 | 3 << 2
    assert pack_mask(kept, parse_pattern("2:4")).tolist() == [[first | second << 4, third]]


def test_a_block_is_one_bit() -> None:
    kept = torch.zeros(4, 6, dtype=torch.bool)
    kept[2:, 2:4] = True
    packed = pack_mask(kept, parse_pattern("2x2"))
    assert packed.tolist() == [[0], [0b010]]
    assert torch.equal(unpack_mask(packed, (4, 6), parse_pattern("2x2")), kept)


@every_case
def test_states_come_back_and_bytes_are_those_of_the_file(
    pattern: str, shape: tuple[int, int], sparsity: float, codes: Scheme | None, tmp_path: Path
) -> None:
    found = pruned(pattern, shape, sparsity, codes)
    state = found.to_state()
    spec = found.scheme.state_spec(shape)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == spec
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "x.safetensors")
    with (tmp_path / "x.safetensors").open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    assert (tmp_path / "x.safetensors").stat().st_size - 8 - header == found.nbytes()
    again = MaskedTensor.from_state(state, found.scheme)
    assert torch.equal(again.kept, found.kept)
    assert torch.equal(again.dequantize(), found.dequantize())
    assert int(found.kept.sum()) == found.scheme.kept_count(shape)
    assert bool((found.dequantize()[~found.kept] == 0).all())
    assert scheme_from_dict(found.scheme.to_dict()) == found.scheme


@every_case
@pytest.mark.parametrize("tile_weights", [64, 1 << 22])
def test_the_product_is_the_dense_one(
    pattern: str,
    shape: tuple[int, int],
    sparsity: float,
    codes: Scheme | None,
    tile_weights: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel, "TILE_WEIGHTS", tile_weights)
    found = pruned(pattern, shape, sparsity, codes)
    inputs, bias = torch.randn(2, 3, shape[1]), torch.randn(shape[0])
    expected = linear(inputs, found.dequantize(), bias)
    torch.testing.assert_close(masked_linear(inputs, found.to_state(), found.scheme, bias), expected)
    layer = QuantizedLinear.from_quantized(found, bias)
    torch.testing.assert_close(layer(inputs), expected)
    assert sum(buffer.nbytes for buffer in layer.buffers()) == found.nbytes()  # no dense copy anywhere
    assert "masked" in repr(layer) and torch.equal(layer.dequantize(), found.dequantize())


def test_tiles_dequantize_alike() -> None:
    for case in CASES:
        found = pruned(*case)
        tiles = [found.dequantize_tile(slice(row, row + 2)) for row in range(0, found.shape[0], 2)]
        assert torch.equal(torch.cat(tiles), found.dequantize())


def test_half_of_sixteen_bits_and_a_mask_are_nine() -> None:
    assert MaskedScheme(pattern="layer", sparsity=0.5, value_dtype="bfloat16").bits_per_weight((512, 512)) == (
        pytest.approx(9, abs=1e-3)
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("weight_mask"), "weight_mask is missing"),
        (lambda s: s["weight_mask"].fill_(255), "the mask keeps"),
        (lambda s: s.update(weight_values=s["weight_values"][:-1]), "weight_values is"),
        (lambda s: s.update(weight_values=s["weight_values"].float()), "weight_values is"),
        (lambda s: s["weight_shape"].fill_(-1), "weight_shape says"),
        (lambda s: s.pop("weight_shape"), "weight_shape says"),
    ],
)
def test_damage_is_named(change: Any, match: str) -> None:
    found = pruned("row", (4, 16), 0.5, None)
    state = found.to_state()
    change(state)
    with pytest.raises(CheckpointError, match=match):
        MaskedTensor.from_state(state, found.scheme)


def test_a_row_with_one_too_many_is_damage_though_the_sum_is_right() -> None:
    found = pruned("row", (2, 8), 0.5, None)
    state = found.to_state()
    state["weight_mask"].copy_(torch.tensor([[0b00011111], [0b00000111]]))
    with pytest.raises(CheckpointError, match="as many in each row"):
        MaskedTensor.from_state(state, found.scheme)


def test_indices_that_name_one_input_twice_are_damage() -> None:
    found = pruned("2:4", (2, 8), 0.5, None)
    state = found.to_state()
    state["weight_mask_indices"][0, 0] = 0
    with pytest.raises(CheckpointError, match="the mask keeps"):
        MaskedTensor.from_state(state, found.scheme)


@pytest.mark.parametrize(
    "fields",
    [
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"pattern": "2:4", "sparsity": 0.4},
        {"value_dtype": "int8"},
        {"pattern": "5"},
    ],
)
def test_schemes_that_cannot_be_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        MaskedScheme(**{"pattern": "layer", "sparsity": 0.5, **fields}).validate()
    with pytest.raises(RecipeError, match="key of a pruned"):
        MaskedScheme.from_dict({"pattern": "layer", "sparsity": 0.5, "value_dtype": "float32", "masks": 1})
