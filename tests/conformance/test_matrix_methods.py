"""What every matrix method owes, over the registry: a new method is checked by being registered.

Methods whose codes stand for several weights have no grid and no zero point, hence other fields and other checks:
`tests/methods/quantize/test_residual_codebooks.py` asks of them what this suite asks of the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from tests.methods.quantize.problems import correlated_gram, random_weight
from torch import Tensor

from fettle.errors import NonFiniteError, RecipeError
from fettle.methods.quantize.errors import output_error, robust_error, weight_error
from fettle.methods.quantize.round_to_nearest import round_to_nearest
from fettle.methods.registry import METHODS, from_fields, to_fields
from fettle.methods.statistics import STATISTICS
from fettle.tensors import QuantizedTensor, Scheme, quantize
from fettle.workers import Workers

OBJECTIVES: dict[str, Callable[[Tensor, QuantizedTensor, Tensor], float]] = {
    "output_error": output_error,
    "weight_error": lambda weight, found, gram: weight_error(weight, found),
    "robust_error": lambda weight, found, gram: robust_error(weight, found),
}

# Every combination that changes a code path; kept few, as the suite runs over all methods.
FIELDS: list[dict[str, Any]] = [
    {"bits": 4, "group_size": 32, "asymmetric": True},
    {"bits": 3, "group_size": 32, "asymmetric": False, "scale_dtype": "float16"},
    {"bits": 2, "group_size": None, "asymmetric": True},
    {"bits": 8, "granularity": "tensor", "scale_dtype": "float32"},
    {"grid": "normal_float", "bits": 3},
    {"grid": "float", "bits": 4, "group_size": 16, "scale_dtype": "float8_e4m3fn"},
    {"grid": "ternary", "group_size": None, "scale_dtype": "float8_e8m0fnu"},
    {"grid": "binary"},
    {"grid": "learned", "bits": 3, "group_size": None},
]
SHAPES = [(7, 172), (64, 172), (5, 20), (1, 1), (3, 33)]

# methods that choose codes; those that store factors alone have a scheme of no bits and a suite of their own
SCALAR = [
    name
    for name, cls in METHODS.items()
    if isinstance(cls().scheme("float32"), Scheme) and ".quantize." in cls.__module__
]
VECTOR = {"residual_codebooks"}
PRUNERS = {"magnitude", "wanda", "sparsegpt", "taylor", "activation_sparsity"}  # test_pruning_methods.py
FACTORS = {"svd", "asvd", "svd_llm"}  # tests/methods/factor/test_factors.py

every_method = pytest.mark.parametrize("name", SCALAR)


def accepted(name: str, fields: dict[str, Any]) -> bool:
    """Whether the method takes these fields; what it refuses, it refuses with a reason (see the last test)."""
    try:
        from_fields(name, fields)
    except RecipeError:
        return False
    return True


every_case = pytest.mark.parametrize(
    ("name", "fields"),
    [
        pytest.param(name, fields, id=f"{name}-{'-'.join(str(v) for v in fields.values())}")
        for name in SCALAR
        for fields in FIELDS
        if accepted(name, fields)
    ],
)
REFUSED = {("hqq", "learned")}  # method and grid that make no sense together


def statistics_of(in_features: int, seed: int = 0) -> dict[str, Tensor]:
    """Every known statistic of correlated inputs without drift: more than any one method declares."""
    known = {name: kind.neutral(in_features) for name, kind in STATISTICS.items()}
    return {**known, "gram": correlated_gram(in_features, seed)}


def compress(
    name: str, fields: dict[str, Any], weight: Tensor, statistics: dict[str, Tensor], dtype: str = "bfloat16"
) -> QuantizedTensor:
    """Compresses with only the statistics that the method declares: it must not reach for others."""
    method = from_fields(name, fields)
    declared = {kind: statistics[kind] for kind in method.statistics}
    return method.compress(weight, declared, dtype=dtype)


@functools.cache
def _found(name: str, fields: str, shape: tuple[int, int]) -> QuantizedTensor:
    return compress(name, yaml.safe_load(fields), random_weight(*shape), statistics_of(shape[1]))


def found_on(name: str, fields: dict[str, Any], shape: tuple[int, int]) -> QuantizedTensor:
    """What the method makes of the usual weight of this shape; made once, and nobody changes it."""
    return _found(name, yaml.safe_dump(fields, sort_keys=False), shape)


def assert_same(one: QuantizedTensor, other: QuantizedTensor) -> None:
    assert one.scheme == other.scheme
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale, other.scale)
    for name in ("zero_point", "levels", "tensor_scale"):
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first, second), name
    assert (one.remainder is None) == (other.remainder is None)
    if one.remainder is not None and other.remainder is not None:
        state = other.remainder.to_state()
        assert all(torch.equal(tensor, state[name]) for name, tensor in one.remainder.to_state().items())


def assert_well_formed(found: QuantizedTensor, shape: tuple[int, int], scheme: Scheme) -> None:
    assert found.scheme == scheme
    assert (found.shape, found.codes.dtype) == (shape, torch.uint8)
    assert int(found.codes.max()) < scheme.grid.level_count
    assert tuple(found.scale.shape) == scheme.scale_shape(shape)
    assert found.scale.dtype == scheme.value_dtype
    assert torch.equal(found.scale.to(scheme.torch_scale_dtype).to(scheme.value_dtype), found.scale)
    assert (found.levels is not None) == scheme.grid.is_learned
    assert (found.tensor_scale is not None) == scheme.has_tensor_scale
    assert bool((found.scale > 0).all())
    assert (found.zero_point is not None) == scheme.zero_point
    beside = {} if found.remainder is None else found.remainder.to_state()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in beside.items()} == scheme.remainder_spec(shape)
    assert bool(torch.isfinite(found.dequantize()).all())


@every_case
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_sizes(name: str, fields: dict[str, Any], shape: tuple[int, int]) -> None:
    found = found_on(name, fields, shape)
    assert_well_formed(found, shape, from_fields(name, fields).scheme("bfloat16"))


@every_method
@pytest.mark.parametrize("group_size", [1, 5, 171, 1000])
def test_odd_groups(name: str, group_size: int) -> None:
    fields = {"group_size": group_size, "asymmetric": True}
    found = compress(name, fields, random_weight(6, 172), statistics_of(172))
    assert_well_formed(found, (6, 172), from_fields(name, fields).scheme("bfloat16"))
    assert output_error(random_weight(6, 172), found, correlated_gram(172)) < 0.05


@every_case
def test_deterministic(name: str, fields: dict[str, Any]) -> None:
    """Once more from the beginning; the other tests' result, unchanged by them."""
    assert_same(found_on(name, fields, (7, 172)), compress(name, fields, random_weight(7, 172), statistics_of(172)))


