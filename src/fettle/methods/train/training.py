"""One training, from folder to folder: what drives every method of this room.

method.learner(job)  → the student, with what learns marked, and how it is written (job.py)
text                 → windows (text_mix.py), and which of them stands in which place (sources/)
teacher              → live, or its kept answers (guidance.py)
objective            → loop (loop.py) → learner.write
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from fettle.errors import RecipeError, UsageError
from fettle.methods.train.curve import Curve, drop_torn
from fettle.methods.train.distillation import Distillation
from fettle.methods.train.encoders import EncoderDistillation, encoder_objective, refuse_sources
from fettle.methods.train.guidance import guidance
from fettle.methods.train.job import Learner, TrainJob, TrainMethod
from fettle.methods.train.loop import CURVE, run
from fettle.methods.train.options import LoopFields, SignalFields
from fettle.methods.train.outputs import RELATION_STRIDE, Observed
from fettle.methods.train.processes import is_main_process, process_group
from fettle.methods.train.samples import check_samples
from fettle.methods.train.sentence_text import sentences
from fettle.methods.train.sharding import is_asked
from fettle.methods.train.sources.fields import DataFields
from fettle.methods.train.sources.gathering import gathered, teachers_text
from fettle.methods.train.text_mix import TrainingText, require_tokenizer, training_text
from fettle.models.checkpoint import Checkpoint
from fettle.models.source import resolve
from fettle.models.writer import write_json


class _OfLearner(Distillation):
    """The objective with a learner's own factors of the learning rate, and what it does before a step."""

    learner: Learner

    def rates(self) -> dict[str, float]:
        return {f"student.{start}": factor for start, factor in self.learner.rates.items()}

    def begin(self, step: int, losses: Callable[[], Iterator[Tensor]]) -> None:
        if self.learner.before_step is not None:
            self.learner.before_step(step, losses)

    def shared_out(self) -> None:
        self.learner.shared_out()


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
    loop, signals, data = cast(LoopFields, method), cast(SignalFields, method), cast(DataFields, method)
    if is_asked(loop):
        _refuse_drawing(data)
    with process_group(job.device).main_process_first():  # what a learner writes, the others find
        if is_main_process():
            drop_torn(job.folder)  # before a learner asks whether it began
        learner = method.learner(job)
    require_tokenizer(learner.loaded.tokenizer, job.model)
    if learner.loaded.anatomy.causal:
        written = teachers_text(loop, data, signals, job)
        text = training_text(learner.loaded.tokenizer, loop, written=written, written_share=data.written)
    else:
        refuse_sources(data)
        text = sentences(learner.loaded.tokenizer, loop)
    learner.loaded.anatomy.require_rows(int(text.ids.min()), int(text.ids.max()))
    if loop.gradient_checkpointing:
        _checkpoint_gradients_(learner.loaded.model)
    objective: Distillation | EncoderDistillation
    kept_bytes = 0
    if learner.loaded.anatomy.causal:
        decoder, kept_bytes = _objective(learner, (signals, loop), text, job)
        objective = decoder
        mix = gathered(learner.loaded, decoder.gap, text, (loop, data, signals), job)
    else:
        objective, mix = encoder_objective(learner, (signals, loop), text, job), None
    curve = run(objective, text, loop, job.folder, job.progress, mix)
    curve.answer_bytes = kept_bytes
    if is_main_process():
        write_json(job.folder / CURVE, curve.to_json())
        learner.write(_record(method, job, text, curve, objective.weights))
    return curve


def _refuse_drawing(data: DataFields) -> None:
    """Raises RecipeError for sources that the first process draws from the student alone, where it has parts of it."""
    given = [f"{name}={getattr(data, name):g}" for name in ("on_policy", "adversarial") if getattr(data, name)]
    if given:
        raise RecipeError(
            f"{' and '.join(given)}: the first process runs the student alone to draw these windows, and with shard it "
            "holds a part of it; allowed with shard: the text, replay, written, curriculum. Leave one of them out"
        )


def _checkpoint_gradients_(tree: Any) -> None:
    """Blocks keep their inputs alone and run again for their gradients; the name changed in transformers 5.23."""
    older, newer = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    # not reentrant: the inputs of an untouched base have no gradient of their own
    getattr(tree, newer if hasattr(tree, newer) else older)({"use_reentrant": False})


def _objective(
    learner: Learner, fields: tuple[SignalFields, LoopFields], text: TrainingText, job: TrainJob
) -> tuple[Distillation, int]:
    """What the student learns from, and the bytes of the teacher's answers on disk."""
    signals, loop = fields
    asked = tuple(signals.weights())
    if "sentences" in asked:
        raise RecipeError(f"sentences compares an encoder's vectors, and {job.model} predicts next tokens; set it to 0")
    check_samples(asked, loop, held_back=len(text.held_back), each=loop.length // RELATION_STRIDE)
    student = Observed(learner.model, cast(nn.Module, learner.loaded.model), learner.loaded.anatomy, asked)
    found = guidance(learner.loaded.tokenizer, student.depth, fields, text, job)
    objective = _OfLearner(
        student, signals, teacher=found.teacher, answers=found.answers, layers=found.layers, learned=text.learned
    )
    objective.learner = learner
    objective.fit_shapes(text.ids[:1].to(job.device))
    return objective.to(job.device), found.answer_bytes


def _record(
    method: TrainMethod, job: TrainJob, text: TrainingText, curve: Curve, learned_from: Mapping[str, float]
) -> dict[str, Any]:
    """What `fettle.json` says of the training: nothing that differs between runs, unless minutes ended it."""
    given = {item.name: getattr(method, item.name) for item in fields(cast(Any, method)) if item.name not in PATHS}
    return {
        "base": {"name": job.base_name or Path(job.model).name},
        "training": {
            "method": method.name,
            "fields": given,
            "signals": dict(learned_from),  # an encoder's are not those of the fields' defaults
            "text": {"sha256": text.sha256, "windows": text.learned, "note": text.note},
            "steps": len(curve.losses),
            "held_back": [list(look) for look in curve.held_back],
            "stopped": curve.stopped,
        },
        "results": None,
    }


PATHS = ("text", "held_back_text", "replay", "teacher")  # fields that name files of a machine
