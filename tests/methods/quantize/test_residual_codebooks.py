"""Residual codebooks: what conformance asks of scalar methods, for vectors; the tuner; what it is better than."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests.methods.quantize.problems import correlated_gram, random_weight
from tests.methods.quantize.test_learned_rounding import TwoLinears
from torch import Tensor

from fettle.errors import NonFiniteError, RecipeError
from fettle.methods.quantize.errors import output_error, weight_error
from fettle.methods.quantize.learned_rounding import split_windows
from fettle.methods.quantize.residual_codebooks import ResidualCodebooks
from fettle.methods.quantize.soft_vectors import SoftVectors
from fettle.methods.registry import from_fields
from fettle.tensors.vectors import VectorTensor
from fettle.workers import Workers

FIELDS: list[dict[str, Any]] = [
    {"bits": 1, "scale_dtype": "float8_e4m3fn", "refine_passes": 1},
    {"bits": 2, "scale_dtype": "float16", "refine_passes": 1},
    {"bits": 3, "group_size": 16, "scale_dtype": "float32", "refine_passes": 0},
]
every_case = pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: f"{fields['bits']}-bits")


def compress(fields: Mapping[str, Any], weight: Tensor, gram: Tensor | None = None) -> VectorTensor:
    size = weight.shape[1]
    statistics = {"gram": correlated_gram(size) if gram is None else gram, "drift": torch.zeros(size, size)}
    found = from_fields("residual_codebooks", fields).compress(weight, statistics, dtype="bfloat16")
    assert isinstance(found, VectorTensor)
    return found


def well_formed(found: VectorTensor) -> None:
    back = VectorTensor.from_state(found.to_state(), found.scheme)
    assert torch.equal(back.dequantize(), found.dequantize())
    assert torch.equal(back.codes, found.codes)
    assert bool(torch.isfinite(found.dequantize()).all())
    assert bool((found.scale > 0).all())


@every_case
@pytest.mark.parametrize("shape", [(7, 44), (5, 20), (1, 1), (3, 33)], ids=str)
def test_odd_sizes_and_the_same_again(fields: dict[str, Any], shape: tuple[int, int]) -> None:
    weight = random_weight(*shape)
    found, again = compress(fields, weight), compress(fields, weight)
    assert found.shape == shape
    well_formed(found)
    assert torch.equal(found.codes, again.codes) and torch.equal(found.scale, again.scale)


@every_case
def test_threads_change_no_bit_and_nothing_given_is_touched(fields: dict[str, Any]) -> None:
    weights = [random_weight(9, 40, seed) for seed in range(2)]
    gram = correlated_gram(40)
    copies = [weight.clone() for weight in weights], gram.clone()
    found = []
    for threads in (1, 2):
        with Workers(threads) as workers:
            found.append(workers.map(lambda weight: compress(fields, weight, gram), weights))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.dequantize(), other.dequantize())
    assert torch.equal(gram, copies[1])
    assert all(torch.equal(weight, copy) for weight, copy in zip(weights, copies[0], strict=True))


@every_case
@pytest.mark.parametrize("hard", ["zero", "constant", "outlier", "tiny", "zero rows", "dead columns", "no inputs"])
def test_hard_weights(fields: dict[str, Any], hard: str) -> None:
    weight, gram = random_weight(5, 30), correlated_gram(30)
    if hard == "zero":
        weight.zero_()
    elif hard == "constant":
        weight.fill_(0.3)
    elif hard == "outlier":
        weight[2, 3] = 1e4
    elif hard == "tiny":
        weight *= 1e-30
    elif hard == "zero rows":
        weight[1:3] = 0
    elif hard == "dead columns":
        gram[10:20], gram[:, 10:20] = 0, 0
    else:
        gram.zero_()
    found = compress(fields, weight, gram)
    well_formed(found)
    if hard == "zero":
        assert float(found.dequantize().abs().max()) < 1e-6  # a lattice beside zero comes as near as its scale can


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(bad: float) -> None:
    weight = random_weight(3, 16)
    weight[1, 15] = bad
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        compress({}, weight)
    with pytest.raises(NonFiniteError, match="gram"):
        compress({}, random_weight(3, 16), torch.full((16, 16), bad))
    with pytest.raises(NonFiniteError, match="float16 cannot hold"):
        compress({"scale_dtype": "float16"}, random_weight(3, 16) * 1e8)


def test_fields_that_cannot_be() -> None:
    with pytest.raises(RecipeError, match="multiples of 8"):
        from_fields("residual_codebooks", {"group_size": 12})
    with pytest.raises(RecipeError, match="integers from 1 to 4"):
        from_fields("residual_codebooks", {"bits": 5})


@pytest.mark.parametrize("bits", [1, 2])
def test_better_than_the_nearest_entries_and_each_part_adds_to_it(bits: int) -> None:
    plain = better = refined = 0.0
    for seed in range(2):
        weight, gram = random_weight(16, 48, seed), correlated_gram(48, seed)
        nearest = compress({"bits": bits, "refine_passes": 0}, weight, torch.eye(48))
        plain += output_error(weight, nearest, gram)
        better += output_error(weight, compress({"bits": bits, "refine_passes": 0}, weight, gram), gram)
        refined += output_error(weight, compress({"bits": bits}, weight, gram), gram)
    assert refined < 0.9 * better
    assert better < 0.7 * plain


def test_fewer_bits_are_worse_and_two_bits_beat_scalar_ones() -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    errors = [weight_error(weight, compress({"bits": bits}, weight, torch.eye(64))) for bits in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.1  # the best scalar levels leave 0.1175 of a normal weight


@every_case
def test_codes_in_motion_are_those_of_the_file(fields: dict[str, Any]) -> None:
    weight = random_weight(6, 44)
    start = compress(fields, weight)
    soft = SoftVectors(start, weight)
    assert torch.equal(soft.values(), start.dequantize())
    assert torch.equal(soft.quantized().codes, start.codes)
    generator = torch.Generator().manual_seed(3)
    for _ in range(8):
        soft.step_(torch.randn(6, 44, generator=generator), latent_rate=0.2, scale_rate=0.02)
    found = soft.quantized()
    assert torch.equal(found.dequantize(), soft.values())
    assert not torch.equal(found.codes, start.codes)
    assert not torch.equal(found.scale, start.scale)
    well_formed(found)


def test_a_scale_and_a_latent_move_against_their_slope() -> None:
    weight = random_weight(6, 40)
    soft = SoftVectors(compress({"scale_dtype": "float32"}, weight), weight)
    latent, values = soft.latent.clone(), soft.values()
    soft.step_(values, latent_rate=0.01, scale_rate=0.01)  # the slope of ½‖value‖²: everything should shrink
    assert bool((soft.log_scale < 0).all())
    assert bool(((soft.latent - latent).sign() == -values.sign()).all())


def test_the_tuner_lowers_the_error_on_windows_that_no_step_saw() -> None:
    weights = {"a": random_weight(20, 24), "b": random_weight(16, 20, 1)}
    block = TwoLinears(weights)
    start = {
        name: compress({"refine_passes": 0}, weight, torch.eye(weight.shape[1])) for name, weight in weights.items()
    }
    tuner = ResidualCodebooks(steps=60, batch_windows=4, code_rate=0.5).tuner()
    assert tuner is not None
    found, again = tuner.tune(start, weights, block), tuner.tune(start, weights, block)
    _, kept = split_windows(block.windows)
    before = block.error({name: codes.dequantize() for name, codes in start.items()}, kept)
    after = block.error({name: codes.dequantize() for name, codes in found.items()}, kept)
    assert after < 0.9 * before
    assert all(torch.equal(found[name].codes, again[name].codes) for name in found)
    assert ResidualCodebooks(steps=0).tuner() is None
