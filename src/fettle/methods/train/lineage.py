"""Whether a base's weights can be compared, one by one, with those of the model that it was made from.

Rotations, rescalings (AWQ, SmoothQuant) and other shapes leave a function alone or nearly so, and give its matrices
other coordinates or other places: the difference of two such weights says nothing about what was lost.
"""

from __future__ import annotations

from fettle.methods.protocols import RescalingMethod
from fettle.methods.registry import METHODS
from fettle.methods.train.writing import BEGUN_AFRESH
from fettle.models.checkpoint import Checkpoint
from fettle.models.rotated import BASIS_KEY


def moved(checkpoint: Checkpoint) -> str | None:
    """What moved the weights of a written base away from its original's coordinates, in words; None if nothing did."""
    record = checkpoint.record or {}
    if BASIS_KEY in checkpoint.config:
        return "it is rotated"
    if record.get("reshaped"):
        return "it has another shape"
    if record.get(BEGUN_AFRESH):
        return "it was trained from random weights"
    steps = (record.get("recipe") or {}).get("steps") or ()
    rescaled = [step["method"] for step in steps if issubclass(METHODS.get(step["method"], object), RescalingMethod)]
    return f"{rescaled[0]} rescaled its columns" if rescaled else None
