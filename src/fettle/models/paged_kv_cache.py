"""A paged key-value cache that any model of transformers can read: it gathers a sequence's pages when attention asks.

The pages of all blocks are allocated once, [pages, page_size, heads, width] for keys and for values; a call names the
slots that it writes and, for each row, the slots that it reads. Rows with pasts of different lengths are aligned at
their right end, exactly as transformers' own batched generation pads prompts on the left, so causal masks and sliding
windows come out right for every family, and masked slots are never looked at:

    row 0   · · · a b c | q          gathered [rows, longest]; the mask covers the dots
    row 1   d e f g h i | q

It is the reference: gathering copies the past of every row in every block. Memory: the pages, and one block's gathered
past.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor


class Pages:
    """Keys and values of all blocks; a block's tensors are made at its first use, when its shapes are known.

    Attributes:
        slots: pages times page size.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self.page_size, self.slots = page_size, pages * page_size
        self.blocks: dict[int, tuple[Tensor, Tensor]] = {}  # [slots, heads, width] each

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all blocks together."""
        total = sum(part.nbytes for pair in self.blocks.values() for part in pair)
        return total * self.page_size // self.slots

    def copy(self, source: int, target: int) -> None:
        """Copies a page in every block."""
        size = self.page_size
        for pair in self.blocks.values():
            for part in pair:
                part[target * size : (target + 1) * size] = part[source * size : (source + 1) * size]

    def update(self, block: int, keys: Tensor, values: Tensor, written: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values [rows, heads, tokens, width] into slots [rows, tokens]; gathers slots [rows, longest].

        Returns:
            Everything that the rows may attend to, [rows, heads, longest, width] each.
        """
        if block not in self.blocks:
            self.blocks[block] = (self._empty(keys), self._empty(values))
        gathered = []
        for held, new in zip(self.blocks[block], (keys, values), strict=True):
            held[written] = new.transpose(1, 2)  # [rows, tokens, heads, width]
            gathered.append(held[read].transpose(1, 2))  # [rows, heads, longest, width]
        return gathered[0], gathered[1]

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_zeros((self.slots, like.shape[1], like.shape[3]))


def paged_view(pages: Pages, blocks: int, written: Tensor, read: Tensor) -> Any:
    """What to give a model as `past_key_values` for one call.

    Args:
        pages: the cache.
        blocks: how many blocks the model has.
        written: slots of the new tokens, int64 [rows, tokens].
        read: slots of every row's whole context, the new tokens last, int64 [rows, longest]; anything where it is
            padded.
    """
    from transformers.cache_utils import Cache

    layer_class = _layer_class()
    return Cache(layers=[layer_class(pages, index, written, read) for index in range(blocks)])


@functools.cache
def _layer_class() -> Any:
    """The class of one block's view; made when asked for, as importing transformers takes seconds."""
    from transformers.cache_utils import CacheLayerMixin

    class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
        """One block's pages, seen through one call's slots."""

        is_sliding = False
        is_croppable = False

        def __init__(self, pages: Pages, block: int, written: Tensor, read: Tensor) -> None:
            super().__init__()
            self.pages, self.block, self.written, self.read = pages, block, written, read
            self.is_initialized = True

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            """Nothing to do: the pages are there."""

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """Adds tokens [rows, heads, tokens, width]; returns everything that attention may see."""
            return self.pages.update(self.block, key_states, value_states, self.written, self.read)

        def get_seq_length(self) -> int:
            """Tokens before this call, in the longest row."""
            return self.read.shape[1] - self.written.shape[1]

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            """Length and offset of what the mask has to cover."""
            return self.read.shape[1], 0

        def get_max_length(self) -> int:
            """No limit of its own."""
            return -1

    return PagedLayer
