"""What a training reads and writes, a student that is ready to learn, and the shape of a method of this room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from fettle.methods.train.options import BEFORE, SignalFields
from fettle.methods.train.sources.on_policy import Completer
from fettle.models.loading import LoadedModel
from fettle.progress import Progress, Silent

BeforeStep = Callable[[int, Callable[[], Iterator[Tensor]]], None]


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What a training reads and writes.

    Attributes:
        model: the folder (hub id, or demo) that is trained.
        original: the teacher where none is named; the model that a chain began with.
        output: the folder that is written.
        folder: for checkpoints and curve; of this run alone.
        answers: for teachers' answers, found again by who asks the same; None: in `folder`.
        base_name: what `fettle.json` calls the model.
        device: torch's word for it.
        generic: treat every linear of an unknown family alike.
        progress: told how far it is.
        complete: writes text with a loaded model; None: sources that need it are refused. The engine is on the same
            floor as methods, so whoever calls both brings it along.
    """

    model: str | Path
    original: str | Path
    output: Path
    folder: Path
    answers: Path | None = None
    base_name: str = ""
    device: str = "cpu"
    generic: bool = False
    progress: Progress = field(default_factory=Silent)
    complete: Completer | None = None

    def teachers(self, signals: SignalFields) -> list[str]:
        """The models that are learned from, as `resolve` takes them."""
        named = [str(self.model) if name == BEFORE else name for name in signals.teachers()]
        return named or [str(self.original)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Learner:
    """A student that is ready to learn.

    Attributes:
        loaded: tree, anatomy, tokenizer and folder.
        model: what is called: the tree, or what wraps it.
        write: given the record for `fettle.json`, writes what was learned.
        rates: factors of the learning rate, by the beginning of a parameter's name in `model`.
        before_step: told of each step before it is taken, with what computes the losses of its windows one by one.
        shared_out: called when the parameters lie in parts (sharding.py), and hooks on the whole ones are gone.
    """

    loaded: LoadedModel
    model: nn.Module
    write: Callable[[dict[str, Any]], None]
    rates: dict[str, float] = field(default_factory=dict)
    before_step: BeforeStep | None = None
    shared_out: Callable[[], None] = lambda: None


class TrainMethod(Protocol):
    """A training method: a frozen, keyword-only dataclass with the keys of `LoopFields`, `SignalFields` and
    `DataFields`.
    """

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
