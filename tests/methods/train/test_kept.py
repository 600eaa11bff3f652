"""What a run keeps is believed where it is whole: a damaged checkpoint is as good as lost, other damage has a name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fettle.errors import ResumeError
from fettle.methods.train.curve import BEST, MARK, checkpoints
from fettle.methods.train.kept import is_whole, keep, recall, recall_json
from fettle.methods.train.loop import WEIGHTS, run
from fettle.progress import Silent

from .test_loop import Pull, fields, windows


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_tensors_come_back_or_their_damage_is_named(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True]), "none": torch.zeros(0)}
    path, shapes = tmp_path / "kept.safetensors", {name: value.shape for name, value in tensors.items()}
    for damage in (cut, flip, empty):
        keep(tmp_path, path.name, tensors)
        assert all(torch.equal(value, tensors[name]) for name, value in recall(path, shapes).items())
        damage(path)
        with pytest.raises(ResumeError, match=r"kept\.safetensors is damaged.*--fresh"):
            recall(path, shapes)
    keep(tmp_path, path.name, {**tensors, "a": torch.zeros(3, 2)})
    with pytest.raises(ResumeError, match=r"kept\.safetensors holds other parameters.*--fresh"):
        recall(path, shapes)
    path.unlink()
    with pytest.raises(ResumeError, match=r"kept\.safetensors is gone.*--fresh"):
        recall(path)
    for text in ('{"half": ', "\udcff"):
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(ResumeError, match=r"kept\.safetensors is damaged.*--fresh"):
            recall_json(path)


def half(path: Path) -> None:
    (path / MARK).write_text((path / MARK).read_text()[:40])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: cut(path / WEIGHTS),
        lambda path: flip(path / "optimizer.pt"),
        lambda path: (path / "trainer_state.json").unlink(),
        half,
    ],
)
def test_a_damaged_checkpoint_is_as_good_as_lost(damage: Callable[[Path], None], tmp_path: Path) -> None:
    """The run goes on from the one before, to the same weights."""
    how = fields(steps=8, checkpoint_every=2, keep="last", schedule="constant")
    whole, torn, again = Pull(), Pull(), Pull()
    expected = run(whole, windows(), how, tmp_path / "whole", Silent())
    run(torn, windows(), how, tmp_path / "torn", Silent())
    last = checkpoints(tmp_path / "torn")[-1]
    damage(last)
    assert not is_whole(last / MARK)
    found = run(again, windows(), how, tmp_path / "torn", Silent())
    assert (found.losses, found.held_back) == (expected.losses, expected.held_back)
    assert torch.equal(again.weight, whole.weight)
    assert is_whole(last / MARK)
    (last / MARK).write_text(json.dumps({"another": "mark"}))
    assert not is_whole(last / MARK)


def test_damaged_best_weights_are_refused(tmp_path: Path) -> None:
    """Steps went on from them, and nothing else holds them."""
    how = fields(steps=4, checkpoint_every=2)
    run(Pull(other=0.0), windows(), how, tmp_path, Silent())
    flip(tmp_path / BEST)
    with pytest.raises(ResumeError, match=r"best\.safetensors is damaged"):
        run(Pull(other=0.0), windows(), how, tmp_path, Silent())
