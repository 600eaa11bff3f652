"""The mix: which window stands in every place of a run, where some are decided only while the student learns.

    place  = step · batch_windows + position in the step
    window = order[place]                       known before the first step
           | what a source drew for this place  at the last step that refresh_every divides

A source that looks at the student draws for a whole segment of `refresh_every` steps at once, from the student as it is
at the segment's first step. What it drew is written to a file before any of these steps is taken. A killed run goes on
from a checkpoint inside the segment with the same file, or from one at its beginning with the same weights, so it sees
the same windows as an undisturbed one.

Batches carry places, not windows: the loop's library fetches a batch ahead of the step before it, and a place is
looked up when its step has begun. Of B places a step, ⌊(t + 1) · B · share⌋ - ⌊t · B · share⌋ belong to a source in
step t, so that any share is met over the run; the seed says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fettle.errors import UsageError
from fettle.methods.train.kept import keep, recall
from fettle.methods.train.options import LoopFields
from fettle.methods.train.processes import is_main_process, wait_for_all
from fettle.methods.train.text_mix import Order, TrainingText, drawing_seed

FOLDER = "drawn"
MADE = -1  # the number of a window that no text holds


class Source(Protocol):
    """What looks at the student and gives windows.

    Attributes:
        name: of its files.
        share: of each step's places.
    """

    name: str
    share: float

    def draw(self, first_step: int, windows: Tensor) -> dict[str, Tensor]:
        """Windows for the places of one segment.

        Args:
            first_step: the segment's.
            windows: int64 [places], which windows of the text would stand there.

        Returns:
            "window" int64 [places], `MADE` for those that are made, and "ids" int64 [places, length].
        """
        ...


class Mix:
    """Places → windows."""

    def __init__(
        self, text: TrainingText, order: Tensor | Order, fields: LoopFields,
        *, sources: Sequence[Source] = (), every: int = 1, folder: Path = Path(),
    ) -> None:  # fmt: skip
        """`order` int64 [steps · batch_windows], drawn or drawn on the way; `every`, a segment's steps; `folder` for
        what sources drew.
        """
        self.text, self.order, self.sources = text, order, tuple(sources)
        self._batch, self._seed, self._every, self._folder = fields.batch_windows, fields.seed, every, folder
        self._segment = -1
        self._drawn: dict[int, tuple[int, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.order)

    def begin(self, step: int) -> None:
        """Has what the sources give for the segment of `step`, drawn now or read.

        Raises:
            UsageError: what was drawn for a segment that has begun is gone.
        """
        segment = step // self._every
        if not self.sources or segment == self._segment:
            return
        first = segment * self._every
        self._drawn.clear()
        for number, source in enumerate(self.sources):
            places = self._places(number, first)
            if len(places):
                self._take_up(source, first, places, begun=step != first)
        self._segment = segment

    def take(self, places: Tensor) -> dict[str, Tensor]:
        """What the objective is called with: "window" [batch] and "input_ids" [batch, length] for places [batch]."""
        found = [self._drawn.get(place) for place in places.tolist()]
        ordered = self.order[places].tolist()
        windows = [known if x is None else x[0] for known, x in zip(ordered, found, strict=True)]
        ids = [self.text.ids[w] if x is None else x[1] for w, x in zip(windows, found, strict=True)]
        return {"window": torch.tensor(windows), "input_ids": torch.stack(ids)}

    def _take_up(self, source: Source, first: int, places: Tensor, *, begun: bool) -> None:
        name = f"{source.name}-{first:08d}.safetensors"
        if is_main_process() and not (self._folder / name).is_file():
            if begun:
                raise UsageError(f"{self._folder / name} is gone, from which steps were taken; start over with --fresh")
            self._folder.mkdir(parents=True, exist_ok=True)
            keep(self._folder, name, source.draw(first, self.order[places]))
        wait_for_all()  # the others read what the first process wrote
        stored = recall(self._folder / name)
        for place, window, ids in zip(places.tolist(), stored["window"].tolist(), stored["ids"], strict=True):
            self._drawn[place] = (window, ids)

    def _places(self, number: int, first: int) -> Tensor:
        """The places of source `number` in the segment that begins at step `first`, ascending."""
        found: list[int] = []
        for step in range(first, min(first + self._every, len(self.order) // self._batch)):
            generator = torch.Generator().manual_seed(drawing_seed(self._seed, step))
            shuffled = torch.randperm(self._batch, generator=generator).tolist()
            start = 0
            for other, source in enumerate(self.sources[: number + 1]):
                share = self._batch * source.share
                count = int((step + 1) * share + 1e-9) - int(step * share + 1e-9)
                if other == number:
                    found += sorted(step * self._batch + position for position in shuffled[start : start + count])
                start += count
        return torch.tensor(found, dtype=torch.int64)
