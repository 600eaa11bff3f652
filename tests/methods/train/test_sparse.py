"""Masks that change in training: the papers' schedules, exact counts, regrowth, and the same after a kill."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fettle.errors import RecipeError, UsageError
from fettle.methods.registry import build
from fettle.methods.train import TRAIN_METHODS, Distill, Sparse
from fettle.methods.train import sparse as sparse_room
from fettle.methods.train.curve import Curve
from fettle.methods.train.job import TrainJob
from fettle.methods.train.masks import (
    SparseLinear,
    exchanged_share,
    gradients_of,
    pruned,
    regrown,
    sparsity_at,
)
from fettle.methods.train.training import train
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import load
from fettle.models.storage import stored_schemes
from fettle.tensors.patterns import parse_pattern

Trained = Callable[..., tuple[Path, Curve]]
HOW: dict[str, Any] = {"steps": 8, "mask_every": 2, "learning_rate": 1e-3, "checkpoint_every": 2}


def module(movement: bool = False) -> SparseLinear:
    torch.manual_seed(0)
    return SparseLinear(torch.nn.Linear(6, 4), movement=movement)


def test_the_schedules_are_the_papers() -> None:
    found = [sparsity_at(step, 0.8, "cubic", 2, 6) for step in range(8)]
    assert found == pytest.approx([0, 0, 0, 0.4625, 0.7, 0.7875, 0.8, 0.8])
    assert [sparsity_at(step, 0.5, "linear", 0, 4) for step in range(5)] == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
    assert sparsity_at(0, 0.5, "one_shot", 3, 9) == 0.5
    assert [exchanged_share(step, 0.3, 10) for step in (0, 5, 10, 12)] == pytest.approx([0.3, 0.15, 0, 0])


def test_what_is_gone_learns_nothing_and_its_score_learns_as_if_it_were_there() -> None:
    linear, inputs = module(movement=True), torch.randn(3, 6)
    linear.mask = torch.rand(4, 6) > 0.5
    linear(inputs).square().sum().backward()
    plain = (linear.weight.detach() * linear.mask).requires_grad_()
    (inputs @ plain.T + linear.bias.detach()).square().sum().backward()
    assert torch.allclose(linear.weight.grad, plain.grad * linear.mask, atol=1e-6)
    assert torch.allclose(linear.scores.grad, plain.grad * linear.weight.detach(), atol=1e-6)
    assert plain.grad[~linear.mask].abs().min() > 0


def test_the_gradient_for_masks_is_that_of_all_weights_and_leaves_no_trace() -> None:
    linear, inputs = module(), torch.randn(2, 6)
    linear.mask = torch.rand(4, 6) > 0.5
    found = gradients_of([linear], lambda: (linear(row).square().sum() for row in inputs))[0]
    plain = (linear.weight.detach() * linear.mask).requires_grad_()
    (inputs @ plain.T + linear.bias.detach()).square().sum().backward()
    assert torch.allclose(found, plain.grad / 2, atol=1e-6)
    assert linear.weight.grad is None
    assert linear.last is None


def test_gone_stays_gone_by_magnitude_and_may_return_by_movement() -> None:
    linear, pattern = module(movement=True), parse_pattern("layer")
    first = pruned(linear, None, pattern, 0.25, "magnitude")
    smallest = linear.weight.abs().flatten().argsort()[:6]
    assert set((~first).flatten().nonzero()[:, 0].tolist()) == set(smallest.tolist())
    linear.mask = first
    with torch.no_grad():
        linear.weight[~first] = 100.0  # were it looked at, it would return
    second = pruned(linear, None, pattern, 0.5, "magnitude")
    assert int((~second).sum()) == 12
    assert not (second & ~first).any()
    with torch.no_grad():
        linear.scores[~first] = 1.0
    assert (pruned(linear, None, pattern, 0.5, "movement") & ~first).sum() == 6


def test_of_equal_scores_the_smaller_weights_go() -> None:
    linear, pattern = module(movement=True), parse_pattern("layer")
    smallest = set(linear.weight.abs().flatten().argsort()[:12].tolist())
    found = pruned(linear, None, pattern, 0.5, "movement")
    assert set((~found).flatten().nonzero()[:, 0].tolist()) == smallest
    with torch.no_grad():
        linear.scores[~found] = 1e-6  # the least score still counts for more than any weight
    found = pruned(linear, None, pattern, 0.5, "movement")
    assert set(found.flatten().nonzero()[:, 0].tolist()) == smallest


def test_what_comes_back_begins_at_zero(tmp_path: Path) -> None:
    masks = masks_of(tmp_path)
    take_steps(masks, 0, 4)
    before, old = masks.modules[0].mask.clone(), masks.modules[0].weight.detach().clone()
    masks.begin(4, lambda: losses_of(masks.modules[0], 4))
    back = masks.modules[0].mask & ~before
    assert back.any()
    assert old[back].abs().min() > 0
    assert not masks.modules[0].weight.detach()[back].any()
    assert torch.equal(masks.modules[0].weight.detach()[~back], old[~back])


@pytest.mark.parametrize("score", ["magnitude", "movement"])
def test_minutes_that_end_early_leave_all_pruned(score: str, tmp_path: Path) -> None:
    linear = module(movement=score == "movement")
    fields = Sparse(steps=10, mask_every=2, score=score, pruned_until=1.0)  # type: ignore[arg-type]
    masks = sparse_room.Masks(fields, [linear], ["one"], tmp_path)
    take_steps(masks, 0, 4)
    assert 0 < int((~linear.mask).sum()) < 12
    gone = ~linear.mask
    masks.finish()
    assert int((~linear.mask).sum()) == 12
    assert score == "movement" or not (gone & linear.mask).any()


def test_masks_of_another_training_are_refused(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    how = {**HOW, "windows": 8, "length": 32, "text": str(text_file)}
    job = TrainJob(model=tiny_llama, original=tiny_llama, output=tmp_path / "out", folder=tmp_path / "run")
    Sparse(**how).learner(job)
    Sparse(**how).learner(job)
    with pytest.raises(UsageError, match=r"masks holds the masks of another training \(score, seed differ\)"):
        Sparse(**{**how, "seed": 1, "score": "taylor"}).learner(job)


@pytest.mark.parametrize("by_row", [False, True])
def test_regrowth_exchanges_the_smallest_for_the_steepest(by_row: bool) -> None:
    weight, gradient = torch.randn(4, 10), torch.randn(4, 10)
    mask = torch.rand(4, 10) > 0.5
    mask[:, :2] = torch.tensor([True, False])
    found = regrown(weight, gradient, mask, 0.5, by_row=by_row)
    for rows in [[row] for row in range(4)] if by_row else [list(range(4))]:
        kept = [(abs(float(weight[r, c])), r, c) for r in rows for c in range(10) if mask[r, c]]
        gone = [(abs(float(gradient[r, c])), r, c) for r in rows for c in range(10) if not mask[r, c]]
        count = min(round(0.5 * len(kept)), len(gone))
        dropped = {(r, c) for _, r, c in sorted(kept)[:count]}
        grown = {(r, c) for _, r, c in sorted(gone)[-count:]}
        assert {(r, c) for r in rows for c in range(10) if mask[r, c] and not found[r, c]} == dropped
        assert {(r, c) for r in rows for c in range(10) if found[r, c] and not mask[r, c]} == grown


OTHERS = [{"score": "movement"}, {"growth": "one_shot", "regrow": 0.3}]


@pytest.mark.parametrize(
    "fields",
    [{"score": "taylor", "pattern": "2:4"}, *(pytest.param(other, marks=pytest.mark.exhaustive) for other in OTHERS)],
)
def test_what_is_written_is_as_sparse_as_asked_and_stored_with_a_mask(
    fields: dict[str, Any], tiny_llama: Path, trained: Trained
) -> None:
    output, curve = trained(Sparse, tiny_llama, **HOW, **fields)
    assert len(curve.losses) == 8
    checkpoint = Checkpoint.open(output)
    stored = stored_schemes(checkpoint, read_anatomy(checkpoint))
    assert stored
    loaded = load(output, dense=True)
    for linear in loaded.anatomy.linears():
        weight = loaded.model.get_submodule(linear.slot.parameter.removesuffix(".weight")).weight
        assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
        if fields.get("pattern") == "2:4":
            assert ((weight.reshape(-1, 4) != 0).sum(-1) <= 2).all()
    healed, _ = trained(Distill, output, tiny_llama, keep_zeros=True, steps=1)  # a next stage goes on from it
    assert (healed / "fettle.json").is_file()


@pytest.mark.slow
def test_masks_of_a_killed_run_are_those_of_an_undisturbed_one(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the step behind a checkpoint, with the next masks drawn: it goes on with them, to the same bytes."""
    how = {
        **HOW, "windows": 8, "length": 32, "batch_windows": 4, "held_back": 2, "text": str(text_file), "regrow": 0.3,
        "mask_every": 3, "growth": "one_shot",  # with the second masks weights come back
    }  # fmt: skip

    def job(name: str) -> TrainJob:
        return TrainJob(model=tiny_llama, original=tiny_llama, output=tmp_path / name, folder=tmp_path / f"{name}.run")

    curve = train(Sparse(**how), job("undisturbed"))
    begin, stopped = sparse_room.Masks.begin, []

    def stop(self: sparse_room.Masks, step: int, losses: Any) -> None:
        begin(self, step, losses)
        if step == 3 and not stopped:
            stopped.append(step)
            raise KeyboardInterrupt

    monkeypatch.setattr(sparse_room.Masks, "begin", stop)
    with pytest.raises(KeyboardInterrupt):
        train(Sparse(**how), job("killed"))
    again = train(Sparse(**how), job("killed"))
    assert again.losses == curve.losses
    digests = [
        {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((tmp_path / name).iterdir())}
        for name in ("undisturbed", "killed")
    ]
    assert digests[0] == digests[1]
    shutil.rmtree(tmp_path / "killed")  # over, but not written: the masks are those of the last steps
    train(Sparse(**how), job("killed"))
    assert (
        hashlib.sha256((tmp_path / "killed" / "model-00001-of-00003.safetensors").read_bytes()).hexdigest()
        == (digests[0]["model-00001-of-00003.safetensors"])
    )
    record = json.loads((tmp_path / "killed" / "fettle.json").read_text())
    assert record["training"]["fields"]["regrow"] == 0.3
    shutil.rmtree(tmp_path / "killed.run" / "masks")
    with pytest.raises(UsageError, match=r"is gone, with which steps were taken"):
        train(Sparse(**{**how, "steps": 9}), job("killed"))


