"""Sparsity-aware training: weights go while the others learn, and may come back.

What a pruning method decides at once and healing then mends, this decides bit by bit: every `mask_every` steps the
mask of each linear of the blocks is drawn anew (`masks.py` has the equations and papers), between them what stays
learns from the teacher. With `growth: one_shot` and `regrow` it is RigL at a constant sparsity; with `score:
movement` it is movement pruning; without a teacher (`hard: 1, soft: 0`) gradual pruning as its authors trained.

Masks are kept in files beside the checkpoints, one for each step in which they changed, written before that step is
taken: a killed run goes on with the same masks. What is written has a mask and the values that stayed, as a pruning
recipe stores them; `distill` with `keep_zeros` can train it on.

The weights with the least held-back loss would be those of the dense start, so the last ones are kept.

Cost: a training step, a product with the mask, and for taylor or regrow one more pass forward and backward of a step's
windows at every change. Memory: a bit a weight; movement: another number that learns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from fettle.errors import RecipeError, UsageError
from fettle.methods.prune.fields import PATTERN_HELP
from fettle.methods.train.identity import settle_identity, told_fields
from fettle.methods.train.job import Learner, TrainJob
from fettle.methods.train.kept import keep, recall
from fettle.methods.train.masks import (
    Growth,
    Score,
    SparseLinear,
    exchanged_share,
    gradients_of,
    pruned,
    regrown,
    sparsity_at,
)
from fettle.methods.train.options import LoopFields, SignalFields
from fettle.methods.train.processes import is_main_process, wait_for_all
from fettle.methods.train.sharding import own, own_of, whole
from fettle.methods.train.sources.fields import DataFields
from fettle.methods.train.writing import write_trained
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import LoadedModel, load
from fettle.models.parts import Linear
from fettle.models.source import resolve
from fettle.models.storage import stored_schemes
from fettle.tensors.masked import MaskedScheme, MaskedTensor
from fettle.tensors.patterns import parse_pattern
from fettle.tensors.scheme import SCALE_DTYPES

MASKS = "masks"


@dataclass(frozen=True, kw_only=True)
class Sparse(LoopFields, SignalFields, DataFields):
    """All linears of the blocks lose weights while they learn from a teacher; regrowth and movement on request."""

    name: ClassVar[str] = "sparse"
    title: ClassVar[str] = "Sparsity-aware training"
    source: ClassVar[str] = "Zhu & Gupta 2017; movement, Sanh et al. 2020; RigL, Evci et al. 2020; see masks.py"

    sparsity: float = field(
        default=0.5, metadata={"help": "share of a linear's weights that go", "minimum": 0.0, "maximum": 0.999}
    )
    pattern: str = field(default="layer", metadata={"help": PATTERN_HELP})
    score: Score = field(default="magnitude", metadata={"help": "what losing a weight costs; the least go"})
    growth: Growth = field(default="cubic", metadata={"help": "how the sparsity grows with the steps"})
    pruned_from: float = field(
        default=0.0, metadata={"help": "share of the steps after which it begins", "minimum": 0.0, "maximum": 1.0}
    )
    pruned_until: float = field(
        default=0.6, metadata={"help": "share of the steps after which it is whole", "minimum": 0.0, "maximum": 1.0}
    )
    mask_every: int = field(default=10, metadata={"help": "steps between two changes of the masks", "minimum": 1})
    regrow: float = field(
        default=0.0,
        metadata={
            "help": "share of what stays that is exchanged at first, by gradient (RigL)",
            "minimum": 0.0,
            "maximum": 0.9,
        },
    )
    score_rate: float = field(
        default=10.0, metadata={"help": "step size of movement's scores, times the learning rate", "minimum": 0.0}
    )
    trains: Literal["all", "blocks"] = field(
        default="blocks", metadata={"help": "which parameters learn; blocks leaves embedding and head as they are"}
    )
    keep: Literal["best", "last"] = field(
        default="last", metadata={"help": "the last weights; the least held-back loss is the dense start's"}
    )
    patience: int = field(default=1_000_000, metadata={"help": "looks without a gain before it stops", "minimum": 1})

    def validate(self) -> None:
        """Checks that the fields fit together; RecipeError where not."""
        self.check_loop()
        self.check_signals()
        self.check_data(self, self)
        if self.minutes is not None:
            raise RecipeError(
                f"minutes={self.minutes:g} do not say how many steps there will be, in whose shares masks grow "
                "(pruned_from, pruned_until); allowed: steps or tokens"
            )
        shape = parse_pattern(self.pattern)
        if shape.fixed_sparsity is not None and shape.fixed_sparsity != self.sparsity:
            raise RecipeError(
                f"pattern={self.pattern} means sparsity={shape.fixed_sparsity:g}, got {self.sparsity:g}; set it so"
            )
        if self.keep == "best":
            raise RecipeError("keep=best would keep the dense start, whose held-back loss is least; use keep: last")
        if self.pruned_until <= self.pruned_from and self.growth != "one_shot":
            raise RecipeError(
                f"pruned_until={self.pruned_until:g} is not behind pruned_from={self.pruned_from:g}; give more"
            )
        first, last = self.span
        if self.score == "movement" and (last < 1 or (self.growth == "one_shot" and first < 1)):
            raise RecipeError(
                f"score=movement has seen no step when weights go in step {0 if last < 1 else first}, and all its "
                f"scores are equal (pruned_from={self.pruned_from:g}, pruned_until={self.pruned_until:g}, "
                f"{self.planned_steps} steps); allowed: a later step. Give a larger pruned_from, or pruned_until where "
                "growth is not one_shot"
            )
        if self.regrow and (self.pattern not in ("layer", "row") or self.score == "movement"):
            raise RecipeError("regrow exchanges single weights of a layer or a row by magnitude or taylor; use these")

    @property
    def span(self) -> tuple[int, int]:
        """The steps in which pruning begins and is whole."""
        return round(self.pruned_from * self.planned_steps), round(self.pruned_until * self.planned_steps)

    def learner(self, job: TrainJob) -> Learner:
        """The student with masked linears in its blocks."""
        folder = resolve(job.model)
        checkpoint = Checkpoint.open(folder)
        loaded = load(folder, device=job.device, generic=job.generic, dense=True)
        if stored_schemes(checkpoint, loaded.anatomy):
            raise UsageError(
                f"{job.model} is stored as codes or masks; sparse begins with a dense model, give that one"
            )
        modules = {linear: _swapped(loaded, linear, self.score == "movement") for linear in _linears(loaded)}
        inside = {id(p) for block in loaded.anatomy.blocks for p in loaded.model.get_submodule(block.name).parameters()}
        for parameter in loaded.model.parameters():
            parameter.requires_grad_(
                parameter.is_floating_point() and (self.trains == "all" or id(parameter) in inside)
            )
        told = {**told_fields(self), "model": checkpoint.file_hashes()}
        settle_identity(job.folder / MASKS, told, "the masks")
        masks = Masks(self, list(modules.values()), [x.name for x in modules], job.folder / MASKS)
        schemes = {linear: self._scheme(checkpoint) for linear in modules}

        def write(record: dict[str, Any]) -> None:
            masks.finish()
            codes = {
                linear.name: MaskedTensor.of(module.weight.detach().cpu(), module.mask.cpu(), schemes[linear])
                for linear, module in modules.items()
            }
            write_trained(loaded.model, checkpoint, loaded.anatomy, job.output, record, codes=codes)

        rates = {name: self.score_rate for name, _ in loaded.model.named_parameters() if name.endswith(".scores")}
        return Learner(loaded=loaded, model=loaded.model, write=write, rates=rates, before_step=masks.begin)

    def _scheme(self, checkpoint: Checkpoint) -> MaskedScheme:
        dtype = str(checkpoint.dtype).removeprefix("torch.")
        made = MaskedScheme(
            pattern=self.pattern, sparsity=self.sparsity, values=None,
            value_dtype=dtype if dtype in SCALE_DTYPES else "float32",
        )  # fmt: skip
        made.validate()
        return made


class Masks:
    """The masks of a run: drawn where they are due, read where they were drawn before a kill."""

    def __init__(self, fields: Sparse, modules: list[SparseLinear], names: list[str], folder: Path) -> None:
        self.fields, self.modules, self.names, self.folder = fields, modules, names, folder
        self._pattern = parse_pattern(fields.pattern)
        self._known = -1
        for module, name in zip(modules, names, strict=True):
            try:
                self._pattern.check_shape((module.weight.shape[0], module.weight.shape[1]))
            except RecipeError as error:
                raise RecipeError(f"{name}: {error}") from None

    def begin(self, step: int, losses: Callable[[], Iterator[Tensor]]) -> None:
        """Has the masks of `step`; `losses` gives those of its windows, one by one.

        Raises:
            UsageError: masks with which steps were taken are gone.
        """
        due = self._due(step)
        if due in (None, self._known):
            return
        if due == step and self._known < 0:
            self._recall(step)
        before = [module.mask for module in self.modules]
        path = self._file(due)
        drawn = path.is_file()
        wait_for_all()  # nobody writes before all have looked
        if not drawn:
            if due != step:
                raise UsageError(f"{path} is gone, with which steps were taken; start over with --fresh")
            self._draw(step, losses)
            if is_main_process():
                self.folder.mkdir(parents=True, exist_ok=True)
                masks = {n: m.mask.cpu() for n, m in zip(self.names, self.modules, strict=True)}
                keep(self.folder, path.name, masks)
        wait_for_all()
        self._read(due)
        if due == step and self._share(step):  # drawn just now, or before a kill: what comes back begins at zero
            for module, mask in zip(self.modules, before, strict=True):
                own(module.weight.detach())[own_of(module.mask & ~mask, module.weight)] = 0.0

    def _recall(self, step: int) -> None:
        """The masks of the step before this one, which a resumed run does not have yet."""
        last = self._due(step - 1)
        if last is None:
            return
        if not self._file(last).is_file():
            raise UsageError(f"{self._file(last)} is gone, with which steps were taken; start over with --fresh")
        self._read(last)

    def _file(self, step: int) -> Path:
        return self.folder / f"masks-{step:08d}.safetensors"

    def _share(self, step: int) -> float:
        return exchanged_share(step, self.fields.regrow, self.fields.span[1])

    def _read(self, step: int) -> None:
        shapes = {key: module.mask.shape for key, module in zip(self.names, self.modules, strict=True)}
        stored = recall(self._file(step), shapes)
        for key, module in zip(self.names, self.modules, strict=True):
            module.mask = stored[key].to(module.weight.device)
        self._known = step

    def finish(self) -> None:
        """The last masks, also of a run that was over before; all pruned, if patience ended it early."""
        drawn = sorted(self.folder.glob("masks-*.safetensors"))
        if drawn:
            self._read(int(drawn[-1].stem.rpartition("-")[2]))
        sparsity = self.fields.sparsity
        for module in self.modules:
            out_features, in_features = module.mask.shape
            if int((~module.mask).sum()) < self._pattern.pruned_count((out_features, in_features), sparsity):
                module.mask = pruned(module, None, self._pattern, sparsity, self._plain)

    @property
    def _plain(self) -> Score:
        return "movement" if self.fields.score == "movement" else "magnitude"

    def _due(self, step: int) -> int | None:
        """The last step up to this one in which masks changed; None before the first."""
        first, last = self.fields.span
        if step >= last:
            return last
        return None if step < first else first + (step - first) // self.fields.mask_every * self.fields.mask_every

    def _draw(self, step: int, losses: Callable[[], Iterator[Tensor]]) -> None:
        fields, (first, last) = self.fields, self.fields.span
        sparsity = sparsity_at(step, fields.sparsity, fields.growth, first, last)
        share = self._share(step)
        gradients: list[Tensor] | None = None
        if fields.score == "taylor" or share:
            gradients = gradients_of(self.modules, losses)
        for number, module in enumerate(self.modules):
            gradient = None if gradients is None else gradients[number]
            mask = pruned(module, gradient, self._pattern, sparsity, fields.score)
            if share and gradient is not None:
                by_row = self._pattern.kind == "row"
                mask = regrown(whole(module.weight.detach()), gradient, mask, share, by_row=by_row)
            module.mask = mask


def _linears(loaded: LoadedModel) -> list[Linear]:
    found = [x for x in loaded.anatomy.linears() if x.role != "router"]
    for linear in found:
        path = linear.slot.parameter.removesuffix(".weight")
        if linear.slot.index is not None or type(loaded.model.get_submodule(path)) is not nn.Linear:
            raise RecipeError(
                f"{linear.name} is no nn.Linear of its own in transformers, and sparse trains those alone; prune this "
                "family by a recipe, such as wanda-50"
            )
    return found


def _swapped(loaded: LoadedModel, linear: Linear, movement: bool) -> SparseLinear:
    path = linear.slot.parameter.removesuffix(".weight")
    parent, _, leaf = path.rpartition(".")
    made = SparseLinear(cast(nn.Linear, loaded.model.get_submodule(path)), movement=movement)
    setattr(loaded.model.get_submodule(parent), leaf, made)
    return made
