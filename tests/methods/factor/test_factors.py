"""Factors: as good as the decompositions of the papers, written out in float64, and as many as were asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.methods.quantize.problems import correlated_gram, random_weight
from torch import Tensor

from fettle.errors import NonFiniteError, RecipeError
from fettle.kernels.reference import reference_linear
from fettle.methods.factor.factors import rank_of_energy
from fettle.methods.registry import from_fields, matrix_method
from fettle.tensors import QuantizedTensor, Scheme

NAMES = ("svd", "asvd", "svd_llm")


def compress(name: str, weight: Tensor, gram: Tensor, **fields: object) -> QuantizedTensor:
    method = from_fields(name, {"scale_dtype": "float32", **fields})
    statistics = {"gram": gram, "absolute_mean": gram.diagonal().sqrt() / 20}
    return method.compress(weight, {kind: statistics[kind] for kind in method.statistics}, dtype="float32")


def output_loss(weight: Tensor, found: Tensor, gram: Tensor) -> float:
    error = (weight - found).double()
    return float(((error @ gram.double()) * error).sum())


def truncated(weight: Tensor, lower: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The paper's own words: SVD of W·L cut to the rank, with L⁻¹ behind it; and the squares of what is cut."""
    u, s, v = torch.linalg.svd(weight.double() @ lower, full_matrices=False)
    kept = (u[:, :rank] * s[:rank]) @ v[:rank]
    return torch.linalg.solve_triangular(lower, kept, upper=False, left=False), s[rank:].square().sum()


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (24, 24)], ids=str)
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_svd_llm_is_the_truncated_svd_behind_the_cholesky_factor(shape, rank):
    weight, gram = random_weight(*shape), correlated_gram(shape[1])
    expected, cut = truncated(weight, torch.linalg.cholesky(gram.double()), rank)
    found = compress("svd_llm", weight, gram, rank=rank, damping=0.0).dequantize()
    loss, least = output_loss(weight, found, gram), output_loss(weight, expected, gram)
    assert least == pytest.approx(float(cut), rel=1e-6, abs=1e-9)  # each singular value left out costs its square
    rounding = 1e-7 * output_loss(weight, torch.zeros_like(weight), gram)
    assert loss <= least * (1 + 1e-4) + rounding
    for other in ("svd", "asvd"):
        theirs = output_loss(weight, compress(other, weight, gram, rank=rank).dequantize(), gram)
        assert loss <= theirs * (1 + 1e-4) + rounding


@settings(max_examples=25, deadline=None)
@given(out=st.integers(1, 14), into=st.integers(1, 14), rank=st.integers(1, 16), seed=st.integers(0, 1000))
def test_no_product_of_the_rank_leaves_less(out, into, rank, seed):
    weight, gram = random_weight(out, into, seed), correlated_gram(into, seed)
    loss = output_loss(weight, compress("svd_llm", weight, gram, rank=rank, damping=0.0).dequantize(), gram)
    generator = torch.Generator().manual_seed(seed)
    nothing = output_loss(weight, torch.zeros_like(weight), gram)
    left = torch.randn(out, min(rank, out, into), generator=generator, dtype=torch.float64)
    for _ in range(20):  # alternating least squares from a random start
        right = torch.linalg.lstsq(left, weight.double()).solution
        products = right @ gram.double()
        left = torch.linalg.lstsq((products @ right.T), (products @ weight.double().T)).solution.T
    right = torch.linalg.lstsq(left, weight.double()).solution
    assert loss <= output_loss(weight, left @ right, gram) * (1 + 1e-3) + 1e-6 * nothing


@pytest.mark.parametrize("rank", [1, 7])
def test_svd_is_eckart_and_young(rank):
    weight = random_weight(20, 30)
    values = torch.linalg.svdvals(weight.double())
    found = compress("svd", weight, correlated_gram(30), rank=rank).dequantize()
    error = float((weight - found).double().square().sum())
    assert error == pytest.approx(float(values[rank:].square().sum()), rel=1e-4)


def test_asvd_is_the_truncated_svd_of_the_scaled_columns():
    weight, gram = random_weight(16, 24), correlated_gram(24)
    strength = (gram.diagonal().sqrt() / 20).double().pow(0.5)
    _, cut = truncated(weight, torch.diag(strength), 6)
    found = compress("asvd", weight, gram, rank=6).dequantize()
    assert float(((weight - found).double() * strength).square().sum()) == pytest.approx(float(cut), rel=1e-4)
    plain = compress("asvd", weight, gram, rank=6, alpha=0.0).dequantize()
    torch.testing.assert_close(plain, compress("svd", weight, gram, rank=6).dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_full_rank_gives_the_weight_back(name):
    weight = random_weight(9, 15)
    found = compress(name, weight, correlated_gram(15), rank=99)
    assert found.scheme.remainder_spec((9, 15))["weight_factor_left"][1] == (9, 9)
    torch.testing.assert_close(found.dequantize(), weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(64, 172), (5, 300), (1, 4)], ids=str)
