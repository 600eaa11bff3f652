"""What a student is taught by: teachers that run along, or their kept answers and no teacher in memory.

answers that are whole  ──────────────────────────────────────────────▶ read
else: load, compare tokens ──▶ several as one, weighed ──▶ run along, or answer every window once and go
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from fettle.methods.train.job import TrainJob
from fettle.methods.train.kept_answers import KeptAnswers, keep_answers, open_answers
from fettle.methods.train.layer_search import looked_at
from fettle.methods.train.named_teachers import load_teacher, teacher_hashes
from fettle.methods.train.options import LoopFields, SignalFields
from fettle.methods.train.outputs import Observed, base_tree
from fettle.methods.train.processes import process_group
from fettle.methods.train.several import Several
from fettle.methods.train.teachers import Live, Teacher, require_same_tokens, tokens_hash
from fettle.methods.train.text_mix import TrainingText
from fettle.models.loading import LoadedModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Guidance:
    """What the objective of a decoder is compared with; nothing where it learns from the text alone.

    Attributes:
        teacher: runs along.
        answers: in its place.
        layers: for each of the student's layers, the teacher's that it looks at.
    """

    teacher: Teacher | None = None
    answers: KeptAnswers | None = None
    layers: list[int] | None = None

    @property
    def answer_bytes(self) -> int:
        """Of the answers on disk."""
        return self.answers.bytes if self.answers is not None else 0


def guidance(
    tokenizer: Any, depth: int, fields: tuple[SignalFields, LoopFields], text: TrainingText, job: TrainJob
) -> Guidance:
    """Loads the teachers, unless their answers are on disk.

    Args:
        tokenizer: the student's.
        depth: its layers.
        fields: the signals, and the loop's, which a searched layer map reads.
        text: the windows that are learned from and held back.
        job: the teachers' names, folders and device.

    Raises:
        UsageError: another tokenizer than a teacher's.
    """
    signals, loop = fields
    if not signals.needs_teacher:
        return Guidance()
    if signals.teacher_top_k is not None:
        return Guidance(answers=_kept(tokenizer, signals, text, job))
    models = _loaded(tokenizer, signals, job)
    with process_group(job.device).main_process_first():
        teacher = _as_one(models, signals, text, job)
    by_layer = bool({"features", "attention"} & set(signals.weights()))
    layers = looked_at(signals, loop, depth, models[0], job.device) if by_layer else None
    return Guidance(teacher=teacher, layers=layers)


def _loaded(tokenizer: Any, signals: SignalFields, job: TrainJob) -> list[LoadedModel]:
    """The teachers in memory, all with the student's tokens."""
    names = job.teachers(signals)
    models = [load_teacher(name, device=job.device, generic=job.generic) for name in names]
    for name, found in zip(names, models, strict=True):
        require_same_tokens(tokenizer, found.tokenizer, (str(job.model), name))
    return models


def _as_one(models: list[LoadedModel], signals: SignalFields, text: TrainingText, job: TrainJob) -> Teacher:
    """The teachers as one; whoever calls lets the first process weigh them first."""
    asked = tuple(signals.weights())
    live = [Live(Observed(found.model, base_tree(found), found.anatomy, asked)) for found in models]
    if len(live) == 1:
        return live[0]
    weights = signals.parsed_teacher_weights()
    several = Several(live, weights, signals.temperature, signals.teacher_weighting)
    if signals.teacher_weighting != "fixed" and signals.weighting_by == "task":
        hashes = {"teachers": [teacher_hashes(name) for name in job.teachers(signals)]}
        several.settle_by_task(text, job.folder, hashes, job.progress, job.device)
    return several


def _kept(tokenizer: Any, signals: SignalFields, text: TrainingText, job: TrainJob) -> KeptAnswers:
    """The answers, which are kept first where they are not whole; the teachers are gone when this returns."""
    assert signals.teacher_top_k is not None
    root, identity = job.answers or job.folder / "answers", _identity(tokenizer, signals, text, job)
    with process_group(job.device).main_process_first():
        found = open_answers(root, identity)
        if found is not None:
            return found
        teacher = _as_one(_loaded(tokenizer, signals, job), signals, text, job)
        ids = text.ids.to(job.device)
        return keep_answers(
            teacher, ids, k=signals.teacher_top_k, temperature=signals.temperature,
            vocabulary=teacher(ids[:1, :2]).logits.shape[-1], root=root, identity=identity, progress=job.progress,
        )  # fmt: skip


def _identity(tokenizer: Any, signals: SignalFields, text: TrainingText, job: TrainJob) -> dict[str, Any]:
    """All that the answers follow from."""
    windows = hashlib.sha256(text.ids.numpy().tobytes())
    windows.update(json.dumps([list(text.ids.shape), text.learned, text.tasks]).encode())
    return {
        "text": text.sha256,
        "windows": windows.hexdigest(),
        "tokenizer": tokens_hash(tokenizer),
        "teacher": [teacher_hashes(name) for name in job.teachers(signals)],
        "weights": [signals.teacher_weights, signals.teacher_weighting, signals.weighting_by],
        "top_k": signals.teacher_top_k,
        "temperature": signals.temperature,
    }
