"""From the fields of the data mix to what the loop takes: the teacher's text, then windows, then the mix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from fettle.data.windows import Text
from fettle.errors import UsageError
from fettle.methods.train.identity import settle_identity, told_fields
from fettle.methods.train.job import TrainJob
from fettle.methods.train.named_teachers import load_teacher, teacher_hashes
from fettle.methods.train.options import LoopFields, SignalFields
from fettle.methods.train.processes import process_group
from fettle.methods.train.sources.adversarial import Adversarial, Gap
from fettle.methods.train.sources.curriculum import difficulties, paced_order
from fettle.methods.train.sources.fields import DataFields
from fettle.methods.train.sources.mix import FOLDER, Mix, Source
from fettle.methods.train.sources.on_policy import Completer, OnPolicy
from fettle.methods.train.sources.written import written_text
from fettle.methods.train.teachers import require_same_tokens
from fettle.methods.train.text_mix import Order, TrainingText, learning_part
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import LoadedModel


def teachers_text(loop: LoopFields, data: DataFields, signals: SignalFields, job: TrainJob) -> Text | None:
    """What the teachers write for this run, or wrote before a kill; None where nothing is asked for."""
    if not data.written:
        return None
    names = job.teachers(signals)
    identity = {"teachers": [teacher_hashes(name) for name in names]}
    loaders = [partial(load_teacher, name, device=job.device, generic=job.generic) for name in names]
    with process_group(job.device).main_process_first():
        return written_text(
            loaders, _completer(job, "written"), learning_part(loop), (loop, data), job.folder / "written", identity,
            job.progress,
        )  # fmt: skip


def gathered(
    student: LoadedModel, gap: Gap, text: TrainingText,
    fields: tuple[LoopFields, DataFields, SignalFields], job: TrainJob,
) -> Mix:  # fmt: skip
    """The mix of a run.

    Args:
        student: who writes on-policy windows.
        gap: how far student and teacher are apart on windows.
        text: windows of the texts.
        fields: of the loop, the mix and the signals.
        job: folders and device.

    Raises:
        UsageError: on-policy windows without an engine, a curriculum by a model with another tokenizer, or drawn
            windows of another training in the run's folder.
    """
    loop, data, signals = fields
    steps, folder = loop.planned_steps, job.folder / FOLDER
    order: Tensor | Order = text.order(steps, loop.batch_windows, loop.seed)
    if data.curriculum != "none":
        losses = _difficulties(student, text, data, signals, job)
        order = paced_order(losses, steps, loop.batch_windows, loop.seed, data.pacing, data.pace)
    sources: list[Source] = []
    if data.on_policy:
        sources.append(OnPolicy(student, _completer(job, "on_policy"), text, data, loop.seed))
    if data.adversarial:
        sources.append(Adversarial(gap, text, data, loop.seed))
    if sources:
        names = job.teachers(signals) if signals.needs_teacher else []
        files = {"model": Checkpoint.open(student.folder).file_hashes(), "teachers": [teacher_hashes(x) for x in names]}
        with process_group(job.device).main_process_first():
            settle_identity(folder, {**told_fields(signals), **files}, "the windows drawn")
    return Mix(text, order, loop, sources=sources, every=data.refresh_every, folder=folder)


def _completer(job: TrainJob, what: str) -> Completer:
    if job.complete is None:
        raise UsageError(f"{what} writes text, and this training was started without an engine; use fettle.train")
    return job.complete


def _difficulties(
    student: LoadedModel, text: TrainingText, data: DataFields, signals: SignalFields, job: TrainJob
) -> Tensor:
    name = job.teachers(signals)[0] if data.curriculum == "teacher" else str(job.original)

    def judge() -> Callable[[Tensor], Tensor]:
        model = load_teacher(name, device=job.device, generic=job.generic)
        require_same_tokens(student.tokenizer, model.tokenizer, (str(job.model), name))
        return partial(window_losses, model)

    with process_group(job.device).main_process_first():
        return difficulties(judge, text, job.folder / FOLDER, {"judge": teacher_hashes(name)})


@torch.no_grad()
def window_losses(loaded: LoadedModel, ids: Tensor) -> Tensor:
    """float32 [batch]: the mean of -log p(next token) over each of int64 [batch, length]."""
    device = next(loaded.model.parameters()).device
    logits = loaded.model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:].to(device), reduction="none")
    return losses.mean(-1)
