"""Keys and values as codes: by the formula, with every odd size, and what the layout is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.errors import UsageError
from fettle.tensors.cache_codes import CacheScheme, encode_keys, encode_values


@given(
    bits=st.sampled_from([2, 4, 8]), heads=st.integers(1, 3), tokens=st.integers(1, 40), width=st.integers(1, 20),
    group_size=st.integers(1, 50), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_number_is_within_half_a_step(
    bits: int, heads: int, tokens: int, width: int, group_size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(heads, tokens, width, generator=generator) * 3
    scheme = CacheScheme(bits=bits, group_size=group_size)
    for encode, axis in ((encode_keys, 1), (encode_values, 2)):
        found = encode(numbers, scheme)
        size = min(group_size, numbers.shape[axis])
        values = found.dequantize()
        assert values.shape == numbers.shape
        for part, known in zip(values.split(size, dim=axis), numbers.split(size, dim=axis), strict=True):
            step = (known.amax(axis, keepdim=True) - known.amin(axis, keepdim=True)) / (2**bits - 1)
            # scale and low are float16: a thousandth of their size on top of half a step
            slack = 2e-3 * known.abs().amax(axis, keepdim=True) + 1e-6
            assert bool(((part - known).abs() <= step / 2 + slack * 2**0 + step * (2**bits) * 1e-3).all())
        groups = -(-numbers.shape[axis] // size)
        rows = numbers.numel() // numbers.shape[axis]
        assert found.nbytes == rows * (4 * -(-numbers.shape[axis] * bits // 32) + 4 * groups)


def test_by_hand() -> None:
    keys = torch.tensor([[[0.0, 8.0], [1.0, 8.0], [3.0, 8.0], [2.0, 11.0]]])
    found = encode_keys(keys, CacheScheme(bits=2, group_size=4))
    assert (found.scale.tolist(), found.low.tolist()) == ([[1.0], [1.0]], [[0.0], [8.0]])
    assert torch.equal(found.dequantize(), keys)
    constant = encode_values(torch.full((1, 2, 3), 5.0), CacheScheme(bits=2, group_size=4))
    assert torch.equal(constant.dequantize(), torch.full((1, 2, 3), 5.0))


def test_a_large_channel_does_not_spoil_the_others_keys() -> None:
    keys = torch.randn(1, 32, 16, generator=torch.Generator().manual_seed(0))
    keys[:, :, 3] *= 100
    scheme = CacheScheme(bits=4, group_size=32)
    keep = [channel for channel in range(16) if channel != 3]
    by_channel = (encode_keys(keys, scheme).dequantize() - keys)[:, :, keep].square().mean()
    by_token = (encode_values(keys, scheme).dequantize() - keys)[:, :, keep].square().mean()
    assert by_channel < 0.01 * by_token


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"bits": 3}, "2, 4, 8"), ({"group_size": 0}, "at least 1"), ({"residual": -1}, "0 or more")],
)
def test_schemes_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CacheScheme(**fields).check()
