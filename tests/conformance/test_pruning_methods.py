"""What every method that prunes owes, over the registry: a new one is checked by being registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tests.methods.quantize.problems import correlated_inputs, random_weight
from torch import Tensor

from fettle.errors import NonFiniteError, RecipeError
from fettle.methods.prune.magnitude import Magnitude
from fettle.methods.quantize.errors import output_error, weight_error
from fettle.methods.registry import METHODS, from_fields, to_fields
from fettle.methods.statistics import STATISTICS
from fettle.tensors import MaskedScheme, MaskedTensor
from fettle.workers import Workers

PRUNERS = [name for name, cls in METHODS.items() if isinstance(cls().scheme("float32"), MaskedScheme)]
FIELDS: list[dict[str, Any]] = [
    {"sparsity": 0.5},
    {"sparsity": 0.3, "pattern": "row"},
    {"pattern": "2:4"},
    {"pattern": "1:4", "bits": 3, "group_size": None},
    {"pattern": "1x4", "sparsity": 0.6, "heal": "least_squares"},
    {"pattern": "3:4", "heal": "none"},
    {"sparsity": 0.7, "bits": 4, "group_size": 32, "asymmetric": True},
    {"pattern": "2:4", "grid": "learned", "bits": 2, "group_size": None},
    {"sparsity": 0.5, "grid": "binary", "group_size": 16},
]
every_method = pytest.mark.parametrize("name", PRUNERS)
every_case = pytest.mark.parametrize(
    ("name", "fields"),
    [
        pytest.param(name, fields, id=f"{name}-{'-'.join(map(str, fields.values()))}")
        for name in PRUNERS
        for fields in FIELDS
    ],
)


def statistics_of(in_features: int, out_features: int, seed: int = 0) -> dict[str, Tensor]:
    """Every known statistic of correlated inputs without drift, and a gradient."""
    inputs = correlated_inputs(in_features, seed)
    found = {name: kind.neutral(in_features) for name, kind in STATISTICS.items()}
    with Workers(1) as workers:
        for name in ("gram", "squared_norm", "active_share", "absolute_mean"):
            state = STATISTICS[name].start(in_features)
            STATISTICS[name].add_(state, [inputs], workers)
            found[name] = STATISTICS[name].finish(state)
    generator = torch.Generator().manual_seed(seed)
    return {**found, "gradient": torch.rand(out_features, in_features, generator=generator)}


def compress(name: str, fields: dict[str, Any], weight: Tensor, statistics: dict[str, Tensor]) -> MaskedTensor:
    """Compresses with only the statistics that the instance asks for: it must not reach for others."""
    method = from_fields(name, fields)
    assert set(method.needs()) <= set(method.statistics)
    found = method.compress(weight, {kind: statistics[kind] for kind in method.needs()}, dtype="bfloat16")
    assert isinstance(found, MaskedTensor)
    return found


def assert_same(one: MaskedTensor, other: MaskedTensor) -> None:
    assert one.scheme == other.scheme
    first, second = one.to_state(), other.to_state()
    assert all(torch.equal(first[name], second[name]) for name in first | second)


def assert_well_formed(found: MaskedTensor, shape: tuple[int, int], scheme: MaskedScheme) -> None:
    """The scheme, the exact count, the pattern, zeros where it pruned, and what `from_state` checks."""
    assert found.scheme == scheme
    assert found.shape == shape
    assert int(found.kept.sum()) == scheme.kept_count(shape)
    pattern = scheme.shape_of_mask
    if pattern.kind == "n:m":
        assert bool((found.kept.view(shape[0], -1, pattern.columns).sum(-1) == pattern.keep).all())
    if pattern.kind == "block":
        blocks = found.kept.view(shape[0] // pattern.rows, pattern.rows, -1, pattern.columns)
        assert bool((blocks.sum((1, 3)) % (pattern.rows * pattern.columns) == 0).all())
    dense = found.dequantize()
    assert bool((dense[~found.kept] == 0).all()) and bool(torch.isfinite(dense).all())
    assert_same(MaskedTensor.from_state(found.to_state(), scheme), found)


@every_case
@pytest.mark.parametrize("shape", [(7, 172), (5, 20), (1, 4)], ids=str)
def test_counts_and_patterns(name: str, fields: dict[str, Any], shape: tuple[int, int]) -> None:
    found = compress(name, fields, random_weight(*shape), statistics_of(shape[1], shape[0]))
    scheme = from_fields(name, fields).scheme("bfloat16")
    assert isinstance(scheme, MaskedScheme)
    assert_well_formed(found, shape, scheme)


@every_case
def test_deterministic_on_any_number_of_threads_and_nothing_is_touched(name: str, fields: dict[str, Any]) -> None:
    problems = [(random_weight(9, 172, seed), statistics_of(172, 9, seed)) for seed in range(2)]
    copies = [(w.clone(), {kind: value.clone() for kind, value in s.items()}) for w, s in problems]
    found = []
    for threads in (1, 2):
        with Workers(threads) as workers:
            found.append(workers.map(lambda problem: compress(name, fields, *problem), problems))
    for one, other in zip(*found, strict=True):
        assert_same(one, other)
    for (weight, statistics), (before, known) in zip(problems, copies, strict=True):
        assert torch.equal(weight, before)
        assert all(torch.equal(statistics[kind], value) for kind, value in known.items())


@every_case
@pytest.mark.parametrize("hard", ["constant", "outlier", "tiny", "zero", "zero rows", "dead columns", "no inputs"])
def test_hard_weights(name: str, fields: dict[str, Any], hard: str) -> None:
    weight, statistics = random_weight(5, 72), statistics_of(72, 5)
    if hard == "constant":
        weight = torch.full((5, 72), 0.3)
    elif hard == "outlier":
        weight[2, 3] = 1e4
    elif hard == "tiny":
        weight *= 1e-30
    elif hard == "zero":
        weight.zero_()
    elif hard == "zero rows":
        weight[1:3] = 0
    elif hard == "dead columns":
        for kind, value in statistics.items():
            if kind not in ("input_range", "gradient"):
                value[10:20], value[..., 10:20] = 0, 0
    else:
        statistics = {kind: torch.zeros_like(value) for kind, value in statistics.items()}
    found = compress(name, fields, weight, statistics)
    scheme = from_fields(name, fields).scheme("bfloat16")
    assert isinstance(scheme, MaskedScheme)
    assert_well_formed(found, (5, 72), scheme)
    if hard == "zero":
        limit = 0 if scheme.values is None or scheme.values.grid.has_zero else 1e-30
        assert float(found.dequantize().abs().max()) <= limit


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(name: str, bad: float) -> None:
    weight = random_weight(5, 72)
    weight[3, 70] = bad
    with pytest.raises(NonFiniteError):
        compress(name, {}, weight, statistics_of(72, 5))


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_weight_are_accepted(name: str, dtype: torch.dtype) -> None:
    weight, statistics = random_weight(5, 72).to(dtype), statistics_of(72, 5)
    assert_same(compress(name, {}, weight, statistics), compress(name, {}, weight.float(), statistics))


@every_case
def test_recipes_come_back_and_bits_are_stored_bits(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    method = from_fields(name, fields)
    assert from_fields(name, yaml.safe_load(yaml.safe_dump(to_fields(method)))) == method
    found = compress(name, fields, random_weight(8, 172), statistics_of(172, 8))
    path = tmp_path / "weight.safetensors"
    save_file(found.to_state(), path)
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    assert found.nbytes() == path.stat().st_size - 8 - header
    assert found.scheme.bits_per_weight((8, 172)) == 8 * found.nbytes() / (8 * 172)


def objective(name: str, weight: Tensor, found: MaskedTensor, statistics: dict[str, Tensor]) -> float:
    kind = METHODS[name].objective
    if kind == "first_order":
        return float((weight * statistics["gradient"]).abs()[~found.kept].sum())
    return output_error(weight, found, statistics["gram"]) if kind == "output_error" else weight_error(weight, found)


@every_method
@pytest.mark.parametrize("pattern", ["layer", "2:4"])
def test_better_than_magnitude_in_its_own_objective(name: str, pattern: str) -> None:
    """Magnitude itself is compared with a mask by chance."""
    ours = theirs = 0.0
    for seed in range(4):
        weight, statistics = random_weight(24, 172, seed), statistics_of(172, 24, seed)
        found = compress(name, {"pattern": pattern}, weight, statistics)
        if name == "magnitude":
            order = torch.Generator().manual_seed(seed)
            other = Magnitude(pattern=pattern).compress(torch.rand(24, 172, generator=order), {}, dtype="bfloat16")
            baseline = MaskedTensor.of(weight, other.kept, other.scheme)
        else:
            baseline = Magnitude(pattern=pattern).compress(weight, {}, dtype="bfloat16")
        ours += objective(name, weight, found, statistics)
        theirs += objective(name, weight, baseline, statistics)
    assert ours < theirs


@every_method
@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"pattern": "2:4", "sparsity": 0.4}, "contradicts the pattern"),
        ({"pattern": "4:2"}, "allowed: layer, row"),
        ({"sparsity": 1.5}, "allowed: numbers from 0"),
        ({"rounds": 3, "heal": "none"}, "rounds=3 without healing"),
        ({"bits": 9}, "allowed: integers from 1 to 8"),
        ({"asymmetric": True}, "asymmetric is about codes, and what stays keeps its values"),
        ({"group_size": 64}, "group_size is about codes"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(name: str, fields: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        from_fields(name, fields)


@every_method
def test_a_width_that_the_pattern_does_not_divide_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"3:4 needs inputs in multiples of 4, and a weight of 5 x 6 has 6"):
        compress(name, {"pattern": "3:4"}, random_weight(5, 6), statistics_of(6, 5))
