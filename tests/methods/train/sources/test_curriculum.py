"""A curriculum: competence by its equations, easy windows first, all of them in the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fettle.methods.train.sources.curriculum import competence, difficulties, paced_order
from fettle.methods.train.text_mix import TrainingText


def test_competence_is_the_papers() -> None:
    assert competence(0, 100, "linear") == competence(0, 100, "root") == pytest.approx(0.1)
    assert competence(50, 100, "linear") == pytest.approx(0.55)
    assert competence(50, 100, "root") == pytest.approx((0.5 * (1 - 0.01) + 0.01) ** 0.5)
    assert competence(100, 100, "linear") == competence(120, 100, "root") == 1.0


def test_a_step_draws_from_the_easiest_and_later_from_all() -> None:
    losses = torch.randn(40, generator=torch.Generator().manual_seed(0))
    rank = losses.argsort().argsort()
    order = paced_order(losses, steps=40, batch_windows=4, seed=0, pacing="linear", pace=0.5)
    assert len(order) == 160
    for step in range(20):
        count = max(1, int(competence(step, 20, "linear") * 40))
        row = order[4 * step : 4 * step + 4]
        assert int(rank[row].max()) < count
        assert len(set(row.tolist())) == min(4, count)
    assert int(rank[order[:8]].max()) < 8
    assert sorted(order[80:120].tolist()) == sorted(order[120:].tolist()) == list(range(40))
    assert torch.equal(order, paced_order(losses, 40, 4, 0, "linear", 0.5))


def test_losses_are_asked_for_once(tmp_path: Path) -> None:
    ids = torch.arange(12).reshape(6, 2)
    text = TrainingText(ids=ids, learned=4, sources=(), sha256="a", note="")
    asked = []

    def judge() -> object:
        asked.append(1)
        return lambda part: part[:, 0].float()

    first = difficulties(judge, text, tmp_path, {"judge": "x"})  # type: ignore[arg-type]
    assert first.tolist() == [0.0, 2.0, 4.0, 6.0]  # of what is learned from alone
    assert torch.equal(difficulties(judge, text, tmp_path, {"judge": "x"}), first)  # type: ignore[arg-type]
    assert len(asked) == 1
    difficulties(judge, text, tmp_path, {"judge": "y"})  # type: ignore[arg-type]
    assert len(asked) == 2
