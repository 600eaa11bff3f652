"""Keys and values of a cache as codes: keys by channel, values by token.

Liu et al.: KIVI, 2024, https://arxiv.org/abs/2402.02750. A few channels of the keys are large in every token, so a
range of its own for each channel keeps them from spoiling the others; values have no such channels, and a token's range
keeps an error within that token.

    keys     [heads, tokens, width]   a range for `group_size` tokens of one channel
    values   [heads, tokens, width]   a range for `group_size` channels of one token

    low = min, scale = (max - low) / (2^bits - 1), code = round((x - low) / scale),   x ≈ code · scale + low

Scales and lows are stored in float16, and codes are chosen for what is stored. Codes are packed as everywhere
(`packing.py`). Keys can only be coded once a whole group of tokens is there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fettle.errors import UsageError
from fettle.tensors.packing import pack_bits, unpack_bits

CACHE_BITS = (2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class CacheScheme:
    """How a key-value cache is kept."""

    bits: int = field(default=4, metadata={"help": "bits a number of the cache: 2, 4 or 8"})
    group_size: int = field(default=32, metadata={"help": "numbers that share a range: tokens of a key channel, "
                                                  "channels of a value token"})  # fmt: skip
    residual: int = field(default=32, metadata={"help": "newest tokens that stay as they are, at least"})

    def check(self) -> None:
        """Refuses what cannot be.

        Raises:
            UsageError: a value out of its range.
        """
        if self.bits not in CACHE_BITS:
            raise UsageError(f"bits is {self.bits}; a cache is kept in {', '.join(map(str, CACHE_BITS))} bits. Try 4")
        if self.group_size < 1:
            raise UsageError(f"group_size is {self.group_size}; it must be at least 1. Usual are 32, 64 and 128")
        if self.residual < 0:
            raise UsageError(f"residual is {self.residual}; it must be 0 or more tokens. Usual are 32 to 128")


@dataclass(frozen=True, kw_only=True, eq=False)
class CacheCodes:
    """Some tokens' keys or values, packed.

    Attributes:
        packed: int32 [rows, words], rows of `count` codes.
        scale: float16 [rows, groups].
        low: float16 [rows, groups].
        shape: (heads, tokens, width) of what they stand for.
    """

    packed: Tensor
    scale: Tensor
    low: Tensor
    shape: tuple[int, int, int]
    bits: int
    group_size: int
    by_channel: bool

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and lows."""
        return self.packed.nbytes + self.scale.nbytes + self.low.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[heads, tokens, width]."""
        heads, tokens, width = self.shape
        count = tokens if self.by_channel else width
        codes = unpack_bits(self.packed, self.bits, count).float()
        scale, low = (_spread(values.float(), count, self.group_size) for values in (self.scale, self.low))
        values = (codes * scale + low).to(dtype)
        if self.by_channel:
            return values.reshape(heads, width, tokens).transpose(1, 2)
        return values.reshape(heads, tokens, width)


def encode_keys(keys: Tensor, scheme: CacheScheme) -> CacheCodes:
    """Codes of keys [heads, tokens, width]: a range for `group_size` tokens of each channel."""
    heads, tokens, width = keys.shape
    rows = keys.transpose(1, 2).reshape(heads * width, tokens)
    return _encode(rows, (heads, tokens, width), scheme, by_channel=True)


def encode_values(values: Tensor, scheme: CacheScheme) -> CacheCodes:
    """Codes of values [heads, tokens, width]: a range for `group_size` channels of each token."""
    heads, tokens, width = values.shape
    return _encode(values.reshape(heads * tokens, width), (heads, tokens, width), scheme, by_channel=False)


def _encode(rows: Tensor, shape: tuple[int, int, int], scheme: CacheScheme, *, by_channel: bool) -> CacheCodes:
    count, size = rows.shape[1], min(scheme.group_size, rows.shape[1])
    wide = rows.float()
    pieces = [wide[:, start : start + size] for start in range(0, count, size)]
    ends = [torch.aminmax(piece, dim=1) for piece in pieces]
    low = torch.stack([end.min for end in ends], dim=1).to(torch.float16)
    high = torch.stack([end.max for end in ends], dim=1)
    steps = 2**scheme.bits - 1
    scale = ((high - low.float()) / steps).clamp(min=0).to(torch.float16)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale)).float()  # a constant group: code 0 stands for its low
    units = (wide - _spread(low.float(), count, size)) / _spread(safe, count, size)
    codes = units.round_().clamp_(0, steps).to(torch.uint8)
    return CacheCodes(
        packed=pack_bits(codes, scheme.bits), scale=scale, low=low, shape=shape, bits=scheme.bits, group_size=size,
        by_channel=by_channel,
    )  # fmt: skip


def _spread(values: Tensor, count: int, size: int) -> Tensor:
    return values.repeat_interleave(size, dim=1)[:, :count]
