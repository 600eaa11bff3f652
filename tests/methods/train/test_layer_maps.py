"""Layer maps: what the literature's students look at, and what no map can be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.errors import RecipeError
from fettle.methods.train.layer_maps import layer_map


def test_the_maps_of_the_papers() -> None:
    assert layer_map("uniform", 6, 12) == [1, 3, 5, 7, 9, 11]
    assert layer_map("last", 6, 12) == [6, 7, 8, 9, 10, 11]
    assert layer_map("skip", 6, 12) == [0, 1, 2, 9, 10, 11]


@given(st.sampled_from(["uniform", "last", "skip"]), st.integers(1, 40), st.integers(0, 40))
def test_a_map_rises_and_ends_at_the_last_layer(name: str, student: int, more: int) -> None:
    found = layer_map(name, student, student + more)
    assert len(found) == student
    assert found == sorted(set(found))
    assert found[0] >= 0
    assert found[-1] == student + more - 1 or (name == "skip" and student == 1)


@pytest.mark.parametrize(("student", "teacher"), [(0, 4), (5, 4)])
def test_a_student_deeper_than_its_teacher_is_refused(student: int, teacher: int) -> None:
    with pytest.raises(RecipeError, match=f"teacher of {teacher}; allowed: 1 to {teacher}"):
        layer_map("uniform", student, teacher)
