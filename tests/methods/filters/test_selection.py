"""Which channels go: shares, floors, multiples, grouped convolutions; by brute force where it can be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fettle.errors import RecipeError
from fettle.methods.filters.dependencies import ChannelGroup
from fettle.methods.filters.selection import Shares, removed_channels


def group(name: str, size: int, repeats: int = 1) -> ChannelGroup:
    return ChannelGroup(name, size, repeats, (), None)


def removed(scores: dict[str, list[float]], shares: Shares, repeats: int = 1, original: int | None = None) -> dict:
    groups = [group(name, len(values), repeats) for name, values in scores.items()]
    tensors: dict[str, Tensor] = {name: torch.tensor(values) for name, values in scores.items()}
    return removed_channels(groups, tensors, {g.name: original or g.size for g in groups}, shares)


def test_the_least_go_and_of_equals_the_first_stay() -> None:
    assert removed({"a": [3.0, 1.0, 2.0, 4.0]}, Shares(sparsity=0.5)) == {"a": [1, 2]}
    assert removed({"a": [1.0] * 4}, Shares(sparsity=0.5)) == {"a": [2, 3]}


def test_a_grouped_convolution_loses_the_same_positions_in_each_group() -> None:
    scores = {"a": [0.0, 5.0, 1.0, 9.0, 1.0, 1.0]}  # positions sum to 9, 6, 2
    assert removed(scores, Shares(sparsity=0.3), repeats=2) == {"a": [2, 5]}


def test_shares_count_from_the_original_width() -> None:
    assert removed({"a": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}, Shares(sparsity=0.5), original=8) == {"a": [0, 1]}


def test_widths_are_multiples_where_one_is_asked() -> None:
    found = removed({"a": [float(i) for i in range(20)]}, Shares(sparsity=0.35, multiple=8))
    assert len(found["a"]) == 12


def test_global_takes_the_least_of_all_groups_down_to_their_floors() -> None:
    scores = {"a": [0.1, 0.2, 0.3, 0.4], "b": [5.0, 6.0, 7.0, 0.0]}
    assert removed(scores, Shares(sparsity=0.5, scope="global", least=0.25)) == {"a": [0, 1, 2], "b": [3]}


@settings(deadline=None, max_examples=60)
@given(
    scores=st.lists(st.lists(st.integers(0, 50), min_size=2, max_size=9), min_size=1, max_size=4),
    sparsity=st.sampled_from([0.2, 0.5, 0.7]),
)
def test_global_keeps_as_much_as_any_choice_with_the_same_floors(scores: list[list[int]], sparsity: float) -> None:
    named = {str(i): [float(v) for v in values] for i, values in enumerate(scores)}
    least = 0.2
    try:
        gone = removed(named, Shares(sparsity=sparsity, scope="global", least=least))
    except RecipeError:
        return
    kept = {name: [v for i, v in enumerate(values) if i not in gone[name]] for name, values in named.items()}
    assert sum(map(len, kept.values())) == round(sum(map(len, named.values())) * (1 - sparsity))
    floors = {name: max(1, -int(-len(values) * least // 1)) for name, values in named.items()}
    best = sum(sum(sorted(named[name], reverse=True)[:count]) for name, count in floors.items())
    rest = sorted((v for n, vs in named.items() for v in sorted(vs, reverse=True)[floors[n] :]), reverse=True)
    best += sum(rest[: sum(map(len, kept.values())) - sum(floors.values())])
    assert sum(map(sum, kept.values())) == pytest.approx(best)


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        (Shares(sparsity=0.9), "leaves no filter of the 4"),
        (Shares(sparsity=0.5, multiple=8), "smaller multiple"),
        (Shares(sparsity=0.9, scope="global", least=0.5), "smaller least"),
    ],
)
def test_a_share_that_leaves_no_filter_is_refused(shares: Shares, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        removed({"a": [1.0, 2.0, 3.0, 4.0]}, shares)
