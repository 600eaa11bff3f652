"""The cache's bookkeeping: properties over random histories, and the rules of reuse and eviction by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.engine.paged_cache import PagedCache

SIZE = 4


def sealed(cache: PagedCache, tokens: list[int], salt: bytes = b"") -> list[int]:
    """Pages that hold these tokens, every full one sealed."""
    pages = cache.take(cache.pages_for(len(tokens)))
    assert pages is not None
    before = None
    for index in range(len(tokens) // SIZE):
        before = cache.seal(pages[index], before, tokens[index * SIZE : (index + 1) * SIZE], salt)
    return pages


def test_a_prefix_is_found_page_by_page() -> None:
    cache = PagedCache(8, SIZE)
    pages = sealed(cache, list(range(10)))
    assert cache.find(list(range(10))) == pages[:2]
    assert cache.find([*range(4), 9, 9, 9, 9]) == pages[:1]
    assert cache.find([1, *range(1, 10)]) == []
    assert cache.find(list(range(10)), b"long") == []
    assert cache.find(list(range(3))) == []


def test_the_same_page_behind_another_prefix_is_another_page() -> None:
    cache = PagedCache(8, SIZE)
    sealed(cache, [1, 1, 1, 1, 5, 5, 5, 5])
    assert cache.find([2, 2, 2, 2, 5, 5, 5, 5]) == []
    assert len(cache.find([1, 1, 1, 1, 5, 5, 5, 5])) == 2


def test_released_pages_are_found_until_they_are_needed_ends_first() -> None:
    cache = PagedCache(4, SIZE)
    old = sealed(cache, list(range(8)))
    cache.release(old)
    young = sealed(cache, list(range(100, 108)))  # takes the two that never held anything
    cache.release(young)
    assert cache.find(list(range(8))) == old
    cache.take(1)
    assert cache.find(list(range(8))) == old[:1]  # the end of the oldest prefix went first
    cache.take(1)
    assert cache.find(list(range(8))) == []
    assert cache.find(list(range(100, 108))) == young


def test_taking_more_than_there_is_takes_nothing() -> None:
    cache = PagedCache(3, SIZE)
    assert cache.take(4) is None
    assert cache.free_pages == 3


def test_a_sealed_or_shared_page_is_copied_before_it_is_written() -> None:
    cache = PagedCache(4, SIZE)
    (page,) = sealed(cache, [1, 2, 3, 4])
    assert cache.writable(page) == (1, (0, 1))
    assert cache.holders(page) == 0 and cache.holders(1) == 1
    assert cache.writable(1) == (1, None)
    cache.hold([1])
    assert cache.writable(1) == (2, (1, 2))
    assert cache.holders(1) == 1
    taken = cache.take(2)
    assert taken is not None
    cache.hold([1])
    assert cache.writable(1) is None


def test_without_reuse_nothing_is_found() -> None:
    cache = PagedCache(4, SIZE, reuse=False)
    pages = sealed(cache, [1, 2, 3, 4])
    assert cache.find([1, 2, 3, 4]) == []
    assert not cache.is_sealed(pages[0])


def test_releasing_too_often_is_a_defect() -> None:
    cache = PagedCache(1, SIZE)
    pages = cache.take(1)
    cache.release(pages)
    with pytest.raises(AssertionError, match="more often"):
        cache.release(pages)


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["start", "start", "end", "write"]), TOKENS, st.integers(0, 9)), max_size=40))
def test_any_history_keeps_the_counts_and_finds_only_what_is_equal(history: list[tuple[str, list[int], int]]) -> None:
    cache = PagedCache(7, SIZE)
    held: list[list[int]] = []  # pages of living sequences
    contents: dict[int, tuple[int, ...]] = {}  # page → all tokens up to its end, as sealed last
    for what, tokens, pick in history:
        if what == "start":
            found = cache.find(tokens)
            for index, page in enumerate(found):
                assert contents[page] == tuple(tokens[: (index + 1) * SIZE])
            if cache.pages_for(len(tokens)) - len(found) > cache.free_after(found):
                continue
            cache.hold(found)
            rest = cache.take(cache.pages_for(len(tokens)) - len(found))
            assert rest is not None and not set(rest) & set(found)
            pages, before = [*found, *rest], None
            for index in range(len(tokens) // SIZE):
                before = cache.seal(pages[index], before, tokens[index * SIZE : (index + 1) * SIZE])
                contents[pages[index]] = tuple(tokens[: (index + 1) * SIZE])
            held.append(pages)
        elif held and what == "end":
            cache.release(held.pop(pick % len(held)))
        elif held:
            pages = held[pick % len(held)]
            free = cache.free_pages
            written = cache.writable(pages[-1])
            assert (written is None) == (free == 0 and (cache.is_sealed(pages[-1]) or cache.holders(pages[-1]) > 1))
            pages[-1] = pages[-1] if written is None else written[0]
        counts = [sum(page in pages for pages in held) for page in range(cache.pages)]
        assert counts == [cache.holders(page) for page in range(cache.pages)]
        assert cache.free_pages == counts.count(0)
    for pages in held:
        cache.release(pages)
    assert cache.free_pages == cache.pages
