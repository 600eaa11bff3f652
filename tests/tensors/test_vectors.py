"""Vector codes: what is stored comes back, counts to the byte, and is refused where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fettle.errors import CheckpointError, RecipeError
from fettle.tensors.vectors import VectorScheme, VectorTensor
from fettle.tensors.weights import kernel_format, scheme_from_dict, weight_from_state


def example(rows: int, columns: int, scheme: VectorScheme, seed: int = 0) -> VectorTensor:
    """Any codes with any scales."""
    generator = torch.Generator().manual_seed(seed)
    codes = [
        torch.randint(2**book.code_bits, (rows, scheme.vector_count(columns)), generator=generator)
        for book in scheme.stages
    ]
    scale = torch.rand(scheme.scale_shape((rows, columns)), generator=generator) + 0.5
    return VectorTensor(
        codes=torch.stack(codes, -1).int(),
        scale=scale.to(scheme.torch_scale_dtype).float(),
        shape=(rows, columns),
        scheme=scheme,
        tensor_scale=torch.tensor([0.125]) if scheme.has_tensor_scale else None,
    )


schemes = st.builds(
    VectorScheme,
    bits=st.integers(1, 4),
    group_size=st.sampled_from([None, 8, 24, 64]),
    scale_dtype=st.sampled_from(["float16", "bfloat16", "float32", "float8_e4m3fn"]),
)


@settings(max_examples=40, deadline=None)
@given(schemes, st.integers(1, 5), st.integers(1, 70))
def test_state_and_scheme_come_back(scheme: VectorScheme, rows: int, columns: int) -> None:
    weight = example(rows, columns, scheme)
    again = weight_from_state(weight.to_state(), scheme_from_dict(scheme.to_dict()), "pack-quantized")
    assert isinstance(again, VectorTensor)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.dequantize(), weight.dequantize())
    state = weight.to_state()
    assert sum(tensor.nbytes for tensor in state.values()) == weight.nbytes()
    assert {n: (t.dtype, tuple(t.shape)) for n, t in state.items()} == scheme.state_spec((rows, columns))


def test_values_are_sums_of_entries_times_scales() -> None:
    scheme = VectorScheme(bits=4, group_size=8)
    weight = example(2, 20, scheme)
    values = weight.dequantize()
    first, second = scheme.stages
    for row in range(2):
        for column in range(20):
            eight, place = divmod(column, 8)
            codes = weight.codes[row, eight]
            units = first.entries(codes[0])[place] + second.entries(codes[1])[place] / 3.45
            assert values[row, column] == pytest.approx(float(units * weight.scale[row, eight]), rel=1e-6)


def test_bytes_are_those_of_a_file(tmp_path: Path) -> None:
    scheme = VectorScheme(bits=2, scale_dtype="float16")
    weight = example(64, 172, scheme)
    save_file(weight.to_state(), tmp_path / "w.safetensors")
    with (tmp_path / "w.safetensors").open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    assert (tmp_path / "w.safetensors").stat().st_size - 8 - header == weight.nbytes()
    assert scheme.stored_bytes((64, 172)) == 64 * 22 * 2 + 64 * 2 + 16
    assert scheme.bits_per_weight((256, 256)) == 2 + 16 / 256 + 128 / 65_536


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 5}, "allowed: 1, 2, 3, 4"),
        ({"bits": 2, "group_size": 12}, "multiples of 8"),
        ({"bits": 2, "group_size": 0}, "multiples of 8"),
        ({"bits": 2, "scale_dtype": "float8_e8m0fnu"}, "scale_dtype of vector codes"),
        ({"bits": 2, "grid": "uniform"}, "key of a scheme of vector codes"),
    ],
)
def test_impossible_schemes(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        scheme_from_dict({"kind": "vector", **fields})


def test_unknown_kinds_and_storages_are_refused() -> None:
    with pytest.raises(RecipeError, match="did you mean 'vector'"):
        scheme_from_dict({"kind": "vectors"})
    with pytest.raises(RecipeError, match="holds no vector codes"):
        VectorScheme(bits=2).check_storage("int-quantized")
    assert kernel_format(VectorScheme(bits=2), "pack-quantized") == "vector-codes"


@pytest.mark.parametrize(("name", "message"), [("weight_packed", "missing"), ("weight_shape", "says the shape")])
def test_damage_is_named(name: str, message: str) -> None:
    scheme = VectorScheme(bits=2)
    state = example(3, 16, scheme).to_state()
    del state[name]
    with pytest.raises(CheckpointError, match=message):
        VectorTensor.from_state(state, scheme)
    state = example(3, 16, scheme).to_state() | {"weight_scale": torch.ones(2, 1)}
    with pytest.raises(CheckpointError, match="weight_scale is"):
        VectorTensor.from_state(state, scheme)