REGROWING: dict[str, Any] = {"steps": 10, "mask_every": 2, "growth": "one_shot", "regrow": 0.5, "pruned_until": 1.0}


def masks_of(folder: Path) -> sparse_room.Masks:
    return sparse_room.Masks(Sparse(**REGROWING), [module()], ["one"], folder)


def losses_of(linear: SparseLinear, step: int) -> Iterator[torch.Tensor]:
    inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(step))
    return (linear(row).square().sum() for row in inputs)


def take_steps(masks: sparse_room.Masks, first: int, last: int) -> torch.Tensor:
    """Steps of plain descent behind `begin`; the weights after them."""
    (linear,) = masks.modules
    for step in range(first, last):
        masks.begin(step, lambda step=step: losses_of(linear, step))  # type: ignore[misc]
        (found,) = torch.autograd.grad(sum(losses_of(linear, step)), [linear.weight])  # type: ignore[arg-type]
        with torch.no_grad():
            linear.weight -= 0.01 * found
    return linear.weight.detach().clone()


@pytest.mark.parametrize("drawn", [True, False])
def test_a_resumed_run_that_regrows_has_the_same_weights(drawn: bool, tmp_path: Path) -> None:
    """Taken up at a step that changes masks: drawn before the kill, or killed before they were written."""
    masks = masks_of(tmp_path)
    saved = take_steps(masks, 0, 4)
    wanted, mask = take_steps(masks, 4, 10), masks.modules[0].mask
    for path in tmp_path.glob("masks-*.safetensors"):
        if not drawn and int(path.stem[6:]) >= 4:
            path.unlink()
    again = masks_of(tmp_path)
    with torch.no_grad():
        again.modules[0].weight.copy_(saved)
    assert torch.equal(take_steps(again, 4, 10), wanted)
    assert torch.equal(again.modules[0].mask, mask)


