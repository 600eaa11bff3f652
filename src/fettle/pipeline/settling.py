"""Methods whose scheme follows from the weight, asked before the layout: a rank from a share or from an energy.

A layout knows every byte before any work, so whatever a weight decides about its own scheme is decided here. A share
follows from the shape; an energy reads each weight once more, a few at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

from fettle.methods.protocols import MatrixMethod, SettledMethod
from fettle.models.anatomy import Anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.storage import read_weight
from fettle.workers import Workers


def settle(
    checkpoint: Checkpoint, anatomy: Anatomy, assigned: Mapping[str, MatrixMethod], workers: Workers
) -> dict[str, MatrixMethod]:
    """The methods by linear, each with a scheme of its own; NonFiniteError names a damaged weight."""

    def one(name: str) -> MatrixMethod:
        method = assigned[name]
        if not isinstance(method, SettledMethod):
            return method
        linear = anatomy.find(name)
        return method.settled(linear.shape, lambda: read_weight(checkpoint, linear))

    with workers:
        return dict(zip(assigned, workers.map(one, assigned), strict=True))
