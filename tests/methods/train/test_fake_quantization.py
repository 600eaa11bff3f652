"""Fake quantization: the file's values forward, LSQ's and BitNet's gradients backward, exact export."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from fettle.errors import RecipeError
from fettle.methods.quantize.sharing import choose_shared
from fettle.methods.train.fake_quantization import FakeQuantizedLinear, check_scheme, leaning_start, mean_scale
from fettle.tensors.activations import Activations, InputQuantizer
from fettle.tensors.levels import named
from fettle.tensors.quantized import QuantizedTensor
from fettle.tensors.scheme import Scheme


def scheme(grid: str = "uniform", bits: int | None = 2, **other: object) -> Scheme:
    fields = {"granularity": "group", "group_size": 8, "scale_dtype": "bfloat16", **other}
    return Scheme(grid=named(grid, bits), **fields)  # type: ignore[arg-type]


SCHEMES = {
    "2 bits": scheme(),
    "3 bits, zero point": scheme(bits=3, zero_point=True),
    "4 bits, a row": scheme(bits=4, granularity="channel", group_size=None),
    "normal float": scheme("normal_float", 3),
    "powers of two, a tensor": scheme("power_of_two", 3, granularity="tensor", group_size=None),
    "scales that are powers of two": scheme(bits=4, scale_dtype="float8_e8m0fnu"),
}


def weight(rows: int = 5, columns: int = 20) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def layer(found: Scheme, shrink: float = 0.5) -> FakeQuantizedLinear:
    """Ranges smaller than the weights' own, so that some are beyond the last level."""
    start = choose_shared(weight(), found, clip="none")
    made = FakeQuantizedLinear(weight(), None, found, "learned", start)
    with torch.no_grad():
        made.log_scale.fill_(torch.log(torch.tensor(shrink)))
    return made


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_computed_with_is_what_the_written_codes_decode_to(name: str) -> None:
    made = layer(SCHEMES[name])
    state = made.quantized().to_state()
    decoded = QuantizedTensor.from_state(state, SCHEMES[name]).dequantize()
    assert torch.equal(made.values(), decoded)
    inputs = torch.randn(3, 20)
    assert torch.equal(made(inputs), linear(inputs, decoded))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_gradients_are_lsqs_entry_by_entry(name: str) -> None:
    found = SCHEMES[name]
    made = layer(found)
    pull = torch.randn(5, 20, generator=torch.Generator().manual_seed(1))
    (made.values() * pull).sum().backward()
    shared, values = made.shared, made.values().detach()
    levels = found.grid.levels
    clipped, per_scale = 0, torch.zeros(shared.scale.shape)
    for o in range(5):
        for i in range(20):
            r, g = (0 if found.granularity == "tensor" else o), i // (found.group_size or 20)
            s = float(shared.scale[r, g].float())
            zero = 0.0 if shared.zero_point is None else float(shared.zero_point[r, g]) + levels[0]
            low = levels[0] - zero - (levels[1] - levels[0]) / 2
            high = levels[-1] - zero + (levels[-1] - levels[-2]) / 2
            u = float(weight()[o, i]) / s
            inside = low <= u <= high
            clipped += not inside
            assert float(made.weight.grad[o, i]) == pytest.approx(float(pull[o, i]) if inside else 0.0)
            q = float(values[o, i]) / s
            per_scale[r, g] += float(pull[o, i]) * s * (q - u if inside else q)
    assert clipped
    assert torch.allclose(made.log_scale.grad, per_scale, rtol=1e-3, atol=1e-4)


def test_a_bias_is_added_and_learns() -> None:
    found, bias = scheme(bits=4), torch.arange(5.0)
    made = FakeQuantizedLinear(weight(), bias, found, "learned", choose_shared(weight(), found, clip="none"))
    inputs = torch.randn(3, 20)
    assert torch.equal(made(inputs), linear(inputs, made.values(), bias))
    made(inputs).sum().backward()
    assert made.bias is not None
    assert torch.equal(made.bias.grad, torch.full((5,), 3.0))


def test_a_scale_learns_what_shrinks_the_error() -> None:
    """Started four times too wide, the scale of one group finds its way back."""
    found = scheme(bits=4, granularity="tensor", group_size=None, scale_dtype="float32")
    made = FakeQuantizedLinear(weight(), None, found, "learned", choose_shared(weight(), found, clip="none"))
    with torch.no_grad():
        made.log_scale.fill_(torch.log(torch.tensor(4.0)))
    made.weight.requires_grad_(False)
    before = float((made.values().detach() - weight()).square().sum())
    optimizer = torch.optim.Adam([made.log_scale], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        (made.values() - weight()).square().sum().backward()
        optimizer.step()
    assert float((made.values().detach() - weight()).square().sum()) < before / 4


def test_ternary_is_bitnets_formula_and_its_gradient_passes_whole() -> None:
    found = scheme("ternary", None, granularity="tensor", group_size=None, scale_dtype="float32")
    made = FakeQuantizedLinear(weight(), None, found, "mean")
    gamma = weight().abs().mean()
    assert torch.allclose(made.values(), (weight() / gamma).round().clamp(-1, 1) * gamma, rtol=1e-6)
    pull = torch.randn(5, 20)
    (made.values() * pull).sum().backward()
    assert torch.equal(made.weight.grad, pull)
    assert made.log_scale is None


def test_binary_is_the_sign_times_the_mean_of_each_group() -> None:
    found = scheme("binary", None, scale_dtype="float32")
    made = FakeQuantizedLinear(weight(), None, found, "mean")
    expected = torch.cat([w.sign() * w.abs().mean(1, keepdim=True) for w in weight().split(8, dim=1)], 1)
    assert torch.allclose(made.values(), expected, rtol=1e-6)
    assert mean_scale(weight(), found).shape == (5, 3)


def test_inputs_are_rounded_as_a_loaded_model_rounds_them() -> None:
    found = scheme(bits=4, activations=Activations(dynamic=True, bits=4))
    made = FakeQuantizedLinear(weight(), None, found, "learned", choose_shared(weight(), found, clip="none"))
    inputs = torch.randn(6, 20, requires_grad=True)
    read = InputQuantizer(activations=found.activations)(inputs)
    assert torch.equal(made(inputs), linear(read, made.values()))
    made(inputs).sum().backward()
    assert torch.allclose(inputs.grad, made.values().sum(0).expand(6, -1), rtol=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_latent_weights_lean_to_the_original_inside_the_cells_of_their_codes(name: str) -> None:
    start = layer(SCHEMES[name]).quantized()
    original = weight() * 1.3
    latent = leaning_start(start, original)
    made = FakeQuantizedLinear(latent, None, SCHEMES[name], "learned", start.shared)
    assert torch.equal(made.quantized().codes, start.codes)
    assert float((latent - original).abs().sum()) < float((start.dequantize() - original).abs().sum())
    assert torch.equal(leaning_start(start, None), start.dequantize())


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(RecipeError, match="learned levels have no scale"):
        check_scheme(scheme("learned", 3), "learned")
    with pytest.raises(RecipeError, match="has no zero point"):
        check_scheme(scheme(bits=2, zero_point=True), "mean")
    unit = Activations(bits=4, granularity="tensor_group", grid="float")
    with pytest.raises(RecipeError, match="nothing in it can learn"):
        check_scheme(scheme(activations=unit), "learned")
    with pytest.raises(RecipeError, match="codes and their scales alone"):
        check_scheme(scheme(bits=4, scale_dtype="float8_e4m3fn"), "learned")