def test_a_resumed_run_needs_the_masks_before(tmp_path: Path) -> None:
    take_steps(masks_of(tmp_path), 0, 4)
    (tmp_path / "masks-00000002.safetensors").unlink()
    with pytest.raises(UsageError, match=r"masks-00000002.safetensors is gone, with which steps were taken"):
        take_steps(masks_of(tmp_path), 4, 5)


def test_a_process_that_looks_late_draws_as_the_others_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, as threads: the first is done with its masks before the second looks for their file."""
    together, drawn, found = threading.Barrier(2, timeout=20), [], {}
    draw, is_file = sparse_room.Masks._draw, Path.is_file

    def is_first() -> bool:
        return threading.current_thread().name == "first"

    def look(path: Path) -> bool:
        if not is_first():
            time.sleep(0.5)
        return is_file(path)

    def count(self: sparse_room.Masks, step: int, losses: Any) -> None:
        drawn.append((threading.current_thread().name, step))
        draw(self, step, losses)

    def process(masks: sparse_room.Masks) -> None:
        found[threading.current_thread().name] = take_steps(masks, 0, 4)

    monkeypatch.setattr(Path, "is_file", look)
    monkeypatch.setattr(sparse_room, "is_main_process", is_first)
    monkeypatch.setattr(sparse_room, "wait_for_all", together.wait)
    monkeypatch.setattr(sparse_room.Masks, "_draw", count)
    both = ("first", "second")
    threads = [threading.Thread(target=process, name=name, args=(masks_of(tmp_path),)) for name in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(drawn) == [("first", 0), ("first", 2), ("second", 0), ("second", 2)]
    assert torch.equal(found["first"], found["second"])


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"keep": "best"}, "keep=best would keep the dense start"),
        ({"pattern": "2:4", "sparsity": 0.75}, "pattern=2:4 means sparsity=0.5"),
        ({"pruned_from": 0.7}, "pruned_until=0.6 is not behind"),
        ({"regrow": 0.2, "pattern": "4x4"}, "regrow exchanges single weights"),
        ({"score": "wanda"}, "magnitude, taylor, movement"),
        ({"score": "movement", "growth": "one_shot"}, "score=movement has seen no step when weights go in step 0"),
        ({"score": "movement", "growth": "one_shot", "pruned_from": 0.001}, "has seen no step"),
        ({"score": "movement", "pruned_until": 0.001}, "has seen no step"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        build(TRAIN_METHODS["sparse"], fields)


def test_a_mask_goes_where_its_weight_goes() -> None:
    layer = SparseLinear(torch.nn.Linear(6, 4), movement=True).to("meta")
    assert layer.mask.device == layer.weight.device == torch.device("meta")
    assert layer.double().mask.dtype == torch.bool
