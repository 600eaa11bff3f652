"""Distillation and healing: all weights of a dense model learn from a teacher, and from the text where asked.

Healing is distillation whose teacher is the model before the damage: what pruning, narrowing or a lost layer broke is
learned back from the original's probabilities. With `layers` the student is made first, of the model's own blocks; with
`begin: random` nothing but its shape is kept. With `keep_zeros` weights that are zero stay zero, so that a pruned model
heals inside its mask. With `hard: 1` and `soft: 0` it is plain fine-tuning.

    loss = α · CE + β · T² · KL + …        signals and sources: signals.py

Cost: a student's training step and a teacher's forward pass; with `teacher_top_k` the teacher runs once a window.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from fettle.errors import RecipeError, UsageError
from fettle.methods.train.fresh import BEGIN_HELP, Begin, load_afresh
from fettle.methods.train.job import Learner, TrainJob
from fettle.methods.train.kept import recall_json
from fettle.methods.train.layer_maps import LayerMap
from fettle.methods.train.layer_search import choose_blocks
from fettle.methods.train.options import LoopFields, SignalFields
from fettle.methods.train.sharding import is_part, own
from fettle.methods.train.sources.fields import DataFields
from fettle.methods.train.students import write_student
from fettle.methods.train.writing import BEGUN_AFRESH, write_trained
from fettle.models.anatomy import Anatomy, read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import load
from fettle.models.source import resolve
from fettle.models.storage import stored_schemes
from fettle.models.writer import write_json
from fettle.tensors.masked import MaskedScheme


@dataclass(frozen=True, kw_only=True)
class Distill(LoopFields, SignalFields, DataFields):
    """All weights, the blocks' or the norms' learn from a teacher; heals what compression broke."""

    name: ClassVar[str] = "distill"
    title: ClassVar[str] = "Distillation and healing"
    source: ClassVar[str] = "Hinton et al. 2015, https://arxiv.org/abs/1503.02531; each signal's in signals.py"

    trains: Literal["all", "blocks", "norms"] = field(
        default="all", metadata={"help": "which parameters learn; blocks leaves embedding and head as they are"}
    )
    layers: int | None = field(
        default=None, metadata={"help": "make the student first, of so many of the model's own blocks", "minimum": 1}
    )
    student_map: LayerMap = field(
        default="uniform", metadata={"help": "which of its blocks the student keeps; influence and loss are measured"}
    )
    keep_zeros: bool = field(default=False, metadata={"help": "weights that are zero stay zero (a pruned model)"})
    begin: Begin = field(default="pretrained", metadata={"help": BEGIN_HELP})

    def validate(self) -> None:
        """Checks that the fields fit together; RecipeError where not."""
        self.check_loop()
        self.check_signals()
        self.check_data(self, self)
        if self.begin == "random" and (self.trains != "all" or self.keep_zeros):
            raise RecipeError(
                f"begin: random with trains={self.trains} and keep_zeros={self.keep_zeros}: random weights would stay "
                "as they are, and have no zeros; allowed: trains: all, without keep_zeros"
            )

    def learner(self, job: TrainJob) -> Learner:
        """The dense student."""
        folder = resolve(job.model)
        checkpoint = Checkpoint.open(folder)
        anatomy = read_anatomy(checkpoint, generic=job.generic)
        schemes = [found.scheme for found in stored_schemes(checkpoint, anatomy).values()]
        masked = bool(schemes) and all(isinstance(s, MaskedScheme) and s.values is None for s in schemes)
        if masked and (not self.keep_zeros or self.layers is not None):
            raise UsageError(
                f"{job.model} is pruned, and distill would fill its zeros; use --keep-zeros, without --layers"
            )
        if schemes and not masked:
            raise UsageError(
                f"{job.model} is stored as codes, which distill would have to forget; use qat to train the codes, or "
                "adapter for a correction beside them"
            )
        made: dict[str, Any] = {}
        if self.layers is not None:
            folder = job.folder / "student"
            made = self._student(checkpoint, anatomy, folder, job)
            checkpoint = Checkpoint.open(folder)
        if self.begin == "random":
            loaded = load_afresh(folder, self.seed, device=job.device, generic=job.generic)
        else:
            loaded = load(folder, device=job.device, generic=job.generic, dense=masked)
        mark_(loaded.model, loaded.anatomy, self.trains)
        if self.keep_zeros:
            hold_zeros_(loaded.model)

        def write(record: dict[str, Any]) -> None:
            shape = {"reshaped": True, "student": made} if self.layers is not None else {}
            begun = {BEGUN_AFRESH: True} if self.begin == "random" else {}
            write_trained(loaded.model, checkpoint, loaded.anatomy, job.output, {**record, **shape, **begun})

        def hold_again() -> None:
            if self.keep_zeros:
                hold_zeros_(loaded.model)

        return Learner(loaded=loaded, model=loaded.model, write=write, shared_out=hold_again)

    def _student(self, checkpoint: Checkpoint, anatomy: Anatomy, folder: Path, job: TrainJob) -> dict[str, Any]:
        """Makes the student, unless it is made; says of which blocks."""
        told = folder.with_suffix(".json")
        if not told.is_file():
            assert self.layers is not None
            if stored_schemes(checkpoint, anatomy):
                raise UsageError(f"{job.model} is compressed; a student is made of the blocks of the original model")
            chosen = choose_blocks(self.student_map, self.layers, checkpoint, anatomy, self, job.device)
            write_student(checkpoint, anatomy, chosen.kept, folder)
            write_json(told, chosen.to_json())
        return dict(recall_json(told))


def mark_(tree: nn.Module, anatomy: Anatomy, trains: str) -> None:
    """Marks the parameters that learn: "all", those of the "blocks", or the "norms" (vectors of any kind).

    Raises:
        RecipeError: there are none.
    """
    inside = {
        name for block in anatomy.blocks for name, _ in tree.get_submodule(block.name).named_parameters(block.name)
    }
    learned = 0
    for name, parameter in tree.named_parameters():
        wanted = trains == "all" or (name in inside if trains == "blocks" else parameter.dim() == 1)
        parameter.requires_grad_(wanted and parameter.is_floating_point())
        learned += parameter.numel() if parameter.requires_grad else 0
    if not learned:
        raise RecipeError(f"trains={trains} names no parameter of this model; allowed: all, blocks, norms")


def hold_zeros_(tree: nn.Module) -> None:
    """Weights of matrices that are zero get no gradient; AdamW then leaves them at zero, decay and moments included."""
    for parameter in tree.parameters():
        kept = own(parameter.detach()) != 0
        if not parameter.requires_grad or parameter.dim() < 2 or bool(kept.all()):
            continue
        if is_part(parameter):  # its gradient is put there, and nothing hung at the parameter itself is asked
            parameter.register_post_accumulate_grad_hook(_mask_in_place(kept))  # type: ignore[no-untyped-call]
        else:
            parameter.register_hook(_masked(kept))  # type: ignore[no-untyped-call]


def _masked(mask: Tensor) -> Any:
    return lambda gradient: gradient * mask


def _mask_in_place(mask: Tensor) -> Any:
    return lambda parameter: own(parameter.grad).mul_(mask)
