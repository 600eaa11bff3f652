"""The adversarial source takes the candidates that are furthest apart, against brute force."""

from __future__ import annotations

import torch
from torch import Tensor

from fettle.methods.train.sources.adversarial import Adversarial
from fettle.methods.train.sources.fields import DataFields
from fettle.methods.train.text_mix import TrainingText


def text(learned: int) -> TrainingText:
    ids = torch.arange(learned + 2).unsqueeze(1).expand(-1, 3).contiguous()
    return TrainingText(ids=ids, learned=learned, sources=(), sha256="", note="")


def gap(window: Tensor, ids: Tensor) -> Tensor:
    assert torch.equal(ids[:, 0], window)
    return (window.float() * 7) % 11


def source(learned: int, candidates: int) -> Adversarial:
    return Adversarial(gap, text(learned), DataFields(adversarial=0.5, candidates=candidates), seed=5)


def test_with_all_windows_as_candidates_the_worst_of_all_come() -> None:
    found = source(learned=12, candidates=6).draw(0, torch.zeros(2, dtype=torch.int64))
    worst = sorted(range(12), key=lambda w: -((w * 7) % 11))[:2]
    assert sorted(found["window"].tolist()) == sorted(worst)
    assert torch.equal(found["ids"][:, 0], found["window"])


def test_few_candidates_are_a_sample_that_changes_with_the_step() -> None:
    made = source(learned=100, candidates=2)
    one, two = (made.draw(step, torch.zeros(3, dtype=torch.int64))["window"] for step in (0, 20))
    assert len(set(one.tolist())) == 3
    assert not torch.equal(one, two)
    assert torch.equal(one, source(100, 2).draw(0, torch.zeros(3, dtype=torch.int64))["window"])


def test_windows_come_again_where_there_are_too_few() -> None:
    found = source(learned=2, candidates=2).draw(0, torch.zeros(5, dtype=torch.int64))["window"]
    assert found.tolist() == [1, 0, 1, 0, 1]
