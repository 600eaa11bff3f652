"""Teachers: what gives its outputs for tokens, and whether they mean the same to the student.

One runs along here; several are one in `several.py`; one whose largest logits were written down is `kept_answers.py`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Protocol

import torch
from torch import Tensor

from fettle.errors import UsageError
from fettle.methods.train.outputs import Observed, Outputs

PROBE = "def f(x):\n    return x + 1  # Once upon a time, there was a cat.\n"


class Teacher(Protocol):
    """Gives its outputs for tokens."""

    def __call__(self, input_ids: Tensor, window: Tensor | None = None) -> Outputs:
        """Outputs for int64 [batch, tokens], which are these windows [batch] of the training text; no gradient."""
        ...


class Live:
    """A model that runs along, without gradients."""

    def __init__(self, observed: Observed) -> None:
        self.observed = observed

    def __call__(self, input_ids: Tensor, window: Tensor | None = None) -> Outputs:
        """Its outputs, which do not depend on the number of the window."""
        with torch.no_grad():
            return self.observed(input_ids)


def share_tokens(student: Any, teacher: Any) -> bool:
    """Whether two tokenizers give the same ids for the same text; not where one is missing."""
    if student is None or teacher is None or student.get_vocab() != teacher.get_vocab():
        return False
    return bool(student(PROBE)["input_ids"] == teacher(PROBE)["input_ids"])


def require_same_tokens(student: Any, teacher: Any, names: tuple[str, str]) -> None:
    """Raises UsageError where two tokenizers do not give the same ids for the same text: their logits then mean
    different things, token by token.
    """
    if teacher is None:
        raise UsageError(f"the teacher {names[1]} has no tokenizer; give the whole folder of the model")
    if not share_tokens(student, teacher):
        ours, theirs = student.get_vocab(), teacher.get_vocab()
        differing = sum(ours.get(word) != number for word, number in theirs.items())
        raise UsageError(
            f"{names[0]} and {names[1]} have different tokenizers ({len(ours):,} and {len(theirs):,} entries, "
            f"{differing:,} of the teacher's mean something else to the student), so their predictions cannot be "
            "compared token by token. Give a teacher of the same family, or let it write the text, which is tokenized "
            "anew: written: 1, hard: 1, soft: 0"
        )


def tokens_hash(tokenizer: Any) -> str:
    """SHA-256 of what `require_same_tokens` compares, so that who has it needs no second tokenizer."""
    told = [sorted(tokenizer.get_vocab().items()), list(tokenizer(PROBE)["input_ids"])]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
