"""A key-value cache that keeps old tokens as codes, for any model that takes transformers' caches.

What enters the attention is what a decoder with such a cache would see: tokens that were coded before this call come
from their codes; the tokens of this call and the newest ones (`residual`, and up to a group more, since a group of keys
is coded whole) are exact. So a long text has to be fed in pieces to see the cost: fed at once, nothing is old yet.

It is the reference: codes are unpacked at every call, so it saves memory and not time.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fettle.errors import UsageError
from fettle.models.loading import LoadedModel
from fettle.tensors.cache_codes import CacheCodes, CacheScheme, encode_keys, encode_values


def quantized_cache(loaded: LoadedModel, scheme: CacheScheme) -> Any:
    """An empty cache for this model, to be given as `past_key_values`.

    Raises:
        UsageError: a scheme that cannot be, or a model that keeps no plain cache in every block.
    """
    from transformers import DynamicCache

    scheme.check()
    plain = DynamicCache(config=loaded.model.config)
    if any(getattr(layer, "is_sliding", False) for layer in plain.layers):
        raise UsageError(
            f"{loaded.folder} forgets old tokens in some blocks (sliding windows); a coded cache is for models that "
            "attend to all of them"
        )
    layer_class = _layer_class()
    cache = DynamicCache()
    cache.layers = [layer_class(scheme) for _ in range(len(loaded.anatomy.blocks))]
    cache.layer_class_to_replicate = None
    return cache


def cache_bytes(cache: Any) -> int:
    """Bytes that the keys and values of a cache take, coded or not, of any of transformers' caches."""
    total = 0
    for layer in cache.layers:
        held = getattr(layer, "coded", [])
        total += sum(codes.nbytes for pair in held for codes in pair)
        total += sum(part.nbytes for part in (layer.keys, layer.values) if part is not None)
    return total


@functools.cache
def _layer_class() -> Any:
    """The class of one block's cache; made when asked for, as importing transformers takes seconds."""
    from transformers.cache_utils import DynamicLayer

    class CodedLayer(DynamicLayer):  # type: ignore[misc]
        """`keys` and `values` hold the newest tokens as they are, `coded` the older ones."""

        is_croppable = False

        def __init__(self, scheme: CacheScheme) -> None:
            super().__init__()
            self.keys: Any = None
            self.values: Any = None
            self.scheme = scheme
            self.coded: list[tuple[CacheCodes, CacheCodes]] = []
            self.coded_tokens = 0

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """Adds tokens [1, heads, tokens, width]; returns everything that attention may see."""
            if key_states.shape[0] != 1:
                raise UsageError(f"a coded cache holds one sequence, got {key_states.shape[0]}; run them one by one")
            super().update(key_states, value_states)
            keys = [pair[0].dequantize(self.keys.dtype).unsqueeze(0) for pair in self.coded]
            values = [pair[1].dequantize(self.values.dtype).unsqueeze(0) for pair in self.coded]
            seen = torch.cat([*keys, self.keys], dim=-2), torch.cat([*values, self.values], dim=-2)
            self._code_old_tokens()
            return seen

        def _code_old_tokens(self) -> None:
            size = self.scheme.group_size
            while self.keys.shape[-2] >= self.scheme.residual + size:
                old = self.keys[0, :, :size], self.values[0, :, :size]
                self.coded.append((encode_keys(old[0], self.scheme), encode_values(old[1], self.scheme)))
                self.coded_tokens += size
                self.keys, self.values = self.keys[:, :, size:].clone(), self.values[:, :, size:].clone()

        def get_seq_length(self) -> int:
            """Tokens held, coded ones included."""
            return self.coded_tokens + (self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            """Length and offset of what the mask has to cover."""
            return self.get_seq_length() + query_length, 0

    return CodedLayer
