"""Teachers: one that runs along, or one whose largest logits were written down; several are one in `several.py`.

A teacher's answer to a window never changes, so its k largest log-probabilities can be kept: `keep_answers` runs the
teacher once over every window and writes chunks of them; a killed run goes on with the chunk that is missing. Size:

    bytes = windows · (tokens - 1) · (k · (4 + 4) + 4)        int32 indices, float32 log-probabilities, float32 rest

With T the temperature, log-probabilities are those of softmax(z / T), and `rest` is the log of what the others come to.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fettle.errors import ResumeError, UsageError
from fettle.methods.train.kept import keep, recall, recall_json
from fettle.methods.train.outputs import Observed, Outputs
from fettle.models.writer import write_json
from fettle.progress import Progress

CHUNK_WINDOWS = 32
IDENTITY = "teacher.json"


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


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptAnswers:
    """A teacher's largest log-probabilities for every window, [windows, tokens - 1, k], and the rest's, without k."""

    indices: Tensor
    kept: Tensor
    rest: Tensor


def require_same_tokens(student: Any, teacher: Any, names: tuple[str, str]) -> None:
    """Raises UsageError where two tokenizers do not give the same ids for the same text: their logits then mean
    different things, token by token.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    probe = "def f(x):\n    return x + 1  # Once upon a time, there was a cat.\n"
    same = ours == theirs and student(probe)["input_ids"] == teacher(probe)["input_ids"]
    if not same:
        differing = sum(ours.get(word) != number for word, number in theirs.items())
        raise UsageError(
            f"{names[0]} and {names[1]} have different tokenizers ({len(ours):,} and {len(theirs):,} entries, "
            f"{differing:,} of the teacher's mean something else to the student), so their predictions cannot be "
            "compared token by token. Give a teacher of the same family, or let it write the text, which is tokenized "
            "anew: written: 1, hard: 1, soft: 0"
        )


def answer_bytes(windows: int, tokens: int, k: int) -> int:
    """Bytes of the kept answers, without the files' headers."""
    return windows * (tokens - 1) * (8 * k + 4)


def keep_answers(
    teacher: Teacher,
    ids: Tensor,
    *,
    k: int,
    temperature: float,
    folder: Path,
    identity: dict[str, Any],
    progress: Progress,
) -> None:
    """Writes what is missing of a teacher's answers for windows int64 [windows, tokens].

    Raises:
        UsageError: `folder` holds the answers of another teacher, text or temperature.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = {**identity, "k": k, "temperature": temperature, "windows": len(ids), "tokens": ids.shape[1]}
    path = folder / IDENTITY
    if path.is_file() and recall_json(path) != told:
        raise UsageError(f"{folder} holds the answers of another teacher, text or temperature; remove it, or --fresh")
    write_json(path, told)
    with progress.task("teacher", len(ids)) as task:
        for first in range(0, len(ids), CHUNK_WINDOWS):
            part = ids[first : first + CHUNK_WINDOWS]
            if _chunk(folder, first) is None:
                keep(folder, _chunk_name(first), _answers(teacher, part, first, k, temperature))
            task.advance(len(part))


def read_answers(folder: Path, windows: int) -> KeptAnswers:
    """What `keep_answers` wrote.

    Raises:
        UsageError: a chunk is missing or damaged.
    """
    parts = [_chunk(folder, first) for first in range(0, windows, CHUNK_WINDOWS)]
    if any(part is None for part in parts):
        raise UsageError(f"{folder} lacks a part of the teacher's answers; run the same command again")
    whole = {key: torch.cat([part[key] for part in parts if part is not None]) for key in ("indices", "kept", "rest")}
    return KeptAnswers(**whole)


def _answers(teacher: Teacher, ids: Tensor, first: int, k: int, temperature: float) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {"indices": [], "kept": [], "rest": []}
    for number, window in enumerate(ids, start=first):
        logits = teacher(window.unsqueeze(0), torch.tensor([number])).logits[0, :-1].float()
        logs = torch.log_softmax(logits / temperature, -1)
        kept, indices = logs.topk(min(k, logs.shape[-1]), -1)
        rest = logs.scatter(-1, indices, -torch.inf).logsumexp(-1)
        for key, value in (("indices", indices.int()), ("kept", kept), ("rest", rest)):
            found[key].append(value.cpu())
    return {key: torch.stack(values) for key, values in found.items()}


def _chunk_name(first: int) -> str:
    return f"answers-{first:08d}.safetensors"


def _chunk(folder: Path, first: int) -> dict[str, Tensor] | None:
    try:
        return recall(folder / _chunk_name(first))
    except ResumeError:  # not there yet; damaged is as good as lost
        return None
