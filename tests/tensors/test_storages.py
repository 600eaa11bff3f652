"""Codes as the standard lays them out, against its own compressors on the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

from fettle.errors import CheckpointError, RecipeError
from fettle.methods.quantize.ranges import in_tensor_units
from fettle.methods.quantize.round_to_nearest import round_to_nearest
from fettle.models.storage.standard import inputs_arguments, weights_arguments
from fettle.tensors import Activations, QuantizedTensor, Scheme, uniform
from fettle.tensors.levels import named
from fettle.tensors.storages import FLOAT4, FLOAT8, pack_codes, unpack_codes

FP8_TENSOR = Scheme(grid=FLOAT8, granularity="tensor")
FP8_CHANNEL = Scheme(grid=FLOAT8, granularity="channel", scale_dtype="bfloat16")
FP8_GROUP = Scheme(grid=FLOAT8, granularity="group", group_size=16, scale_dtype="float16")
MXFP8 = Scheme(grid=FLOAT8, granularity="group", group_size=32, scale_dtype="float8_e8m0fnu")
MXFP4 = Scheme(grid=FLOAT4, granularity="group", group_size=32, scale_dtype="float8_e8m0fnu")
NVFP4 = Scheme(grid=FLOAT4, granularity="group", group_size=16, scale_dtype="float8_e4m3fn")
FLOATS = {
    "float-quantized, a tensor": (FP8_TENSOR, "float-quantized"),
    "float-quantized, a channel": (FP8_CHANNEL, "float-quantized"),
    "float-quantized, groups": (FP8_GROUP, "float-quantized"),
    "mxfp8-quantized": (MXFP8, "mxfp8-quantized"),
    "mxfp4-pack-quantized": (MXFP4, "mxfp4-pack-quantized"),
    "nvfp4-pack-quantized": (NVFP4, "nvfp4-pack-quantized"),
}


def a_weight(rows: int = 24, columns: int = 96) -> torch.Tensor:
    """Outliers, a group of zeros, and a row of nothing but tiny numbers."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.05
    weight[3, 7], weight[4, :32], weight[5] = 1.5, 0.0, 1e-6
    return weight


def standard_scheme(scheme: Scheme, storage: str) -> QuantizationScheme:
    return QuantizationScheme.model_validate(
        {
            "targets": ["Linear"], "weights": weights_arguments(scheme, storage), "format": storage,
            "input_activations": inputs_arguments(scheme.activations),
        }
    )  # fmt: skip


@pytest.mark.parametrize("case", FLOATS)
def test_tensors_and_values_are_those_of_the_standards_compressor(case: str) -> None:
    scheme, storage = FLOATS[case]
    weight = a_weight()
    assert scheme.storage_for((24, 96)) == storage
    ours = round_to_nearest(weight, scheme)
    state = ours.to_state(storage)
    standard, compressor = standard_scheme(scheme, storage), BaseCompressor.get_value_from_registry(storage)
    theirs = compressor.decompress(dict(state), standard)["weight"]
    assert torch.equal(theirs.float(), ours.dequantize())
    # What the standard makes of the same weight with the same scales. It writes -0 where we write 0, and rounds halves
    # to even patterns where we take the lower level, so the values are compared, and the bytes of values on the grid.
    scales = {"weight_scale": ours.scale.float().reshape(state["weight_scale"].shape)}
    if ours.tensor_scale is not None:
        scales["weight_global_scale"] = ours.tensor_scale
    again = compressor.compress({"weight": ours.dequantize(), **scales}, standard)
    code = "weight_packed" if "pack" in storage else "weight"
    assert again[code].dtype == state[code].dtype
    mended = QuantizedTensor.from_state({**state, code: again[code]}, scheme, storage)
    assert torch.equal(mended.codes, ours.codes)
    if storage != "float-quantized":
        assert again["weight_scale"].dtype == state["weight_scale"].dtype
        assert torch.equal(again["weight_scale"].view(torch.uint8), state["weight_scale"].view(torch.uint8))
    assert bool((ours.codes.float().std() > 0) & (theirs != 0).any())


@pytest.mark.parametrize("case", FLOATS)
def test_state_comes_back_to_the_byte(case: str) -> None:
    scheme, storage = FLOATS[case]
    ours = round_to_nearest(a_weight(), scheme)
    state = ours.to_state(storage)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == scheme.state_spec((24, 96), storage)
    assert sum(t.nbytes for t in state.values()) == ours.nbytes(storage) == scheme.stored_bytes((24, 96), storage)
    back = QuantizedTensor.from_state(state, scheme, storage)
    assert torch.equal(back.codes, ours.codes)
    assert torch.equal(back.dequantize(), ours.dequantize())


