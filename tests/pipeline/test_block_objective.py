"""A block as a function of its weights: gradients against differences, and a whole compression that tunes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fettle
from fettle.models.anatomy import Anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.skeleton import Skeleton
from fettle.pipeline.block_objective import BlockObjective
from fettle.workers import Workers

from .conftest import digests, make_recipe


def objective(folder: Path, anatomy: Anatomy, threads: int = 1) -> tuple[BlockObjective, dict[str, torch.Tensor]]:
    skeleton = Skeleton.build(Checkpoint.open(folder), anatomy)
    generator = torch.Generator().manual_seed(1)
    hidden = [skeleton.embed(torch.randint(3, 60, (1, 12), generator=generator)) for _ in range(3)]
    skeleton.load_block(0)
    targets = [skeleton.run_block(0, state) for state in hidden]
    linears = {linear.name: linear for linear in anatomy.blocks[0].linears}
    weights = {name: skeleton.weight(linear) for name, linear in linears.items()}
    moved = {name: weight + 0.05 * weight.std() * torch.ones_like(weight) for name, weight in weights.items()}
    view = BlockObjective(skeleton, 0, linears, list(zip(hidden, targets, strict=True)), Workers(threads))
    assert view.error(weights, [0, 1, 2]) == 0.0
    return view, moved


def test_gradients_are_the_slopes_of_the_error(tiny_llama: Path, tiny_anatomy: Anatomy) -> None:
    view, weights = objective(tiny_llama, tiny_anatomy)
    error, gradients = view.gradient(weights, [0, 2])
    assert error == pytest.approx(view.error(weights, [0, 2]), rel=1e-6)
    generator = torch.Generator().manual_seed(2)
    for name, weight in weights.items():
        direction = torch.randn(weight.shape, generator=generator) * weight.std()
        step = 1e-3
        above = view.error({**weights, name: weight + step * direction}, [0, 2])
        below = view.error({**weights, name: weight - step * direction}, [0, 2])
        slope = float((gradients[name] * direction).sum())
        assert (above - below) / (2 * step) == pytest.approx(slope, rel=0.05, abs=2e-4), name


def test_threads_change_no_bit_of_a_gradient(tiny_llama: Path, tiny_anatomy: Anatomy) -> None:
    found = []
    for threads in (1, 2):
        view, weights = objective(tiny_llama, tiny_anatomy, threads)
        with view._workers:
            found.append(view.gradient(weights, [0, 1, 2]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


def test_a_compression_that_tunes_is_better_and_the_same_with_any_threads(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    changes = {"method": "learned_rounding", "start": "round_to_nearest", "bits": 2, "steps": 30, "batch_windows": 4}
    recipe = make_recipe(text_file, **changes)
    for threads in (1, 2):
        fettle.compress(tiny_llama, tmp_path / str(threads) / "out", recipe, threads=threads, evaluate=False)
    assert digests(tmp_path / "1" / "out") == digests(tmp_path / "2" / "out")
    fettle.compress(
        tiny_llama, tmp_path / "rtn", make_recipe(text_file, method="round_to_nearest", bits=2), evaluate=False
    )
    ours, nearest = (
        fettle.evaluate(tmp_path / name, reference=tiny_llama, text=text_file, length=32) for name in ("1/out", "rtn")
    )
    assert ours.kl_mean is not None and nearest.kl_mean is not None
    assert ours.kl_mean < 0.9 * nearest.kl_mean
