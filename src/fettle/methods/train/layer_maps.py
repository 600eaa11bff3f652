"""Which layer of the teacher a layer of the student looks at.

    uniform   evenly over the depth, ending at the last      6 → 3:  1 3 5      (DistilBERT's and TinyBERT's choice)
    last      the teacher's last ones                        6 → 3:  3 4 5
    skip      the first half of the depth from the start, the second from the end   6 → 3:  0 1 5

The same maps say which blocks a student made of the teacher's own keeps (`students.py`). Two more, influence and loss,
follow from measurements (`layer_search.py`).
"""

from __future__ import annotations

from typing import Literal

from fettle.errors import RecipeError

LayerMap = Literal["uniform", "last", "skip", "influence", "loss"]
SEARCHED = ("influence", "loss")


def layer_map(name: LayerMap, student: int, teacher: int) -> list[int]:
    """For each of the student's layers, in order, the index of the teacher's, by a map that needs no measurement.

    Raises:
        RecipeError: the student is deeper than the teacher, or has no layer.

    >>> layer_map("uniform", 3, 6), layer_map("last", 3, 6), layer_map("skip", 3, 6)
    ([1, 3, 5], [3, 4, 5], [0, 1, 5])
    """
    if not 1 <= student <= teacher:
        raise RecipeError(
            f"a student of {student} layers cannot look at a teacher of {teacher}; allowed: 1 to {teacher} layers"
        )
    if name == "last":
        return list(range(teacher - student, teacher))
    if name == "skip":
        first = (student + 1) // 2
        return [*range(first), *range(teacher - (student - first), teacher)]
    return [(index + 1) * teacher // student - 1 for index in range(student)]
