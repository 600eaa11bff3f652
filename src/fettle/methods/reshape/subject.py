"""What a reshaping method is given, and what it gives back: a model as files, text, and a view of the files.

A `Subject` is the base as it stands (a folder, or the view that an earlier step made) with windows of text; a
`Reshaped` is a view and what was decided. Passes of the text through the model are made block by block, so a model is
judged on a machine that could not load it; every sum has one order, so the same text decides the same on any number of
threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fettle.errors import NonFiniteError, RecipeError
from fettle.methods.protocols import StepMethod
from fettle.models.anatomy import Anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.families import FAMILIES, Family
from fettle.models.skeleton import Skeleton
from fettle.models.view import View, parameter_count
from fettle.workers import Workers

States = list[Tensor]  # one window each: [1, tokens, hidden]


class MeasureStep(Protocol):
    """Times a model that may be a view."""

    def __call__(self, checkpoint: Checkpoint, *, engine: str, tokens: int) -> float:
        """Seconds of a step of so many tokens on the engine of this name.

        Raises:
            UsageError: the engine cannot run the model, or is not there.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is to be reshaped.

    Attributes:
        checkpoint: the base, or the view of an earlier step.
        anatomy: of it.
        windows: int64 [tokens] each; empty for a method that looks at no text.
        workers: entered by the caller.
        device: where blocks run.
        used_tokens: the ids that the whole text is cut into, ascending.
        measure: how long a step of a model takes on this machine; None where nothing measures.
    """

    checkpoint: Checkpoint
    anatomy: Anatomy
    windows: tuple[Tensor, ...]
    workers: Workers
    device: str = "cpu"
    used_tokens: Callable[[], list[int]] = list
    measure: MeasureStep | None = None

    @property
    def family(self) -> Family:
        """The family's table.

        Raises:
            RecipeError: an architecture without one cannot be reshaped.
        """
        for family in FAMILIES:
            if family.name == self.anatomy.family:
                return family
        raise RecipeError(
            "an architecture without a table of its matrices cannot be reshaped: nobody knows which numbers of its "
            f"configuration belong to them. Families with a table: {', '.join(f.name for f in FAMILIES)}"
        )

    @property
    def parameters(self) -> int:
        """How many parameters it has."""
        return parameter_count(self.checkpoint)

    def skeleton(self) -> tuple[Skeleton, States]:
        """The module tree, and the windows as they enter block 0."""
        skeleton = Skeleton.build(self.checkpoint, self.anatomy, device=self.device)
        hidden = [skeleton.embed(ids.unsqueeze(0)) for ids in self.windows]
        skeleton.free_head()
        return skeleton, hidden

    def run_block(self, skeleton: Skeleton, index: int, hidden: States) -> States:
        """Windows through a loaded block; NonFiniteError names it."""
        found = self.workers.map(lambda state: skeleton.run_block(index, state), hidden)
        if not all(bool(torch.isfinite(state).all()) for state in found):
            raise NonFiniteError(f"block {index} ({self.anatomy.blocks[index].name}) computes NaN or infinity")
        return found

    def require_predictions(self, method: str) -> None:
        """Raises RecipeError for a model that predicts no tokens."""
        if not self.anatomy.causal or self.anatomy.head is None:
            raise RecipeError(
                f"{method} measures what the model predicts, and this one ({self.anatomy.family}) has no "
                "language-model head; choose another score"
            )


@dataclass(frozen=True, kw_only=True)
class Reshaped:
    """The model in its new shape.

    Attributes:
        view: its tensors as functions of the subject's.
        decided: what was removed, and by which scores: plain data for `fettle.json`.
    """

    view: View
    decided: Mapping[str, Any] = field(default_factory=dict)


class ModelMethod(StepMethod, Protocol):
    """Gives a model another shape; `statistics` is ("text",) where windows of text run through the model."""

    def label(self) -> str:
        """What one step with these fields is called in the name of a recipe: "drop-2"."""
        ...

    def reshape(self, subject: Subject) -> Reshaped:
        """The subject in its new shape; deterministic.

        Raises:
            RecipeError: a shape that this model cannot have, with the reason.
        """
        ...


def parse_share(text: str, field_name: str, method: str) -> float:
    """The share that a text such as 0.6x means.

    Raises:
        RecipeError: no number between 0 and 1 with an x behind it.
    """
    try:
        share = float(text[:-1]) if text.endswith("x") else 0.0
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        try:
            lacks_x = 0 < float(text) < 1
        except ValueError:
            lacks_x = False
        advice = f"write {text}x" if lacks_x else "write a share between 0 and 1 with an x behind it, such as 0.6x"
        raise RecipeError(f"{method}: {field_name}={text!r} is no share of the original's; {advice}")
    return share


def total(parts: Sequence[float]) -> float:
    """The sum, from left to right: one order for any number of threads."""
    found = 0.0
    for part in parts:
        found += part
    return found
