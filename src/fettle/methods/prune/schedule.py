"""Iterative pruning: how the sparsity grows from round to round, and the loop that prunes and heals.

    one shot   rounds = 1
    linear     s_t = s · t/n
    cubic      s_t = s · (1 - (1 - t/n)³)          Zhu, Gupta 2017, https://arxiv.org/abs/1710.01878, equation 1

for t = 1 … n. The cubic one prunes most while many weights are still to spare. The loop knows neither what is pruned
nor what heals: a weight and least squares (`healing.py`), or a whole model and an epoch of training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

ScheduleName = Literal["cubic", "linear"]
State = TypeVar("State")


def sparsities(target: float, rounds: int, schedule: ScheduleName = "cubic") -> list[float]:
    """The sparsity of each round, ascending; the last is `target` itself.

    >>> sparsities(0.8, 2)
    [0.7, 0.8]
    """
    growth: Callable[[float], float] = (lambda t: 1 - (1 - t) ** 3) if schedule == "cubic" else (lambda t: t)
    return [target * growth(done / rounds) for done in range(1, rounds)] + [target]


def prune_in_rounds(
    start: State,
    steps: Sequence[float],
    prune: Callable[[State, float], State],
    heal: Callable[[State], State],
) -> State:
    """Prunes to each sparsity in turn and heals after each.

    Args:
        start: what is pruned, of any kind.
        steps: the sparsity of each round (`sparsities`).
        prune: the state pruned to a sparsity; what went before has the least score and goes again.
        heal: the state made better with the same mask.
    """
    state = start
    for sparsity in steps:
        state = heal(prune(state, sparsity))
    return state
