"""Codes of 2 to 8 bits as the dense int32 words of compressed-tensors' `pack-quantized`.

A row is one little-endian stream of bits: code i occupies the bits i·b … i·b + b - 1, counted from the least
significant bit of the first word; codes may straddle words; the rest of the last word is zero.

    b = 3    word 0: c0 c0 c0 c1 c1 c1 c2 c2 c2 … c10 c10 │ word 1: c10 c11 c11 c11 …
    bit              0  1  2  3  …                30  31

How ours differs from the standard's own code: eight codes are read as one int64, and three steps of mask, shift and or
(pairs, then fours, then eights) close the gaps between them, so eight codes become b bytes in eleven vectorised
operations on words. Rows are packed in chunks that stay in the cache: 44 M weights take a fraction of a second on one
core and no temporary larger than a few megabytes.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from fettle.errors import CheckpointError

CHUNK_CODES = 1 << 18  # codes packed at once: 256 kB, so that the eleven passes stay in the second-level cache

# A step closes the gaps between neighbouring fields of `width` bits; low[width] selects every other field.
LOW = {8: 0x00FF00FF00FF00FF, 16: 0x0000FFFF0000FFFF, 32: 0x00000000FFFFFFFF}


def packed_width(codes: int, bits: int) -> int:
    """The int32 words that `codes` codes of `bits` bits take."""
    return math.ceil(codes * bits / 32)


def pack_bits(codes: Tensor, bits: int, axis: int = 1) -> Tensor:
    """Packs codes, uint8 [rows, columns] each below 2**bits, into int32 words along `axis`.

    Returns:
        int32 [rows, ⌈columns·bits/32⌉]; with axis 0 [⌈rows·bits/32⌉, columns].
    """
    if axis == 0:
        return pack_bits(codes.T, bits).T.contiguous()
    rows, columns = codes.shape
    if bits == 0:  # codes of a single level say nothing
        return torch.empty(rows, 0, dtype=torch.int32, device=codes.device)
    words = packed_width(columns, bits)
    packed = torch.empty(rows, words, dtype=torch.int32, device=codes.device)
    padded = math.ceil(columns / 32) * 32  # 32 codes are `bits` whole words
    step = max(1, CHUNK_CODES // max(1, padded))
    for start in range(0, rows, step):
        chunk = codes[start : start + step]
        if padded != columns or not chunk.is_contiguous():
            aligned = chunk.new_zeros(len(chunk), padded)
            aligned[:, :columns] = chunk
            chunk = aligned
        packed[start : start + step] = _pack_aligned(chunk, bits)[:, :words]
    return packed


def unpack_bits(packed: Tensor, bits: int, count: int, axis: int = 1) -> Tensor:
    """The inverse of `pack_bits`: uint8 codes, `count` of them along `axis`.

    Raises:
        CheckpointError: the packed tensor is not int32 or has too few or too many words for `count` codes.
    """
    if packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[axis] != packed_width(count, bits):
        raise CheckpointError(
            f"packed codes are {packed.dtype} {list(packed.shape)}; {count} codes of {bits} bits along axis {axis} "
            f"need torch.int32 with {packed_width(count, bits)} words there"
        )
    if axis == 0:
        return unpack_bits(packed.T, bits, count).T.contiguous()
    rows, words = packed.shape
    if bits == 0:
        return torch.zeros(rows, count, dtype=torch.uint8, device=packed.device)
    codes = torch.empty(rows, count, dtype=torch.uint8, device=packed.device)
    padded = math.ceil(words / bits) * bits
    step = max(1, CHUNK_CODES // max(1, count))
    for start in range(0, rows, step):
        chunk = packed[start : start + step]
        if padded != words or not chunk.is_contiguous():
            aligned = chunk.new_zeros(len(chunk), padded)
            aligned[:, :words] = chunk
            chunk = aligned
        codes[start : start + step] = _unpack_aligned(chunk, bits)[:, :count]
    return codes


def _pack_aligned(codes: Tensor, bits: int) -> Tensor:
    """Contiguous uint8 [rows, 32·n] → int32 [rows, bits·n]."""
    assert sys.byteorder == "little", "the views below read bytes in little-endian order"
    rows, columns = codes.shape
    flat = codes.reshape(-1)  # strides of a single row or column may be odd, and views of other widths look at them
    if bits == 8:
        return flat.view(torch.int32).view(rows, columns // 4)
    eights = flat.view(torch.int64).view(rows, columns // 8)  # eight codes in eight bytes
    for width in (8, 16, 32):
        gap = width - bits * width // 8
        high = (eights & ~LOW[width]).bitwise_right_shift_(gap)
        eights = (eights & LOW[width]).bitwise_or_(high)
    dense = eights.view(torch.uint8).view(rows, columns // 8, 8)[:, :, :bits]  # the low `bits` bytes of each
    return dense.reshape(rows, columns // 8 * bits).contiguous().view(torch.int32)


def _unpack_aligned(packed: Tensor, bits: int) -> Tensor:
    """Contiguous int32 [rows, bits·n] → uint8 [rows, 32·n]."""
    assert sys.byteorder == "little", "the views below read bytes in little-endian order"
    rows, words = packed.shape
    flat = packed.reshape(-1).view(torch.uint8)
    if bits == 8:
        return flat.view(rows, words * 4)
    count = words // bits * 4  # groups of eight codes
    spread = torch.zeros(rows, count, 8, dtype=torch.uint8, device=packed.device)
    spread[:, :, :bits] = flat.view(rows, count, bits)
    eights = spread.view(rows, count * 8).view(torch.int64)
    for width in (32, 16, 8):
        field = bits * width // 8  # bits that a closed field of `width` holds
        low = _every_other(field, 2 * width)
        high = (eights & (low << field)).bitwise_left_shift_(width - field)
        eights = (eights & low).bitwise_or_(high)
    return eights.view(torch.uint8)


def _every_other(field: int, period: int) -> int:
    """A 64-bit mask with the low `field` bits of every `period` bits set."""
    return sum(((1 << field) - 1) << start for start in range(0, 64, period))
