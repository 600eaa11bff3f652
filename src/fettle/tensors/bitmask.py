"""Masks as bits: one a weight, one a block, or two indices of two bits for every four weights (2:4).

    a row        columns 0 … 7 in byte 0, least significant bit first; the last byte is filled with zeros
    2:4          inputs 0 … 3 keep those of index a < b: the nibble a | b << 2; inputs 4 … 7 are the byte's high nibble;
                 a last byte with one group has a zero high nibble

Cost: a few vectorised operations on bytes, in tiles of rows by whoever calls.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fettle.tensors.patterns import Pattern


def pack_mask(kept: Tensor, pattern: Pattern) -> Tensor:
    """The stored form of a mask, bool [out, in] that fits its pattern: uint8 [rows, bytes]."""
    if pattern.is_two_of_four:
        return _pack_two_of_four(kept)
    if pattern.kind == "block":
        kept = kept[:: pattern.rows, :: pattern.columns]  # a block's weights agree
    return _pack_bits(kept)


def unpack_mask(packed: Tensor, shape: tuple[int, int], pattern: Pattern) -> Tensor:
    """The inverse for a weight [out, in]: bool [out, in]. Damaged indices keep fewer than two of four."""
    if pattern.is_two_of_four:
        return _unpack_two_of_four(packed, shape)
    if pattern.kind != "block":
        return _unpack_bits(packed, shape[1])
    blocks = _unpack_bits(packed, shape[1] // pattern.columns)
    return blocks.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.columns, 1)


def _pack_bits(mask: Tensor) -> Tensor:
    rows, columns = mask.shape
    padded = pad(mask.to(torch.uint8), (0, -columns % 8)).view(rows, -1, 8)
    packed = torch.zeros(padded.shape[:2], dtype=torch.uint8, device=mask.device)
    for bit in range(8):
        packed |= padded[:, :, bit] << bit
    return packed


def _unpack_bits(packed: Tensor, columns: int) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1  # [rows, bytes, 8]
    return bits.flatten(1)[:, :columns].bool()


def _pack_two_of_four(kept: Tensor) -> Tensor:
    rows, columns = kept.shape
    groups = kept.view(rows, columns // 4, 4)
    places = torch.arange(4, dtype=torch.uint8, device=kept.device)
    first = torch.where(groups, places, 3).amin(-1)
    last = torch.where(groups, places, 0).amax(-1)
    nibbles = pad(first | last << 2, (0, columns // 4 % 2)).view(rows, -1, 2)
    return nibbles[:, :, 0] | nibbles[:, :, 1] << 4


def _unpack_two_of_four(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, : shape[1] // 4]  # [rows, groups]
    kept = torch.zeros(*nibbles.shape, 4, dtype=torch.bool, device=packed.device)
    kept.scatter_(-1, (nibbles & 3).long().unsqueeze(-1), True)
    kept.scatter_(-1, (nibbles >> 2).long().unsqueeze(-1), True)
    return kept.view(shape)