@pytest.mark.parametrize("grid", [FLOAT4, FLOAT8], ids=["e2m1", "e4m3"])
def test_every_pattern_is_the_number_that_torch_and_the_table_of_the_format_say(grid: Any) -> None:
    storage = "mxfp4-pack-quantized" if grid == FLOAT4 else "float-quantized"
    codes = torch.arange(grid.level_count, dtype=torch.uint8).repeat(2)[None]
    stored = next(iter(pack_codes(codes, grid, storage).values()))
    assert torch.equal(unpack_codes(stored, grid, storage, codes.shape[1]), codes)
    if grid == FLOAT8:
        assert torch.equal(stored.float()[0], torch.tensor(grid.levels).repeat(2))
        whole = torch.arange(256).byte().view(torch.float8_e4m3fn)[None]
        found = unpack_codes(whole, grid, storage, 256)[0]
        assert bool((found[whole[0].float().isnan()] == 255).all())  # which is no code
        assert found[128] == found[0] == grid.levels.index(0.0)  # -0
        return
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    low = torch.arange(16, dtype=torch.uint8)[None] | (1 << 4)  # each pattern on the left, a half on the right
    values = torch.tensor(grid.levels)[unpack_codes(low, grid, storage, 32)[0].int()]
    assert values[::2].tolist() == table + [-value for value in table]
    assert set(values[1::2].tolist()) == {0.5}


@pytest.mark.parametrize("preset", ["FP8", "FP8_DYNAMIC", "MXFP8A16", "MXFP4A16", "NVFP4A16", "W8A8"])
def test_the_words_are_those_of_the_standards_presets(preset: str) -> None:
    token, whole = Activations(grid="float"), Activations(grid="float", dynamic=False, granularity="tensor")
    schemes = {
        "FP8": (replace(FP8_TENSOR, activations=whole), "float-quantized"),
        "FP8_DYNAMIC": (replace(FP8_CHANNEL, activations=token), "float-quantized"),
        "MXFP8A16": (MXFP8, "mxfp8-quantized"),
        "MXFP4A16": (MXFP4, "mxfp4-pack-quantized"),
        "NVFP4A16": (NVFP4, "nvfp4-pack-quantized"),
        "W8A8": (Scheme(grid=uniform(8), granularity="channel", activations=Activations()), "int-quantized"),
    }
    scheme, storage = schemes[preset]
    expected = QuantizationScheme(targets=["Linear"], **PRESET_SCHEMES[preset])
    ours = standard_scheme(scheme, storage)
    for one, other in ((ours.weights, expected.weights), (ours.input_activations, expected.input_activations)):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            said = {k: v for k, v in one.model_dump().items() if k != "observer"}
            assert said == {k: v for k, v in other.model_dump().items() if k != "observer"}
    assert infer_module_format(torch.nn.Linear, expected).value == storage


def test_other_floats_and_short_groups_keep_the_recipes_storage() -> None:
    assert NVFP4.storage_for((4, 40)) == "pack-quantized"
    assert replace(NVFP4, group_size=32).storage_for((4, 64)) == "pack-quantized"
    assert Scheme(grid=named("float", 6), granularity="channel").storage_for((4, 64)) == "pack-quantized"
    assert FP8_TENSOR.storage_for((4, 40), "int-quantized") == "float-quantized"
    assert Scheme(grid=uniform(8), granularity="channel").storage_for((4, 40), "int-quantized") == "int-quantized"
    with pytest.raises(RecipeError, match=r"storage mxfp4-pack-quantized holds floats.*use storage: nvfp4"):
        NVFP4.check_storage("mxfp4-pack-quantized")


def test_damage_is_named() -> None:
    fp8 = round_to_nearest(a_weight(), FP8_CHANNEL).to_state("float-quantized")
    fp8["weight"].view(torch.uint8)[2, 2] = 0x7F
    with pytest.raises(CheckpointError, match="a code is 255"):
        QuantizedTensor.from_state(fp8, FP8_CHANNEL, "float-quantized")
    nv = round_to_nearest(a_weight(), NVFP4).to_state("nvfp4-pack-quantized")
    with pytest.raises(CheckpointError, match="weight_global_scale is 0"):
        QuantizedTensor.from_state({**nv, "weight_global_scale": torch.zeros(1)}, NVFP4, "nvfp4-pack-quantized")
    del nv["weight_global_scale"]
    with pytest.raises(CheckpointError, match="weight_global_scale is missing"):
        QuantizedTensor.from_state(nv, NVFP4, "nvfp4-pack-quantized")


def test_the_tensor_scale_is_the_standards_for_the_same_weight() -> None:
    from compressed_tensors.quantization.utils import generate_gparam

    weight = a_weight()
    found = in_tensor_units(weight, NVFP4, lambda units: round_to_nearest(units, replace(NVFP4, scale_dtype="float32")))
    assert found.tensor_scale is not None
    expected = generate_gparam(weight.min(), weight.max())
    torch.testing.assert_close(found.tensor_scale, expected.reshape(1))
    worse = replace(round_to_nearest(weight, NVFP4), tensor_scale=1 / found.tensor_scale)  # the other convention
    assert float((worse.dequantize() - weight).abs().max()) > 10 * float(weight.abs().max())
