"""Several teachers: their weighted mean, and weights that follow a sample, a task, or the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fettle.errors import RecipeError
from fettle.methods.registry import build
from fettle.methods.train import TRAIN_METHODS, signals
from fettle.methods.train.options import Weighting
from fettle.methods.train.outputs import Outputs
from fettle.methods.train.several import Several
from fettle.methods.train.text_mix import TrainingText
from fettle.progress import Silent

VOCAB = 11


class Table:
    """A teacher that is a table of logits; counts the windows that it was asked for."""

    def __init__(self, table: Tensor) -> None:
        self.table, self.asked = table, 0

    def __call__(self, input_ids: Tensor, window: Tensor | None = None) -> Outputs:
        self.asked += len(input_ids)
        return Outputs(logits=self.table[input_ids])


def table(seed: int) -> Table:
    return Table(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)))


def windows(count: int = 40) -> Tensor:
    return torch.randint(0, VOCAB, (count, 6), generator=torch.Generator().manual_seed(1))


def test_several_teachers_are_the_weighted_mean_of_their_probabilities() -> None:
    one, two, ids = table(1), table(2), windows(3)
    together = Several([one, two], [0.75, 0.25], temperature=2.0)(ids).logits
    parts = [torch.softmax(t.table[ids] / 2.0, -1) for t in (one, two)]
    assert torch.allclose(torch.softmax(together / 2.0, -1), 0.75 * parts[0] + 0.25 * parts[1], atol=1e-6)
    student = torch.randn(3, 6, VOCAB)
    mean = 0.75 * parts[0] + 0.25 * parts[1]
    plain = (mean * (mean.log() - torch.log_softmax(student / 2.0, -1))).sum(-1).mean() * 4
    assert float(signals.soft_labels(student, together, 2.0, "forward")) == pytest.approx(float(plain), rel=1e-4)


def losses(teacher: Table, ids: Tensor) -> Tensor:
    logs = torch.log_softmax(teacher.table[ids[:, :-1]], -1)
    return -logs.gather(-1, ids[:, 1:, None])[..., 0].mean(-1)


def test_weights_by_loss_are_the_papers_for_each_sample() -> None:
    """1 / (K - 1) · (1 - exp L_i / Σ exp L_j), written out for three teachers."""
    teachers, ids = [table(seed) for seed in range(3)], windows(4)
    several = Several(teachers, [1 / 3] * 3, 2.0, "loss")
    found = several.weights(several.measure(ids))
    raised = torch.stack([losses(t, ids).exp() for t in teachers], -1)
    assert torch.allclose(found, (1 - raised / raised.sum(-1, keepdim=True)) / 2, atol=1e-5)
    mean = sum(found[:, i, None, None] * torch.softmax(t.table[ids] / 2.0, -1) for i, t in enumerate(teachers))
    assert torch.allclose(torch.softmax(several(ids).logits / 2.0, -1), mean, atol=1e-5)


def test_who_stands_alone_counts_less() -> None:
    one, other = table(1), table(2)
    near = Table(one.table + 0.01 * table(3).table)
    several = Several([one, near, other], [1 / 3] * 3, 1.0, "agreement")
    weights = several.weights(several.measure(windows(8)))
    assert (weights[:, 2] < weights[:, :2].min(-1).values).all()
    assert torch.allclose(weights.sum(-1), torch.ones(8))
    parts = [torch.softmax(t.table[windows(8)], -1) for t in (one, near, other)]
    mean = sum(parts) / 3
    far = torch.stack([(mean * (mean / p).log()).sum(-1).mean(-1) for p in parts], -1)
    assert torch.allclose(weights, torch.softmax(-far, -1), atol=1e-5)


def test_tasks_share_a_weight_that_is_measured_once(tmp_path: Path) -> None:
    teachers, ids = [table(1), table(2)], windows(10)
    text = TrainingText(ids=ids, learned=8, sources=("a", "b"), sha256="x", note="", tasks=(0,) * 5 + (1,) * 3)
    several = Several(teachers, [0.5, 0.5], 1.0, "loss")
    several.settle_by_task(text, tmp_path, {"teachers": 1}, Silent())
    assert teachers[0].asked == 8
    mean = torch.stack([losses(t, ids[5:8]).mean() for t in teachers])
    wanted = several.weights(mean)
    logs = several(ids[:3], torch.tensor([6, 9, -1])).logits.softmax(-1)
    parts = torch.stack([torch.softmax(t.table[ids[:3]], -1) for t in teachers])
    assert torch.allclose(logs[0], (wanted[:, None, None] * parts[:, 0]).sum(0), atol=1e-5)
    assert not torch.allclose(logs[1], (wanted[:, None, None] * parts[:, 1]).sum(0), atol=1e-4)  # of the first task
    again = Several([table(1), table(2)], [0.5, 0.5], 1.0, "loss")
    again.settle_by_task(text, tmp_path, {"teachers": 1}, Silent())
    assert again.teachers[0].asked == 0  # type: ignore[attr-defined]
    assert torch.equal(again(ids[:3], torch.tensor([6, 9, -1])).logits.softmax(-1), logs)


def test_a_text_without_windows_has_the_mean_over_the_other_tasks(tmp_path: Path) -> None:
    """All windows are replayed or written, so none that learns is of the first text, as those held back are."""
    teachers, ids = [table(1), table(2)], windows(10)
    text = TrainingText(ids=ids, learned=8, sources=("a", "b", "c"), sha256="x", note="", tasks=(1,) * 5 + (2,) * 3)
    several = Several(teachers, [0.5, 0.5], 1.0, "loss")
    several.settle_by_task(text, tmp_path, {"teachers": 1}, Silent())
    each = [torch.stack([losses(t, ids[part]).mean() for t in teachers]) for part in (slice(0, 5), slice(5, 8))]
    wanted = several.weights((each[0] + each[1]) / 2)
    found = several(ids[:2], torch.tensor([9, -1])).logits.softmax(-1)
    parts = torch.stack([torch.softmax(t.table[ids[:2]], -1) for t in teachers])
    assert torch.allclose(found, (wanted[:, None, None, None] * parts).sum(0), atol=1e-5)


@pytest.mark.parametrize("weighting", ["loss", "agreement"])
def test_weights_that_adapt_need_several_teachers(weighting: Weighting) -> None:
    with pytest.raises(RecipeError, match=r"weighs several teachers, and teacher names 1"):
        build(TRAIN_METHODS["distill"], {"teacher": "demo", "teacher_weighting": weighting})
