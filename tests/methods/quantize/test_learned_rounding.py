"""Learned rounding: gradients against autograd, a block that is a formula, and what it promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from tests.methods.quantize.problems import random_weight
from torch import Tensor

from fettle.errors import UsageError
from fettle.methods.quantize.learned_rounding import LearnedRounding, RoundingTuner, split_windows
from fettle.methods.quantize.round_to_nearest import round_to_nearest
from fettle.methods.quantize.soft_codes import SoftCodes
from fettle.methods.registry import from_fields
from fettle.tensors import QuantizedTensor, Scheme, uniform
from fettle.tensors.grid import learned
from fettle.tensors.levels import named

SCHEMES = {
    "asymmetric": Scheme(grid=uniform(2), granularity="group", group_size=5, zero_point=True),
    "symmetric": Scheme(grid=uniform(3), granularity="channel"),
    "tensor": Scheme(grid=uniform(3), granularity="tensor", scale_dtype="bfloat16"),
    "normal float": Scheme(grid=named("normal_float", 3), granularity="group", group_size=8, scale_dtype="float16"),
    "learned": Scheme(grid=learned(2), granularity="channel"),
    "nv": Scheme(grid=named("float", 4), granularity="group", group_size=16, scale_dtype="float8_e4m3fn"),
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


class TwoLinears:
    """outputs = tanh(inputs · aᵀ) · bᵀ: a block as a formula."""

    def __init__(self, weights: Mapping[str, Tensor], windows: int = 9) -> None:
        generator = torch.Generator().manual_seed(5)
        self._inputs = [torch.randn(12, weights["a"].shape[1], generator=generator) * 2 for _ in range(windows)]
        self._targets = [self._run(inputs, weights) for inputs in self._inputs]
        self.asked: set[int] = set()

    @property
    def windows(self) -> int:
        return len(self._inputs)

    def _run(self, inputs: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return torch.tanh(inputs @ weights["a"].T) @ weights["b"].T

    def _error(self, weights: Mapping[str, Tensor], windows: Sequence[int]) -> Tensor:
        errors = [(self._run(self._inputs[w], weights) - self._targets[w]).square().mean() for w in windows]
        return torch.stack(errors).mean()

    def error(self, weights: Mapping[str, Tensor], windows: Sequence[int]) -> float:
        return float(self._error(weights, windows))

    def gradient(self, weights: Mapping[str, Tensor], windows: Sequence[int]) -> tuple[float, dict[str, Tensor]]:
        self.asked |= set(windows)
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        error = self._error(leaves, windows)
        found = torch.autograd.grad(error, list(leaves.values()))
        return float(error.detach()), dict(zip(leaves, found, strict=True))


def problem(scheme: Scheme) -> tuple[dict[str, Tensor], dict[str, QuantizedTensor], TwoLinears]:
    weights = {"a": random_weight(20, 24), "b": random_weight(16, 20, 1)}
    return weights, {n: round_to_nearest(w, scheme) for n, w in weights.items()}, TwoLinears(weights)


@every_scheme
def test_the_start_is_kept_until_the_first_step(scheme: Scheme) -> None:
    weights, start, _ = problem(scheme)
    for name, weight in weights.items():
        soft = SoftCodes(start[name], weight)
        assert torch.equal(soft.quantized().codes, start[name].codes)
        assert torch.equal(soft.values(), start[name].dequantize())


@every_scheme
def test_values_are_those_of_the_codes_after_any_step(scheme: Scheme) -> None:
    weights, start, _ = problem(scheme)
    soft = SoftCodes(start["a"], weights["a"])
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        soft.step_(torch.randn(20, 24, generator=generator), latent_rate=0.2, scale_rate=0.02)
    found = soft.quantized()
    assert torch.equal(found.dequantize(), soft.values())
    back = QuantizedTensor.from_state(found.to_state(), scheme)
    assert torch.equal(back.dequantize(), soft.values())
    assert not torch.equal(found.codes, start["a"].codes)


@every_scheme
def test_learning_lowers_the_error_on_windows_that_no_step_saw(scheme: Scheme) -> None:
    weights, start, block = problem(scheme)
    seen, kept = split_windows(block.windows)
    found = RoundingTuner(steps=60, batch_windows=4).tune(start, weights, block)
    assert block.asked <= set(seen)
    before = block.error({name: codes.dequantize() for name, codes in start.items()}, kept)
    after = block.error({name: codes.dequantize() for name, codes in found.items()}, kept)
    assert after < 0.97 * before
    assert all(found[name].scheme == scheme for name in found)


def test_a_scale_moves_against_its_slope_and_a_latent_too() -> None:
    scheme = SCHEMES["symmetric"]
    weights, start, _ = problem(scheme)
    soft = SoftCodes(start["a"], weights["a"])
    values = soft.values()
    before, latent = soft.shared.scale.clone(), soft.latent.clone()
    soft.step_(values, latent_rate=0.01, scale_rate=0.01)  # the slope of ½‖value‖²: everything should shrink
    assert bool((soft.shared.scale < before).all())
    moved = soft.latent - latent
    assert bool((moved.sign() == -values.sign()).all())


def test_latents_beyond_the_range_stay() -> None:
    scheme = SCHEMES["symmetric"]
    start = QuantizedTensor(
        codes=torch.tensor([[7, 0, 4]], dtype=torch.uint8), scale=torch.ones(1, 1), zero_point=None, scheme=scheme
    )
    soft = SoftCodes(start, torch.tensor([[9.0, -4.1, 0.2]]))
    soft.latent[0, 0] = 3.8  # more than half a level beyond the highest
    soft.step_(torch.ones(1, 3), latent_rate=0.25, scale_rate=0.0)
    assert soft.latent[0].tolist() == pytest.approx([3.8, -4.35, -0.05])


def test_what_does_not_help_is_not_kept() -> None:
    weights, start, block = problem(SCHEMES["symmetric"])
    found = RoundingTuner(steps=10, batch_windows=2, rounding_rate=16.0, scale_rate=0.1).tune(start, weights, block)
    _, kept = split_windows(block.windows)
    before = block.error({name: codes.dequantize() for name, codes in start.items()}, kept)
    assert block.error({name: codes.dequantize() for name, codes in found.items()}, kept) <= before


def test_the_same_seed_gives_the_same_codes() -> None:
    weights, start, block = problem(SCHEMES["asymmetric"])
    one, other = (RoundingTuner(steps=20, batch_windows=3).tune(start, weights, block) for _ in range(2))
    assert all(torch.equal(one[name].dequantize(), other[name].dequantize()) for name in one)


@pytest.mark.parametrize(("count", "kept"), [(1, [0]), (5, [4]), (8, [7]), (24, [7, 15, 23])])
def test_windows_held_back(count: int, kept: list[int]) -> None:
    seen, found = split_windows(count)
    assert found == kept
    assert seen == ([0] if count == 1 else [index for index in range(count) if index not in kept])


def test_codes_with_something_beside_them_are_refused() -> None:
    weight = random_weight(8, 40)
    for name in ("low_rank_correction", "sparse_outliers"):
        found = from_fields(name, {"solver": "round_to_nearest"}).compress(
            weight, {"gram": torch.eye(40)}, dtype="float32"
        )
        with pytest.raises(UsageError, match="cannot be learned"):
            SoftCodes(found, weight)


def test_its_start_has_the_same_scheme_and_asks_for_its_statistics() -> None:
    fields: dict[str, Any] = {"bits": 3, "group_size": 16, "asymmetric": True}
    assert LearnedRounding(**fields).needs() == ("gram", "drift")
    nearest = LearnedRounding(**fields, start="round_to_nearest")
    assert nearest.needs() == ()
    found = nearest.compress(random_weight(4, 20), {}, dtype="bfloat16")
    assert found.scheme == nearest.scheme("bfloat16")
