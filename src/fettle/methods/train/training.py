"""One training, from folder to folder: the shape that every method of this room has, and what drives it.

method.learner(job)  → the student, with what learns marked, and how it is written
text                 → windows (text_mix.py)
teacher              → live, or its kept answers (teachers.py)
objective            → loop (loop.py) → learner.write
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from torch import nn

from fettle.errors import UsageError
from fettle.methods.train.curve import Curve
from fettle.methods.train.distillation import Distillation
from fettle.methods.train.loop import run
from fettle.methods.train.options import LoopFields, SignalFields
from fettle.methods.train.outputs import Observed
from fettle.methods.train.processes import is_main_process, process_group
from fettle.methods.train.teachers import Live, Several, Teacher, keep_answers, read_answers, require_same_tokens
from fettle.methods.train.text_mix import TrainingText, training_text
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import LoadedModel, load
from fettle.models.source import resolve
from fettle.progress import Progress, Silent


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What a training reads and writes.

    Attributes:
        model: the folder (hub id, or demo) that is trained.
        original: the teacher where none is named; the model that a chain began with.
        output: the folder that is written.
        folder: for checkpoints, curve and kept answers; of this run alone.
        base_name: what `fettle.json` calls the model.
        device: torch's word for it.
        generic: treat every linear of an unknown family alike.
        progress: told how far it is.
    """

    model: str | Path
    original: str | Path
    output: Path
    folder: Path
    base_name: str = ""
    device: str = "cpu"
    generic: bool = False
    progress: Progress = field(default_factory=Silent)


@dataclass(frozen=True, kw_only=True, eq=False)
class Learner:
    """A student that is ready to learn.

    Attributes:
        loaded: tree, anatomy, tokenizer and folder.
        model: what is called: the tree, or what wraps it.
        write: given the record for `fettle.json`, writes what was learned.
        rates: factors of the learning rate, by the beginning of a parameter's name in `model`.
    """

    loaded: LoadedModel
    model: nn.Module
    write: Callable[[dict[str, Any]], None]
    rates: dict[str, float] = field(default_factory=dict)


class TrainMethod(Protocol):
    """A training method: a frozen, keyword-only dataclass with the keys of `LoopFields` and `SignalFields`."""

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def validate(self) -> None:
        """Checks what the fields' own types and bounds cannot say; RecipeError where they do not fit together."""
        ...

    def learner(self, job: TrainJob) -> Learner:
        """The student in memory, with the parameters that learn marked by `requires_grad`."""
        ...


class _WithRates(Distillation):
    """The objective with a learner's own factors of the learning rate."""

    factors: dict[str, float]

    def rates(self) -> dict[str, float]:
        return {f"student.{start}": factor for start, factor in self.factors.items()}


def train(method: TrainMethod, job: TrainJob) -> Curve:
    """Trains `job.model` and writes `job.output`; goes on where a killed run stopped.

    Raises:
        UsageError: no tokenizer, another tokenizer than the teacher's, a text that is too short.
        NonFiniteError: a loss that is NaN or infinite.
    """
    if Checkpoint.open(resolve(job.model)).shared:
        raise UsageError(
            f"{job.model} stores the matrices of several blocks once, and a training would give each its own again; "
            "train before share_blocks, or share with written_out: true"
        )
    with process_group(job.device).main_process_first():  # what a learner writes, the others find
        learner = method.learner(job)
    loop, signals = cast(LoopFields, method), cast(SignalFields, method)
    if learner.loaded.tokenizer is None or not learner.loaded.anatomy.causal:
        lack = "no tokenizer files" if learner.loaded.tokenizer is None else "no next token to predict"
        raise UsageError(f"{job.model} has {lack}, and training reads text and predicts the next token")
    text = training_text(learner.loaded.tokenizer, loop)
    learner.loaded.anatomy.require_rows(int(text.ids.min()), int(text.ids.max()))
    objective = _objective(learner, signals, text, job)
    curve = run(objective, text, loop, job.folder, job.progress)
    if is_main_process():
        learner.write(_record(method, job, text, curve))
    return curve


def _objective(learner: Learner, signals: SignalFields, text: TrainingText, job: TrainJob) -> Distillation:
    asked = tuple(signals.weights())
    student = Observed(learner.model, cast(nn.Module, learner.loaded.model), learner.loaded.anatomy, asked)
    teacher: Teacher | None = None
    depth, answers = None, None
    if signals.needs_teacher:
        names = signals.teachers() or [str(job.original)]
        models = [load(resolve(name), device=job.device, generic=job.generic) for name in names]
        for name, found in zip(names, models, strict=True):
            require_same_tokens(learner.loaded.tokenizer, found.tokenizer, (str(job.model), name))
        live = [Live(Observed(found.model, found.model, found.anatomy, asked)) for found in models]
        weights = signals.parsed_teacher_weights()
        teacher = live[0] if len(live) == 1 else Several(live, weights, signals.temperature)
        depth = len(models[0].anatomy.blocks) if {"features", "attention"} & set(asked) else None
        if signals.teacher_top_k is not None:
            answers = _kept(teacher, signals, text, job, names)
    objective = _WithRates(student, signals, teacher=teacher, answers=answers, teacher_depth=depth)
    objective.factors = learner.rates
    objective.fit_shapes(text.ids[:1].to(job.device))
    return objective.to(job.device)


def _kept(teacher: Teacher, signals: SignalFields, text: TrainingText, job: TrainJob, names: list[str]) -> Any:
    assert signals.teacher_top_k is not None
    folder = job.folder / "answers"
    vocabulary = teacher(text.ids[:1, :2].to(job.device)).logits.shape[-1]
    k = min(signals.teacher_top_k, vocabulary)
    identity = {"text": text.sha256, "teacher": [_hashes(name) for name in names], "weights": signals.teacher_weights}
    with process_group(job.device).main_process_first():
        keep_answers(
            teacher, text.ids.to(job.device), k=k, temperature=signals.temperature, folder=folder, identity=identity,
            progress=job.progress,
        )  # fmt: skip
    return read_answers(folder, len(text.ids))


def _hashes(model: str) -> dict[str, str]:
    from fettle.models.checkpoint import Checkpoint

    return Checkpoint.open(resolve(model)).file_hashes()


def _record(method: TrainMethod, job: TrainJob, text: TrainingText, curve: Curve) -> dict[str, Any]:
    """What `fettle.json` says of the training: nothing that differs between runs, unless minutes ended it."""
    given = {item.name: getattr(method, item.name) for item in fields(cast(Any, method)) if item.name not in PATHS}
    return {
        "base": {"name": job.base_name or Path(job.model).name},
        "training": {
            "method": method.name,
            "fields": given,
            "text": {"sha256": text.sha256, "windows": text.learned, "note": text.note},
            "steps": len(curve.losses),
            "held_back": [list(look) for look in curve.held_back],
            "stopped": curve.stopped,
        },
        "results": None,
    }


PATHS = ("text", "replay", "teacher")  # fields that name files of a machine
