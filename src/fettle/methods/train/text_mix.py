"""Training windows: what a run learns from, what it is stopped by, and in which order windows come.

The text is cut once, by characters: its last part is held back for early stopping, windows for learning are drawn from
the rest, so that no step sees what it is judged by; where a text of its own is held back, nothing is cut. (Neither is
the held-out text that an evaluation uses.) With a replayed text a share of the windows comes from there: old data
against forgetting.

The order of windows is a list that the seed gives: whole passes, each shuffled anew. A step is a row of that list, so a
resumed run, and one on two processes, takes the same windows in the same steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fettle.data.windows import Text, Windows, calibration_windows, evaluation_windows, read_text
from fettle.errors import UsageError
from fettle.methods.train.options import LoopFields

HELD_BACK_SHARE = 0.05  # of the text's characters


class Order:
    """Which window stands in each place of a run: int64 [places], of which passes are drawn when they are reached."""

    def __init__(self, windows: int, places: int, seed: int) -> None:
        self._windows, self._places = windows, places
        self._generator = torch.Generator().manual_seed(seed)
        self._passes: list[Tensor] = []

    def __len__(self) -> int:
        return self._places

    def __getitem__(self, places: Tensor) -> Tensor:
        """Windows int64 [n] of places int64 [n], each below the length."""
        while len(places) and int(places.max()) >= len(self._passes) * self._windows:
            self._passes.append(torch.randperm(self._windows, generator=self._generator))
        found = [int(self._passes[place // self._windows][place % self._windows]) for place in places.tolist()]
        return torch.tensor(found, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """Windows of one length: `ids` int64 [windows, length], those held back behind `learned` others.

    `tasks` says of each learned window which of the `sources` it was drawn from.
    """

    ids: Tensor
    learned: int
    sources: tuple[str, ...]
    sha256: str
    note: str
    tasks: tuple[int, ...] = ()

    def order(self, steps: int, batch_windows: int, seed: int) -> Order:
        """Which window each place of each step takes: shuffled passes, one by one."""
        return Order(self.learned, steps * batch_windows, seed)

    @property
    def held_back(self) -> Tensor:
        """Indices of the windows that no step sees."""
        return torch.arange(self.learned, len(self.ids))


def training_text(
    tokenizer: Any, fields: LoopFields, *, written: Text | None = None, written_share: float = 0.0
) -> TrainingText:
    """Reads and cuts the texts that `fields` name; `written` is the teacher's own, of which a share of windows comes.

    Raises:
        UsageError: a text that cannot be read, or is too short for one window to learn from and one to hold back.
    """
    texts = [read_text(fields.text)]
    counts = [fields.windows]
    if fields.replay is not None:
        texts.append(read_text(fields.replay))
        counts.append(round(fields.windows * fields.replay_share))
    parts = cut_texts(texts, fields)
    if written is not None:
        texts.append(written)
        counts.append(max(1, round(fields.windows * written_share)))
        parts.append((written, written))
    counts[0] -= sum(counts[1:])
    learned, notes = [], []
    drawn_from: list[int] = []
    for number, ((first, _), count) in enumerate(zip(parts, counts, strict=True)):
        if count > 0:
            drawn = calibration_windows(
                tokenizer, first, windows=count, length=fields.length, seed=fields.seed + number
            )
            whole = _whole(drawn, fields.length)
            if number and not whole:  # it was asked for by name, and would be left out without a word
                raise UsageError(
                    f"{texts[number].source} has no window of {fields.length} tokens; give a longer text, a smaller "
                    "length, or leave it out"
                )
            learned += whole
            drawn_from += [number] * (len(learned) - len(drawn_from))
            notes += [drawn.note] if drawn.note else []
    apart = [parts[0][1]] if fields.held_back_text is not None else []  # a text of its own counts as well
    kept: list[Tensor] = []
    if fields.held_back:
        last = parts[0][1]
        cut = evaluation_windows(tokenizer, last, length=fields.length, max_tokens=fields.held_back * fields.length)
        kept = _whole(cut, fields.length)[: fields.held_back]
    if not learned or (fields.held_back and not kept):
        short = parts[0][1].source if learned else texts[0].source
        raise UsageError(
            f"{short} is too short for windows of {fields.length} tokens to learn from and to hold back; "
            "give a longer text, a smaller length, or held_back: 0"
        )
    return TrainingText(
        ids=torch.stack(learned + kept),
        learned=len(learned),
        sources=tuple(text.source for text in texts),
        sha256=hashlib.sha256("".join(text.sha256 for text in (*texts, *apart)).encode()).hexdigest(),
        note="; ".join(notes),
        tasks=tuple(drawn_from),
    )


def drawing_seed(seed: int, place: int) -> int:
    """A seed of its own for what is drawn at a place of a run, so that a resumed run draws the same."""
    return (seed + 1) * 1_000_003 + place


def require_tokenizer(tokenizer: Any, model: str | Path) -> None:
    """Raises UsageError where a model came without one."""
    if tokenizer is None:
        raise UsageError(f"{model} has no tokenizer files, and training reads text; give a folder that has them")


def learning_part(fields: LoopFields) -> Text:
    """The text without what is held back."""
    return cut_texts([read_text(fields.text)], fields)[0][0]


def cut_texts(texts: Sequence[Text], fields: LoopFields) -> list[tuple[Text, Text]]:
    """Of each text: what windows are drawn from, and what is held back, a text of its own where one is named."""
    if fields.held_back_text is None:
        return [cut_off(text, fields.held_back > 0) for text in texts]
    return [(text, read_text(fields.held_back_text)) for text in texts]


def cut_off(text: Text, hold_back: bool) -> tuple[Text, Text]:
    """What windows are drawn from, and what is held back: the end of the text, from a line's beginning on."""
    if not hold_back:
        return text, text
    place = int(len(text.content) * (1 - HELD_BACK_SHARE))
    place = text.content.find("\n", place) + 1 or place
    return replace(text, content=text.content[:place]), replace(text, content=text.content[place:] or text.content[-1:])


def _whole(windows: Windows, length: int) -> list[Tensor]:
    return [ids for ids in windows.ids if len(ids) == length]