@every_case
def test_threads_change_no_bit(name: str, fields: dict[str, Any]) -> None:
    problems = [(random_weight(9, 172, seed), statistics_of(172, seed)) for seed in range(2)]
    found = []
    for threads in (1, 2):
        with Workers(threads) as workers:
            found.append(workers.map(lambda problem: compress(name, fields, *problem), problems))
    for one, other in zip(*found, strict=True):
        assert_same(one, other)


@every_case
def test_weight_and_statistics_are_untouched(name: str, fields: dict[str, Any]) -> None:
    weight, statistics = random_weight(7, 172), statistics_of(172)
    copies = weight.clone(), {kind: value.clone() for kind, value in statistics.items()}
    compress(name, fields, weight, statistics)
    assert torch.equal(weight, copies[0])
    assert all(torch.equal(statistics[kind], value) for kind, value in copies[1].items())


@every_case
def test_zero_weights_stay_zero(name: str, fields: dict[str, Any]) -> None:
    for statistics in (statistics_of(70), {k: torch.zeros(70, 70) for k in STATISTICS}):
        found = compress(name, fields, torch.zeros(5, 70), statistics)
        # a grid without zero comes as near to it as its scale's type can
        assert float(found.dequantize().abs().max()) <= (0 if found.scheme.grid.has_zero else 1e-30)


@every_case
@pytest.mark.parametrize("hard", ["constant", "outlier", "tiny", "zero rows", "one weight"])
def test_hard_weights(name: str, fields: dict[str, Any], hard: str) -> None:
    weight = random_weight(5, 70)
    if hard == "constant":
        weight = torch.full((5, 70), 0.3)
    elif hard == "outlier":
        weight[2, 3] = 1e4
    elif hard == "tiny":
        weight *= 1e-30
    elif hard == "zero rows":
        weight[1:3] = 0
    elif hard == "one weight":
        weight = torch.zeros(5, 70)
        weight[2, 3] = -1.0
    found = compress(name, fields, weight, statistics_of(70))
    assert_well_formed(found, (5, 70), from_fields(name, fields).scheme("bfloat16"))


