"""Stored input scales that learn: the file's values, LSQ's gradients, the observer's start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fettle.errors import UsageError
from fettle.methods.quantize.histogram import Histogram
from fettle.methods.train import Qat
from fettle.methods.train.fake_inputs import LearnedInputs, observed_inputs
from fettle.models.loading import load
from fettle.tensors.activations import Activations, InputQuantizer, InputScale

FORMS = {
    "symmetric": Activations(dynamic=False, bits=4, granularity="tensor"),
    "zero point": Activations(dynamic=False, bits=4, granularity="tensor", zero_point=True),
    "floats": Activations(dynamic=False, bits=8, granularity="tensor", grid="float"),
    "outliers apart": Activations(dynamic=False, bits=4, granularity="tensor", outliers=0.01),
}


def inputs() -> Tensor:
    return torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(2)) * 2 + 0.5


def narrow(form: str) -> InputScale:
    """A range that leaves some inputs outside."""
    return InputScale.spanning(-1.5, 2.5, FORMS[form], torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_are_rounded_as_a_loaded_model_rounds_them(form: str) -> None:
    made = LearnedInputs(FORMS[form], narrow(form))
    with torch.no_grad():
        made.log_scale.fill_(0.3)
    read = InputQuantizer(activations=FORMS[form], fixed=made.stored())
    assert torch.equal(made(inputs()), read(inputs()))
    assert torch.allclose(made.stored().scale, narrow(form).scale * torch.tensor(0.3).exp())


@pytest.mark.parametrize("form", FORMS)
def test_the_gradients_are_lsqs_entry_by_entry(form: str) -> None:
    activations, start = FORMS[form], narrow(form)
    made, given = LearnedInputs(activations, start), inputs().requires_grad_(True)
    wanted = torch.randn(given.shape, generator=torch.Generator().manual_seed(3))
    (made(given) * wanted).sum().backward()
    scale = float(start.scale)
    point = 0 if start.zero_point is None else int(start.zero_point)
    low, high = activations.levels
    half = 0.5 if activations.grid == "uniform" else 0.0
    pull, beyond = 0.0, 0
    for place, value in enumerate(given.detach().flatten().tolist()):
        gradient = float(wanted.flatten()[place])
        unit = value / scale + point
        inside = low - half <= unit <= high + half
        beyond += not inside
        if inside:
            rounded = (float(activations.round_(torch.tensor([unit]))) - point) * scale
            pull += gradient * (rounded - value)
        elif not activations.outliers:
            pull += gradient * ((low if unit < low else high) - point) * scale
        expected = gradient if inside or activations.outliers else 0.0
        assert float(given.grad.flatten()[place]) == pytest.approx(expected)  # type: ignore[union-attr]
    assert beyond > 5
    assert float(made.log_scale.grad) == pytest.approx(pull, rel=1e-4, abs=1e-5)  # type: ignore[arg-type]


def test_a_scale_learns_what_shrinks_the_error() -> None:
    """From a range four times too wide and from one four times too narrow to nearly the best of a search."""
    given, activations = torch.randn(4096, generator=torch.Generator().manual_seed(0)), FORMS["symmetric"]

    def error(scale: Tensor) -> float:
        read = InputQuantizer(activations=activations, fixed=InputScale(scale=scale))
        return float((read(given) - given).square().mean())

    best = min(error(torch.tensor([size / 100])) for size in range(10, 100))
    for size in (1.6, 0.08):
        made = LearnedInputs(activations, InputScale(scale=torch.tensor([size])))
        optimizer = torch.optim.Adam([made.log_scale], lr=0.05)
        assert error(made.stored().scale) > 2 * best
        for _ in range(120):
            optimizer.zero_grad()
            (made(given) - given).square().mean().backward()
            optimizer.step()
        assert error(made.stored().scale) < 1.03 * best


def test_a_scale_is_positive_in_its_type_however_far_it_went() -> None:
    made = LearnedInputs(FORMS["symmetric"], InputScale(scale=torch.ones(1, dtype=torch.float16)))
    for far in (-100.0, 100.0):
        with torch.no_grad():
            made.log_scale.fill_(far)
        assert made.stored().scale.dtype == torch.float16
        assert torch.isfinite(made.stored().scale).all()
        assert float(made.stored().scale) > 0


def test_what_is_observed_are_the_inputs_of_the_training_text(tiny_llama: Path, text_file: Path) -> None:
    loaded = load(tiny_llama)
    linears = list(loaded.anatomy.linears())
    fields = Qat(text=str(text_file), length=16, bits=4)
    found = observed_inputs(loaded, linears, fields)
    assert found.keys() == {linear.name for linear in linears}
    seen = {name: Histogram.from_tensor(packed) for name, packed in found.items()}
    assert all(each.windows > 1 and each.low < 0 < each.high for each in seen.values())
    by_role = {linear.role: seen[linear.name] for linear in linears if "layers.0." in linear.name}
    assert by_role["query"].high == by_role["value"].high != by_role["down"].high
    assert observed_inputs(loaded, linears, fields)[linears[0].name].equal(found[linears[0].name])
    assert not loaded.model.get_submodule("model.layers.0.self_attn.q_proj")._forward_pre_hooks


def test_an_encoders_padding_counts_for_nothing(tiny_bert: Path, tmp_path: Path) -> None:
    loaded = load(tiny_bert)
    text = tmp_path / "lines.txt"
    text.write_text("import os\nimport re\n" * 30, encoding="utf-8")
    linears = list(loaded.anatomy.linears())
    counts = []
    for length in (24, 40):  # no line is that long: what the longer windows have more is padding
        found = observed_inputs(loaded, linears, Qat(text=str(text), length=length, bits=4))
        counts.append(int(Histogram.from_tensor(found[linears[0].name]).counts.sum()))
    assert counts[0] == counts[1] > 0


def test_a_model_without_tokenizer_is_refused(tiny_llama: Path, text_file: Path) -> None:
    loaded = replace(load(tiny_llama), tokenizer=None)
    with pytest.raises(UsageError, match="has no tokenizer files"):
        observed_inputs(loaded, list(loaded.anatomy.linears()), Qat(text=str(text_file), bits=4))