def test_a_share_is_kept_to_and_counted(share, shape):
    method = from_fields("svd", {"share": share}).settled(shape, lambda: pytest.fail("a share reads no weight"))
    scheme = method.scheme("bfloat16")
    thinnest = 2 * sum(shape)
    assert scheme.stored_bytes(shape) <= max(thinnest, share * 2 * shape[0] * shape[1]) + 18  # a scale and the shape
    assert scheme.stored_bytes(shape) > share * 2 * shape[0] * shape[1] - thinnest


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_an_energy_is_the_least_rank_that_holds_it(energy):
    weight = random_weight(17, 40)
    squares = torch.linalg.svdvals(weight.double()).square()
    rank = rank_of_energy(weight, energy)
    assert float(squares[:rank].sum()) >= energy * float(squares.sum()) * (1 - 1e-9)
    assert rank == 1 or float(squares[: rank - 1].sum()) < energy * float(squares.sum())
    assert from_fields("svd", {"energy": energy}).settled((17, 40), lambda: weight).rank == rank
    assert rank_of_energy(torch.zeros(3, 4), energy) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [None, 4])
def test_state_bytes_and_products_come_back(name, bits):
    weight, gram = random_weight(24, 70), correlated_gram(70)
    found = compress(name, weight, gram, rank=6, bits=bits, group_size=32)
    state = found.to_state()
    spec = found.scheme.state_spec((24, 70))
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in state.items()} == spec
    assert found.nbytes() == sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    again = QuantizedTensor.from_state(state, Scheme.from_dict(found.scheme.to_dict()))
    assert torch.equal(again.dequantize(), found.dequantize())
    inputs, bias = torch.randn(5, 70, generator=torch.Generator().manual_seed(1)), torch.arange(24.0)
    torch.testing.assert_close(
        reference_linear("pack-quantized")(inputs, state, found.scheme, bias),
        inputs @ found.dequantize().T + bias,
        atol=2e-5,
        rtol=1e-4,
    )
    assert torch.equal(compress(name, weight, gram, rank=6, bits=bits).dequantize(), found.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_codes_for_the_rest_take_most_of_the_error_away(name):
    weight, gram = random_weight(24, 70), correlated_gram(70)
    alone, coded = (compress(name, weight, gram, rank=6, bits=bits).dequantize() for bits in (None, 4))
    assert output_loss(weight, coded, gram) < 0.05 * output_loss(weight, alone, gram)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hard", ["zero", "constant", "outlier", "tiny", "dead inputs", "nothing seen"])
def test_hard_weights(name, hard):
    weight, gram = random_weight(5, 70), correlated_gram(70)
    if hard == "zero":
        weight = torch.zeros(5, 70)
    elif hard == "constant":
        weight = torch.full((5, 70), 0.3)
    elif hard == "outlier":
        weight[2, 3] = 1e4
    elif hard == "tiny":
        weight *= 1e-30
    elif hard == "dead inputs":
        gram[10:20], gram[:, 10:20] = 0, 0
    else:
        gram = torch.zeros(70, 70)
    before = weight.clone(), gram.clone()
    for dtype in ("bfloat16", "float32"):
        found = compress(name, weight, gram, rank=2, scale_dtype=dtype).dequantize()
        assert bool(torch.isfinite(found).all())
        assert float((found - weight).norm()) <= 1.01 * float(weight.norm())
    if hard == "zero":
        assert not found.any()
    assert torch.equal(weight, before[0]) and torch.equal(gram, before[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(name, bad):
    weight = random_weight(5, 70)
    weight[3, 69] = bad
    with pytest.raises(NonFiniteError):
        compress(name, weight, correlated_gram(70), rank=2)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"rank": 4, "share": 0.5}, "rank and share both say how thin"),
        ({"share": 1.5}, "numbers from 0.001 to 1.0"),
        ({"energy": 0.0}, "numbers from 0.001 to 1.0"),
        ({"rank": 0}, "integers from 1"),
        ({"bits": 1}, "integers from 2 to 8"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields, why):
    with pytest.raises(RecipeError, match=why):
        from_fields("svd_llm", fields)


def test_where_methods_are_compared_the_rank_is_a_number():
    with pytest.raises(RecipeError, match="give rank"):
        matrix_method("svd", {"share": 0.5})
    assert matrix_method("svd", {"rank": 3}).scheme("float32").describe() == "rank 3, float32"
    with pytest.raises(RecipeError, match="another shape"):
        matrix_method("drop_layers", {"drop": 1})
