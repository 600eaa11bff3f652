"""Fake quantization with vector codes: the file's values forward, straight-through gradients, exact export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import fettle
from fettle.methods.quantize.soft_vectors import COVERING_RADIUS
from fettle.methods.quantize.vector_sweep import StoredScales, as_tensor
from fettle.methods.train import Qat
from fettle.methods.train.curve import Curve
from fettle.methods.train.fake_vectors import FakeVectorLinear
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import load
from fettle.models.storage import stored_schemes
from fettle.pipeline.recipe import parse_recipe
from fettle.tensors.vectors import VectorScheme, VectorTensor, scaled, units_of

Trained = Callable[..., tuple[Path, Curve]]
SCHEMES = {
    "2 bits, a row": VectorScheme(bits=2),
    "1 bit, groups": VectorScheme(bits=1, group_size=8, scale_dtype="bfloat16"),
    "3 bits": VectorScheme(bits=3, scale_dtype="float16"),
    "2 bits, small scales": VectorScheme(bits=2, scale_dtype="float8_e4m3fn"),
}
SHAPE = (5, 20)


def start(scheme: VectorScheme) -> VectorTensor:
    generator = torch.Generator().manual_seed(0)
    books = scheme.stages
    codes = [torch.randint(2**book.code_bits, (SHAPE[0], 3), generator=generator) for book in books]
    scales = StoredScales.up_to(torch.tensor(1.0), scheme)
    scale = scales.rounded(0.05 + 0.1 * torch.rand(scheme.scale_shape(SHAPE), generator=generator))
    return as_tensor(torch.stack(codes, -1).int(), scale, SHAPE, scheme, scales)


def moved(scheme: VectorScheme, by: float = 0.06) -> FakeVectorLinear:
    """Weights that have left some of their entries, and scales that have grown."""
    layer = FakeVectorLinear(start(scheme), None)
    with torch.no_grad():
        layer.weight += by * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
        layer.log_scale.fill_(0.1)
    return layer


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_computed_with_is_what_the_written_codes_decode_to(name: str) -> None:
    layer = moved(SCHEMES[name])
    decoded = VectorTensor.from_state(layer.quantized().to_state(), SCHEMES[name]).dequantize()
    assert torch.equal(layer.values(), decoded)
    inputs = torch.randn(3, SHAPE[1])
    assert torch.equal(layer(inputs), linear(inputs, decoded))
    assert not torch.equal(layer.quantized().codes, start(SCHEMES[name]).codes)


@pytest.mark.parametrize("name", SCHEMES)
def test_nothing_learned_gives_the_codes_of_the_start(name: str) -> None:
    """Also with weights that lean to an original that lies in other cells."""
    found = start(SCHEMES[name])
    original = found.dequantize() + 0.2 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    for given in (None, original):
        made = FakeVectorLinear(found, None, given).quantized()
        assert torch.equal(made.codes, found.codes)
        assert torch.equal(made.scale, found.scale)
    leaning = FakeVectorLinear(found, None, original).weight
    before, after = (found.dequantize() - original).norm(), (leaning - original).norm()
    assert after < before


@pytest.mark.parametrize("name", SCHEMES)
def test_the_gradients_are_straight_through_inside_of_the_cell(name: str) -> None:
    scheme = SCHEMES[name]
    layer = moved(scheme, by={1: 0.06, 2: 0.2, 3: 0.1}[scheme.bits])
    pull = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    (layer.values() * pull).sum().backward()
    found, weights = layer.quantized(), layer.weight.detach()
    scale = found.scale if found.tensor_scale is None else found.scale * found.tensor_scale
    units = units_of(found.codes, scheme)
    values = scaled(units, scale, scheme)
    beyond = units_of(start(scheme).codes, scheme)  # where the start's entries reach over the row's end
    wanted_scale, clipped, passed = torch.zeros(scale.shape), 0, 0
    for o in range(SHAPE[0]):
        for j in range(3):
            columns = range(8 * j, min(8 * j + 8, SHAPE[1]))
            s = float(scale[o, 8 * j // (scheme.group_size or 24)])
            off = torch.zeros(8)
            for k in range(8):
                column = 8 * j + k
                place = float(weights[o, column]) / s if column < SHAPE[1] else beyond[o, column]
                off[k] = place - units[o, column]
            inside = float(off.norm()) <= COVERING_RADIUS * min(scheme.ratios)
            passed, clipped = passed + inside, clipped + (not inside)
            for i in columns:
                assert float(layer.weight.grad[o, i]) == pytest.approx(float(pull[o, i]) * inside)
                less = float(weights[o, i]) if inside else 0.0
                wanted_scale[o, 8 * j // (scheme.group_size or 24)] += float(pull[o, i]) * (float(values[o, i]) - less)
    assert clipped
    assert passed
    torch.testing.assert_close(layer.log_scale.grad, wanted_scale, rtol=1e-3, atol=1e-4)


def vector_codes(model: Path, output: Path) -> Path:
    """Vector codes in the attention, levels with zero points elsewhere."""
    roles = {"vectors": ["query", "key", "value", "output"], "levels": ["gate", "up", "down"]}
    steps = [
        {"method": "residual_codebooks", "bits": 2, "where": {"role": roles["vectors"]}},
        {"method": "round_to_nearest", "bits": 2, "group_size": 16, "where": {"role": roles["levels"]}},
    ]
    calibration = {"windows": 4, "length": 32}
    recipe = parse_recipe({"name": "mixed", "steps": steps, "calibration": calibration}, "test")
    fettle.compress(model, output, recipe, evaluate=False)
    return output


def test_a_mix_with_vector_codes_goes_on(tiny_llama: Path, trained: Trained, tmp_path: Path) -> None:
    """No step size: the same file; steps counted in levels: both kinds of codes move, and the loss falls."""
    base = vector_codes(tiny_llama, tmp_path / "base")
    still, _ = trained(Qat, base, tiny_llama, learning_rate=0.0, steps=1)
    fields = {"learning_rate": 0.1, "scale_rate": 0.02, "rate_in": "levels", "keep": "last"}
    after, curve = trained(Qat, base, tiny_llama, steps=20, windows=32, look_every=10, **fields)
    before, same, new = (Checkpoint.open(folder) for folder in (base, still, after))
    assert before.entries.keys() == same.entries.keys() == new.entries.keys()
    assert all(torch.equal(before.read(name), same.read(name)) for name in before.entries)
    codes = [name for name in before.entries if name.endswith("weight_packed")]
    assert all(not torch.equal(before.read(name), new.read(name)) for name in codes)
    schemes = [stored_schemes(found, read_anatomy(found)) for found in (before, new)]
    assert schemes[0] == schemes[1]
    assert curve.held_back[-1][1] < 0.9 * curve.held_back[0][1]
    logits: Tensor = load(after).model(torch.arange(2, 22).unsqueeze(0)).logits
    assert torch.isfinite(logits).all()


def test_the_tensor_scale_goes_where_the_weights_go() -> None:
    layer = FakeVectorLinear(start(SCHEMES["2 bits, small scales"]), None)
    assert layer._scales.unit is not None
    there = layer.to("meta")
    assert there._scales.unit is not None
    assert there._scales.unit.device == there.weight.device == torch.device("meta")
