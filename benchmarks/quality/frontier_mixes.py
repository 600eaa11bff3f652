"""fettle's mixes in `frontier.py`: what a budget may choose from at each width, and what is trained afterwards.

A mix is chosen and compressed once, and kept beside the results; a contender that trains goes on from it, with the
same calibration windows as everybody and no other text: `qat`, taught by the original. Its fields were chosen on
stories260K, mostly with text that is not scored (`docs/log.md` says which looks were on the scored one).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

BITS = {2: (2, 3, 4), 3: (2, 3, 4, 5), 4: (3, 4, 5, 6)}  # that a budget may give a linear
VECTOR_BITS = {2: (2, 3), 3: (2, 3, 4), 4: (3, 4)}  # of codes of eight weights
GROUPS = (32, 64, 128)
ABOVE = {"asymmetric": 0.56, "symmetric": 0.51}  # bits of a peer's groups of 32, with and without zero points
TRAINING: dict[str, Any] = {
    "steps": 100, "batch_windows": 8, "learning_rate": 0.01, "scale_rate": 0.05, "rate_in": "levels", "held_back": 0,
    "keep": "last", "look_every": 1_000_000,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Mix:
    """A budget of `bits_per_weight` over `candidates`; `training` holds the fields of a `qat` afterwards."""

    label: str
    width: int
    bits_per_weight: float
    candidates: tuple[str, ...]
    training: dict[str, Any] | None = None


def mixes(width: int) -> Iterator[Mix]:
    """The mixes that take part at a width."""
    if width not in BITS:
        return
    levels = tuple(
        f"learned_rounding bits={bits} group_size={size} asymmetric=true scale_dtype=float16"
        for bits in BITS[width]
        for size in GROUPS
    )
    vectors = tuple(f"residual_codebooks bits={bits} scale_dtype=float16" for bits in VECTOR_BITS[width])
    label = "learned_rounding, mix of a budget"
    high, low = width + ABOVE["asymmetric"], width + ABOVE["symmetric"]
    yield Mix(label=label, width=width, bits_per_weight=high, candidates=levels)
    label += " with vector codes"
    bits = high if width == 2 else low
    yield Mix(label=label, width=width, bits_per_weight=bits, candidates=(*vectors, *levels))
    both = Mix(label=f"{label}, small", width=width, bits_per_weight=low, candidates=(*vectors, *levels))
    if both.bits_per_weight != bits:
        yield both
    yield dataclasses.replace(both, label=f"{label}, then qat", training=TRAINING)
