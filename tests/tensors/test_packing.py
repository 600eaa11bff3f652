"""Packing against the standard's own code, and as its own inverse."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.errors import CheckpointError
from fettle.tensors import packing
from fettle.tensors.packing import pack_bits, packed_width, unpack_bits


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1), (7, 172), (64, 64), (33, 45), (5, 31)])
def test_bits_are_those_of_compressed_tensors(bits: int, axis: int, shape: tuple[int, int]) -> None:
    codes = random_codes(*shape, bits)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    packed = pack_bits(codes, bits, axis)
    assert torch.equal(packed, pack_to_int32(signed, bits, axis))
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size(shape), axis), signed)
    assert packed.is_contiguous()


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 100),
    bits=st.integers(2, 8),
    axis=st.sampled_from([0, 1]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_unpack_is_the_inverse(rows: int, columns: int, bits: int, axis: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    packed = pack_bits(codes, bits, axis)
    assert packed.shape[axis] == packed_width(codes.shape[axis], bits)
    assert torch.equal(unpack_bits(packed, bits, codes.shape[axis], axis), codes)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(50, 70, 3)
    whole = pack_bits(codes, 3)
    monkeypatch.setattr(packing, "CHUNK_CODES", 200)
    assert torch.equal(pack_bits(codes, 3), whole)
    assert torch.equal(unpack_bits(whole, 3, 70), codes)


def test_slices_that_are_not_contiguous_pack_alike() -> None:
    codes = random_codes(8, 128, 5)
    assert torch.equal(pack_bits(codes[:, 32:96], 5), pack_bits(codes[:, 32:96].clone(), 5))


@pytest.mark.parametrize("wrong", [torch.zeros(2, 5, dtype=torch.int32), torch.zeros(2, 4)])
def test_packed_tensors_of_another_size_or_type_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="32 codes of 4 bits"):
        unpack_bits(wrong, 4, 32)
