"""What a training run tells: one line a step, looks at the windows held back, the best of them; plain data for pages.

The recorder stands between the loop's library and the disk. It keeps the trainable weights with the least held-back
loss in a file, marks a checkpoint as whole once everything in it is on the disk (a kill in the middle of a checkpoint
leaves one without mark, which is never used, and neither is one whose files changed since), and says when to stop.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fettle.errors import NonFiniteError
from fettle.methods.train.kept import FILES, file_digests, is_whole, recall_json
from fettle.methods.train.options import LoopFields
from fettle.methods.train.processes import first_says, wait_for_all
from fettle.methods.train.sharding import write_whole
from fettle.models.writer import sync_folder, write_json
from fettle.progress import Task

CHECKPOINTS, MARK, BEST = "checkpoints", "whole.json", "best.safetensors"
KEPT_CHECKPOINTS = 2


@dataclass(kw_only=True)
class Curve:
    """The course of a run.

    Attributes:
        losses: loss of each step, from the first on.
        learning_rates: step size of each step.
        held_back: (step, loss on the windows held back), the start at step 0 first.
        seconds: of all sittings together.
        stopped: why it ended before its last step; empty where it did not.
        answer_bytes: of the teacher's answers that were kept on disk; 0 where it ran along.
    """

    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    held_back: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    stopped: str = ""
    answer_bytes: int = 0

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best look; the earlier of equal ones."""
        return min(self.held_back, key=lambda look: look[1], default=None)

    def misses(self) -> int:
        """Looks since the best one."""
        steps = [step for step, _ in self.held_back]
        return len(steps) - 1 - steps.index(self.best[0]) if self.best is not None else 0

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads back."""
        return {**asdict(self), "held_back": [list(look) for look in self.held_back]}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Curve:
        """The inverse of `to_json`."""
        found = {key: value for key, value in found.items() if key != FILES}
        return cls(**{**found, "held_back": [(int(step), float(loss)) for step, loss in found["held_back"]]})


class Recorder:
    """Follows one run; its methods are the events of transformers' `TrainerCallback`."""

    def __init__(self, objective: nn.Module, fields: LoopFields, folder: Path, task: Task) -> None:
        self.objective, self.fields, self.folder, self.task = objective, fields, folder, task
        self.curve = Curve()
        self.share = 0.0  # of the minutes, where they bound the run
        self._told = 0  # seconds that the task was told of
        self._earlier = 0.0
        self._started = time.monotonic()

    def resume(self, checkpoint: Path) -> None:
        """Takes up the curve that a whole checkpoint holds."""
        self.curve = Curve.from_json(recall_json(checkpoint / MARK))
        self._earlier = self.curve.seconds
        self.task.advance(self._progress(len(self.curve.losses)))

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **rest: Any) -> None:
        """One step's loss; raises NonFiniteError where it is none."""
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise NonFiniteError(
                f"the loss of step {state.global_step} is {logs['loss']}; use a smaller learning_rate, or more warmup"
            )
        self.curve.losses.append(float(logs["loss"]))
        self.curve.learning_rates.append(float(logs["learning_rate"]))
        self.task.advance(self._progress(1))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **rest: Any) -> None:
        """A look at the windows held back: the best weights so far are kept, and too many misses end the run."""
        step, loss = state.global_step, float(metrics["eval_loss"])
        if not math.isfinite(loss):
            raise NonFiniteError(f"the held-back loss at step {step} is {loss}; use a smaller learning_rate")
        self.curve.held_back.append((step, loss))
        if self.curve.best == (step, loss) and self.fields.keep == "best":
            write_whole(self.folder, BEST, trainable(self.objective))
        if self.curve.misses() >= self.fields.patience and not self.curve.stopped:
            self.curve.stopped = f"{self.fields.patience} looks at the windows held back without a gain"
            control.should_training_stop = True

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Looks at the clock, just before the schedule gives the next step its size."""
        if self.fields.minutes is not None:
            self.share = min(1.0, first_says(self.seconds() / (60 * self.fields.minutes)))

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Ends the run when its minutes are over, with a last look at what they led to."""
        if self.fields.minutes is not None and self.share >= 1.0:
            self.curve.stopped = f"{self.fields.minutes:g} minutes were over"
            control.should_training_stop = control.should_save = True
            control.should_evaluate = args.eval_strategy != "no"

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Marks the checkpoint as whole and removes those before the last two."""
        wait_for_all()  # each process writes its own random state
        if not state.is_world_process_zero:
            return
        checkpoint = self.folder / CHECKPOINTS / f"checkpoint-{state.global_step}"
        for path in checkpoint.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        self.curve.seconds = self.seconds()
        write_json(checkpoint / MARK, {**self.curve.to_json(), FILES: file_digests(checkpoint)})
        sync_folder(checkpoint.parent)
        for old in checkpoints(self.folder)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def _progress(self, steps: int) -> int:
        """What the task is told after so many more steps: these, or the seconds since, where minutes bound the run."""
        if self.fields.minutes is None:
            return steps
        before, self._told = self._told, int(min(self.seconds(), 60 * self.fields.minutes))
        return self._told - before

    def seconds(self) -> float:
        """Seconds of all sittings."""
        return round(self._earlier + time.monotonic() - self._started, 3)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, the oldest first."""
    marks = (folder / CHECKPOINTS).glob(f"checkpoint-*/{MARK}")
    return sorted((mark.parent for mark in marks), key=lambda path: int(path.name.rpartition("-")[2]))


def drop_torn(folder: Path) -> None:
    """Removes checkpoints that a kill left without their mark, and those whose files are not what their mark tells."""
    whole = {path for path in checkpoints(folder) if is_whole(path / MARK)}
    for path in (folder / CHECKPOINTS).glob("checkpoint-*"):
        if path not in whole:
            shutil.rmtree(path)


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that learn, by name; those that are one tensor under several names come once."""
    return {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}
