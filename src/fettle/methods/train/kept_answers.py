"""A teacher's answers on disk: it runs once over every window, and then nobody loads it again.

A teacher's answer to a window never changes, so its k largest log-probabilities can be kept: `keep_answers` runs the
teacher once over every window and writes chunks of them; a killed run goes on with the chunk that is missing. Size:

    bytes = windows · (tokens - 1) · (k · (4 + 4) + 4)        int32 indices, float32 log-probabilities, float32 rest

With T the temperature, log-probabilities are those of softmax(z / T), and `rest` is the log of what the others come to.

A folder is named by the hash of all that the answers follow from (teacher, windows, tokenizer, k, T), so every training
of a chain that asks the same finds them. What else a run needs to know of the teacher stands in `teacher.json`, which
comes last. Rows are read when their windows come: memory holds those of one step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fettle.errors import ResumeError, UsageError
from fettle.methods.train.kept import keep, verify
from fettle.methods.train.teachers import Teacher
from fettle.models.writer import write_json
from fettle.progress import Progress

CHUNK_WINDOWS = 32
TOLD = "teacher.json"
PARTS = ("indices", "kept", "rest")


@dataclass(frozen=True, kw_only=True)
class KeptAnswers:
    """A teacher's largest log-probabilities for the windows of a text, on disk.

    Attributes:
        folder: of the chunks.
        windows: how many there are.
        tokens: of each.
        k: entries kept of each prediction.
        vocabulary: entries of the teacher's.
    """

    folder: Path
    windows: int
    tokens: int
    k: int
    vocabulary: int

    @property
    def bytes(self) -> int:
        """On disk, without the files' headers."""
        return answer_bytes(self.windows, self.tokens, self.k)

    def rows(self, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Indices int32 and log-probabilities [batch, tokens - 1, k], the rest's [batch, tokens - 1], of int64 [batch].

        Raises:
            UsageError: a chunk is gone or damaged.
        """
        found = [self._row(int(window)) for window in windows]
        indices, kept, rest = (torch.cat(parts) for parts in zip(*found, strict=True))
        return indices, kept, rest

    def _row(self, window: int) -> list[Tensor]:
        first = window - window % CHUNK_WINDOWS
        try:
            with safe_open(self.folder / _chunk_name(first), framework="pt") as file:  # mapped no longer than this
                return [file.get_slice(part)[window - first : window - first + 1].clone() for part in PARTS]
        except (OSError, SafetensorError):
            raise UsageError(
                f"{self.folder} lacks a part of the teacher's answers; run the same command again"
            ) from None

    def lacks(self) -> list[int]:
        """The first windows of chunks that are missing or damaged."""
        return [first for first in range(0, self.windows, CHUNK_WINDOWS) if not self._is_whole(first)]

    def _is_whole(self, first: int) -> bool:
        rows = min(CHUNK_WINDOWS, self.windows - first)
        each = torch.Size([rows, self.tokens - 1, self.k])
        try:
            verify(self.folder / _chunk_name(first), dict(zip(PARTS, (each, each, each[:2]), strict=True)))
        except ResumeError:  # not there yet; damaged is as good as lost
            return False
        return True


def answer_bytes(windows: int, tokens: int, k: int) -> int:
    """Bytes of the kept answers, without the files' headers."""
    return windows * (tokens - 1) * (8 * k + 4)


def answers_folder(root: Path, identity: Mapping[str, Any]) -> Path:
    """Where answers that follow from `identity` lie below `root`."""
    return root / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def open_answers(root: Path, identity: Mapping[str, Any]) -> KeptAnswers | None:
    """The answers that follow from `identity`, without a look at their teacher; None unless all are there."""
    folder = answers_folder(root, identity)
    try:
        told = json.loads((folder / TOLD).read_text(encoding="utf-8"))
        found = KeptAnswers(folder=folder, **{key: int(told[key]) for key in ("windows", "tokens", "k", "vocabulary")})
    except (OSError, ValueError, KeyError, TypeError):  # a torn note is as good as none
        return None
    return None if found.lacks() else found


def keep_answers(
    teacher: Teacher,
    ids: Tensor,
    *,
    k: int,
    temperature: float,
    vocabulary: int,
    root: Path,
    identity: Mapping[str, Any],
    progress: Progress,
) -> KeptAnswers:
    """Writes what is missing of a teacher's answers for windows int64 [windows, tokens].

    Args:
        teacher: asked for the windows that are missing alone.
        ids: the windows.
        k: how many entries of each prediction are kept; all, where there are fewer.
        temperature: at which the answers are compared.
        vocabulary: how many entries a prediction has.
        root: holds answers of all kinds.
        identity: plain data: all that the answers follow from.
        progress: told what is kept, with its bytes, and of every window.
    """
    folder = answers_folder(root, identity)
    folder.mkdir(parents=True, exist_ok=True)
    kept = KeptAnswers(
        folder=folder, windows=len(ids), tokens=ids.shape[1], k=min(k, vocabulary), vocabulary=vocabulary
    )
    missing = set(kept.lacks())
    with progress.task(f"teacher's {kept.k} largest logits, {kept.bytes / 1e6:.1f} MB", len(ids)) as task:
        for first in range(0, len(ids), CHUNK_WINDOWS):
            part = ids[first : first + CHUNK_WINDOWS]
            if first in missing:
                keep(folder, _chunk_name(first), _answers(teacher, part, first, kept.k, temperature))
            task.advance(len(part))
    told = {key: getattr(kept, key) for key in ("windows", "tokens", "k", "vocabulary", "bytes")}
    write_json(folder / TOLD, {**told, "identity": dict(identity)})
    return kept


def _answers(teacher: Teacher, ids: Tensor, first: int, k: int, temperature: float) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for number, window in enumerate(ids, start=first):
        logits = teacher(window.unsqueeze(0), torch.tensor([number])).logits[0, :-1].float()
        logs = torch.log_softmax(logits / temperature, -1)
        kept, indices = logs.topk(k, -1)
        rest = logs.scatter(-1, indices, -torch.inf).logsumexp(-1)
        for part, value in zip(PARTS, (indices.int(), kept, rest), strict=True):
            found[part].append(value.cpu())
    return {part: torch.stack(values) for part, values in found.items()}


def _chunk_name(first: int) -> str:
    return f"answers-{first:08d}.safetensors"
