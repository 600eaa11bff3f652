"""Places and windows: shares are met exactly, drawings are kept, and what was drawn is taken up after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fettle.errors import UsageError
from fettle.methods.train.options import LoopFields
from fettle.methods.train.sources.mix import MADE, Mix
from fettle.methods.train.text_mix import TrainingText

LENGTH, WINDOWS = 4, 10


class Counted:
    """Gives windows of its own number and remembers what it was asked."""

    def __init__(self, name: str, share: float, fill: int) -> None:
        self.name, self.share, self.fill = name, share, fill
        self.asked: list[tuple[int, list[int]]] = []

    def draw(self, first_step: int, windows: Tensor) -> dict[str, Tensor]:
        self.asked.append((first_step, windows.tolist()))
        ids = torch.full((len(windows), LENGTH), self.fill + first_step)
        return {"window": torch.full((len(windows),), MADE), "ids": ids}


def text() -> TrainingText:
    ids = torch.arange(WINDOWS).unsqueeze(1).expand(-1, LENGTH).contiguous()
    return TrainingText(ids=ids, learned=WINDOWS, sources=("none",), sha256="", note="")


def mix(folder: Path, *sources: Any, steps: int = 6, batch: int = 5, every: int = 2) -> Mix:
    found = text()
    fields = LoopFields(batch_windows=batch, seed=3)
    return Mix(found, found.order(steps, batch, 0), fields, sources=sources, every=every, folder=folder)


def taken(made: Mix, step: int, batch: int = 5) -> dict[str, Tensor]:
    made.begin(step)
    return made.take(torch.arange(step * batch, (step + 1) * batch))


def test_without_sources_a_place_holds_the_window_of_the_order(tmp_path: Path) -> None:
    plain = mix(tmp_path)
    found = taken(plain, 3)
    wanted = plain.order[torch.arange(15, 20)]
    assert torch.equal(found["window"], wanted)
    assert torch.equal(found["input_ids"], plain.text.ids[wanted])
    assert not list(tmp_path.iterdir())


def test_shares_that_divide_no_step_are_met_over_the_run(tmp_path: Path) -> None:
    one, two = Counted("one", 0.3, 100), Counted("two", 0.1, 200)
    made = mix(tmp_path, one, two, steps=20, batch=5)
    first = torch.stack([taken(made, step)["input_ids"][:, 0] for step in range(20)])
    assert int(((first >= 100) & (first < 200)).sum()) == 30
    assert int((first >= 200).sum()) == 10
    assert {int(row.ge(100).sum()) for row in first} <= {1, 2, 3}


def test_a_source_is_asked_once_a_segment_for_the_windows_that_it_replaces(tmp_path: Path) -> None:
    source = Counted("one", 0.4, 100)
    made = mix(tmp_path, source)
    for step in range(6):
        found = taken(made, step)
        drawn = found["window"] == MADE
        assert int(drawn.sum()) == 2
        assert (found["input_ids"][drawn] == 100 + step // 2 * 2).all()
        order = made.order[torch.arange(step * 5, (step + 1) * 5)]
        assert torch.equal(found["window"][~drawn], order[~drawn])
    assert [step for step, _ in source.asked] == [0, 2, 4]
    assert all(len(windows) == 4 for _, windows in source.asked)


def test_a_resumed_run_takes_up_what_was_drawn(tmp_path: Path) -> None:
    before = mix(tmp_path, Counted("one", 0.4, 100))
    wanted = [taken(before, step) for step in range(4)]
    again = Counted("one", 0.4, 900)
    after = mix(tmp_path, again)
    found = [taken(after, step) for step in (1, 2, 3)]  # from inside a segment, and on into the next
    assert not again.asked
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(wanted[1:], found, strict=True))


def test_a_segment_that_has_begun_is_not_drawn_again_from_later_weights(tmp_path: Path) -> None:
    taken(mix(tmp_path, Counted("one", 0.4, 100)), 0)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(UsageError, match=r"one-00000000.safetensors is gone.*--fresh"):
        taken(mix(tmp_path, Counted("one", 0.4, 100)), 1)
