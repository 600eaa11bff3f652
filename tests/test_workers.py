"""The pool: order, exceptions, threads, and one order for every sum."""

from __future__ import annotations

import threading

import pytest
import torch

from fettle.workers import Workers, available_threads


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_keep_the_order_of_the_items(threads: int) -> None:
    with Workers(threads) as workers:
        assert workers.map(lambda x: x * x, range(20)) == [x * x for x in range(20)]


def test_torch_has_one_thread_inside_and_the_old_number_after() -> None:
    before = torch.get_num_threads()
    with Workers(2) as workers:
        assert torch.get_num_threads() == 1
        assert set(workers.map(lambda _: torch.get_num_threads(), range(4))) == {1}
        with workers:
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_it_restores_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), Workers(2):
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("threads", [1, 2])
def test_exceptions_come_through(threads: int) -> None:
    def fail(item: int) -> int:
        if item == 3:
            raise ValueError(f"item {item}")
        return item

    with Workers(threads) as workers:
        with pytest.raises(ValueError, match="item 3"):
            workers.map(fail, range(8))
        assert workers.map(fail, [1]) == [1]


def test_pieces_really_run_side_by_side() -> None:
    barrier = threading.Barrier(2, timeout=20)  # breaks unless two pieces wait at the same time
    with Workers(2) as workers:
        workers.map(lambda _: barrier.wait(), range(2))


def test_a_map_inside_a_map_does_not_wait_for_itself() -> None:
    with Workers(2) as workers:
        assert workers.map(lambda x: sum(workers.map(lambda y: x * y, range(3))), range(4)) == [0, 3, 6, 9]


def test_gradient_mode_is_the_callers() -> None:
    with Workers(2) as workers:
        with torch.no_grad():
            assert workers.map(lambda _: torch.is_grad_enabled(), range(3)) == [False] * 3
        assert workers.map(lambda _: torch.is_grad_enabled(), range(3)) == [True] * 3


def test_the_default_is_what_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert available_threads() == Workers().threads == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "nonsense")
    assert available_threads() >= 1
