"""Two models that cut text into other tokens, each measured alone: bits a byte compare, a KL there is none.

A trimmed vocabulary splits words that it lost into pieces that it kept, so no token of one model has its counterpart in
the other. What both are said in is the text itself.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fettle.evaluate.result import Evaluation
from fettle.evaluate.streaming import vocabulary
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint


def same_tokens(model: Path, reference: Path, *, generic: bool = False) -> bool:
    """Whether the two folders read the same token ids: as many of them, under the same words."""
    sizes = []
    for folder in (model, reference):
        embedding = read_anatomy(Checkpoint.open(folder), generic=generic).embedding
        sizes.append(None if embedding is None else embedding.shape[0])
    if None not in sizes and sizes[0] != sizes[1]:
        return False
    words = vocabulary(model), vocabulary(reference)
    return None in words or words[0] == words[1]


def beside(measured: Evaluation, original: Evaluation) -> Evaluation:
    """What was measured of a model alone, with the original's own figures as its reference."""
    return dataclasses.replace(
        measured, reference_perplexity=original.perplexity, reference_bits_per_byte=original.bits_per_byte,
        reference_perplexity_standard_error=original.perplexity_standard_error, reference_bytes=original.bytes,
        reference_model_bits_per_weight=original.model_bits_per_weight, reference_hashes=original.model_hashes,
    )  # fmt: skip
