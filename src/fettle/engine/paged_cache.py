"""Who holds which page of the key-value cache: reference counts, prefix reuse by hash, least recently used eviction.

A page is `page_size` neighbouring tokens of one sequence. A full page is sealed with a hash of all up to its end,

    hash_i = H(hash_{i-1}, tokens of page i)        hash_{-1} = H(salt)

so equal hashes mean equal prefixes, and a new sequence takes over the pages of the longest one that is still there
(vLLM's automatic prefix caching; the hash is 128 bits, so two prefixes do not meet by chance). A page that nobody
holds any more stays findable until its place is needed; of those, the one left longest ago goes first, and the end of a
prefix before its beginning. A sealed page is never written: who has to write into one gets a copy.

All of it is bookkeeping: no tensor is touched here, and every operation costs time linear in the pages it names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Listed
from hashlib import blake2b

import numpy as np

HASH_BYTES = 16


class PagedCache:
    """The pages 0 … pages - 1, each free or held by one or more sequences.

    Attributes:
        pages: how many there are.
        page_size: tokens a page.
        reused_tokens: how many tokens were taken over instead of computed, in all.
    """

    def __init__(self, pages: int, page_size: int, *, reuse: bool = True) -> None:
        self.pages, self.page_size, self.reused_tokens = pages, page_size, 0
        self._reuse = reuse
        self._holders = [0] * pages
        self._hash_of: dict[int, bytes] = {}  # sealed pages that can be found
        self._page_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(pages))  # the next to be taken first

    @property
    def free_pages(self) -> int:
        """How many pages nobody holds; sealed ones that may be found again count as free."""
        return len(self._free)

    def holders(self, page: int) -> int:
        """How many sequences hold this page."""
        return self._holders[page]

    def is_sealed(self, page: int) -> bool:
        """Whether the page can be found by its hash, and therefore must not be written."""
        return page in self._hash_of

    def pages_for(self, tokens: int) -> int:
        """How many pages this many tokens take."""
        return -(-tokens // self.page_size)

    def find(self, tokens: Listed[int], salt: bytes = b"") -> list[int]:
        """The pages that hold the longest known prefix of these tokens; nobody's count changes."""
        found: list[int] = []
        chain = _root(salt)
        for start in range(0, len(tokens) - self.page_size + 1, self.page_size) if self._reuse else ():
            chain = _link(chain, tokens[start : start + self.page_size])
            page = self._page_of.get(chain)
            if page is None:
                break
            found.append(page)
        return found

    def free_after(self, found: Listed[int]) -> int:
        """How many pages would be free once these are held."""
        return len(self._free) - sum(self._holders[page] == 0 for page in found)

    def hold(self, found: Listed[int]) -> None:
        """One more holder for each of these pages, which `find` named."""
        for page in found:
            self._free.pop(page, None)
            self._holders[page] += 1
        self.reused_tokens += len(found) * self.page_size

    def take(self, count: int) -> list[int] | None:
        """`count` empty pages with one holder each, or None where there are not as many; then nothing is taken."""
        if count > len(self._free):
            return None
        taken = []
        for _ in range(count):
            page, _ = self._free.popitem(last=False)
            self._unseal(page)
            self._holders[page] = 1
            taken.append(page)
        return taken

    def release(self, pages: Listed[int]) -> None:
        """One holder less for each page, given in the order of positions."""
        for page in reversed(pages):  # the end of a prefix is given away before its beginning
            assert self._holders[page] > 0, f"page {page} is released more often than it was held"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free[page] = None
                if page not in self._hash_of:
                    self._free.move_to_end(page, last=False)  # worth nothing to anybody: the first to be taken

    def seal(self, page: int, before: bytes | None, tokens: Listed[int], salt: bytes = b"") -> bytes:
        """Makes a full page findable and returns its hash; `before` is that of the page in front, if there is one.

        Where another page already has the same prefix, that one stays the one to be found.
        """
        chain = _link(_root(salt) if before is None else before, tokens)
        if self._reuse and chain not in self._page_of and page not in self._hash_of:
            self._page_of[chain] = page
            self._hash_of[page] = chain
        return chain

    def writable(self, page: int) -> tuple[int, tuple[int, int] | None] | None:
        """A page with the same contents that may be written: itself, or a new one with (from, to) to be copied.

        The caller holds `page`; where a copy is made, the caller holds the copy instead. None: no page is free for it.
        """
        if page not in self._hash_of and self._holders[page] == 1:
            return page, None
        taken = self.take(1)
        if taken is None:
            return None
        self.release([page])
        return taken[0], (page, taken[0])

    def _unseal(self, page: int) -> None:
        chain = self._hash_of.pop(page, None)
        if chain is not None:
            del self._page_of[chain]


def _root(salt: bytes) -> bytes:
    return blake2b(salt, digest_size=HASH_BYTES).digest()


def _link(before: bytes, tokens: Listed[int]) -> bytes:
    return blake2b(before + np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=HASH_BYTES).digest()