@every_method
def test_a_group_without_the_outlier_is_not_hurt(name: str) -> None:
    weight = random_weight(4, 64)
    weight[0, 0] = 1e4
    found = compress(name, {"bits": 8, "group_size": 32}, weight, {k: v.neutral(64) for k, v in STATISTICS.items()})
    assert weight_error(weight[1:], found.dequantize()[1:]) < 1e-3
    assert weight_error(weight[:, 32:], found.dequantize()[:, 32:]) < 1e-3


@every_case
def test_dead_columns(name: str, fields: dict[str, Any]) -> None:
    statistics = statistics_of(70)
    for kind in ("gram", "drift", "absolute_mean", "absolute_maximum"):
        statistics[kind][10:20], statistics[kind][..., 10:20] = 0, 0
    found = compress(name, fields, random_weight(5, 70), statistics)
    assert_well_formed(found, (5, 70), from_fields(name, fields).scheme("bfloat16"))
    nothing = compress(name, fields, random_weight(5, 70), {k: torch.zeros(70, 70) for k in STATISTICS})
    assert_well_formed(nothing, (5, 70), from_fields(name, fields).scheme("bfloat16"))


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(name: str, bad: float) -> None:
    weight = random_weight(5, 70)
    weight[3, 69] = bad
    with pytest.raises(NonFiniteError):
        compress(name, {}, weight, statistics_of(70))


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_weight_are_accepted(name: str, dtype: torch.dtype) -> None:
    weight = random_weight(5, 70).to(dtype)
    assert_same(compress(name, {}, weight, statistics_of(70)), compress(name, {}, weight.float(), statistics_of(70)))


@every_case
def test_values_on_the_grid_come_back(name: str, fields: dict[str, Any]) -> None:
    found = compress(name, {**fields, "scale_dtype": "float32"}, random_weight(7, 172), statistics_of(172))
    found = replace(found, remainder=None)  # the codes alone: what is beside them has no grid
    again = quantize(found.dequantize(), found.scale, found.zero_point, found.scheme, levels=found.levels)
    assert torch.equal(again.codes, found.codes)


@every_case
def test_state_scheme_and_fields_come_back(name: str, fields: dict[str, Any]) -> None:
    found = found_on(name, fields, (7, 172))
    scheme = Scheme.from_dict(yaml.safe_load(yaml.safe_dump(found.scheme.to_dict())))
    for storage in ["pack-quantized"] + (
        ["int-quantized"] if found.scheme.grid.bits == 8 and found.scheme.grid.is_uniform else []
    ):
        assert_same(QuantizedTensor.from_state(found.to_state(storage), scheme, storage), found)
    method = from_fields(name, fields)
    assert from_fields(name, yaml.safe_load(yaml.safe_dump(to_fields(method)))) == method


@every_case
def test_reported_bits_are_stored_bits(name: str, fields: dict[str, Any], tmp_path: Any) -> None:
    found = found_on(name, fields, (64, 172))
    path = tmp_path / "weight.safetensors"
    save_file(found.to_state(), path)
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    stored = path.stat().st_size - 8 - header
    assert found.nbytes() == stored
    assert found.scheme.bits_per_weight((64, 172)) == 8 * stored / (64 * 172)
    with safe_open(path, "pt") as reopened:
        state = {key: reopened.get_tensor(key) for key in reopened.keys()}  # noqa: SIM118
    assert_same(QuantizedTensor.from_state(state, found.scheme), found)


@every_case
def test_no_worse_than_round_to_nearest_in_its_own_objective(name: str, fields: dict[str, Any]) -> None:
    method = from_fields(name, fields)
    ours = theirs = 0.0
    for seed in range(4):
        weight, statistics = random_weight(24, 172, seed), statistics_of(172, seed)
        found = compress(name, fields, weight, statistics)
        nearest = round_to_nearest(weight, method.scheme("bfloat16").codes_alone)
        ours += OBJECTIVES[method.objective](weight, found, statistics["gram"])
        theirs += OBJECTIVES[method.objective](weight, nearest, statistics["gram"])
    assert ours <= theirs * (1 + 1e-6)


@every_method
def test_only_what_makes_no_sense_is_refused(name: str) -> None:
    refused = {fields.get("grid") for fields in FIELDS if not accepted(name, fields)}
    assert refused == {grid for method, grid in REFUSED if method == name}


def test_every_method_is_in_one_suite() -> None:
    assert set(METHODS) == set(SCALAR) | VECTOR | PRUNERS | FACTORS
