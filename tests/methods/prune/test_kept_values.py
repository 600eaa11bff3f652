"""Kept values of a block, tuned together: the mask is held, errors on windows held back never grow."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fettle
from fettle.errors import RecipeError
from fettle.methods.prune import sparsegpt
from fettle.methods.prune.kept_values import KeptValuesTuner, SoftValues
from fettle.methods.prune.sparsegpt import SparseGpt
from fettle.methods.registry import from_fields
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.storage import stored_schemes
from fettle.pipeline.recipe import parse_recipe
from fettle.tensors.masked import MaskedTensor
from fettle.tensors.quantized import QuantizedTensor


class TwoLayers:
    """y = second · tanh(first · x) on eight windows: a block whose linears can make up for each other."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = {
            "first": torch.randn(24, 16, generator=generator) / 4,
            "second": torch.randn(16, 24, generator=generator) / 5,
        }
        self.inputs = [torch.randn(64, 16, generator=generator) for _ in range(8)]
        self.targets = [self._run(self.weights, x) for x in self.inputs]

    @staticmethod
    def _run(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(x @ weights["first"].T) @ weights["second"].T

    @property
    def windows(self) -> int:
        return len(self.inputs)

    def _loss(self, weights: Mapping[str, Tensor], windows: Sequence[int]) -> Tensor:
        errors = [(self._run(weights, self.inputs[w]) - self.targets[w]).square().mean() for w in windows]
        return torch.stack(errors).mean()

    def error(self, weights: Mapping[str, Tensor], windows: Sequence[int]) -> float:
        return float(self._loss(weights, windows))

    def gradient(self, weights: Mapping[str, Tensor], windows: Sequence[int]) -> tuple[float, dict[str, Tensor]]:
        free = {name: weight.clone().requires_grad_(True) for name, weight in weights.items()}
        loss = self._loss(free, windows)
        found = torch.autograd.grad(loss, list(free.values()))
        return float(loss.detach()), dict(zip(free, found, strict=True))


def start(block: TwoLayers, **fields: object) -> dict[str, MaskedTensor]:
    hidden = torch.tanh(torch.cat(block.inputs) @ block.weights["first"].T)
    grams = {"first": torch.cat(block.inputs), "second": hidden}
    method = SparseGpt(group_size=8, asymmetric=True, **fields)  # type: ignore[arg-type]
    return {
        name: method.compress(weight, {"gram": grams[name].T @ grams[name]}, dtype="float32")
        for name, weight in block.weights.items()
    }


@pytest.mark.parametrize("fields", [{}, {"pattern": "2:4"}, {"bits": 4}])
def test_the_block_gets_better_and_the_mask_stays(fields: dict[str, object]) -> None:
    block = TwoLayers()
    before = start(block, **fields)
    tuner = KeptValuesTuner(steps=60, batch_windows=4, rate=0.5)
    after = tuner.tune(before, block.weights, block)
    held_back = [7]
    errors = [block.error({n: t.dequantize() for n, t in found.items()}, held_back) for found in (before, after)]
    assert errors[1] < 0.9 * errors[0]
    for name, found in after.items():
        assert torch.equal(found.kept, before[name].kept)
        assert isinstance(found.values, QuantizedTensor) == ("bits" in fields)
        assert not bool(found.dequantize()[~found.kept].any())
    again = tuner.tune(before, block.weights, block)
    assert all(torch.equal(after[name].dequantize(), again[name].dequantize()) for name in after)


def test_values_in_motion_are_those_of_the_file() -> None:
    block = TwoLayers()
    found = from_fields("sparsegpt", {"pattern": "2:4"}).compress(  # type: ignore[union-attr]
        block.weights["first"], {"gram": torch.eye(16)}, dtype="bfloat16"
    )
    soft = SoftValues(found)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        soft.step_(torch.randn(24, 16, generator=generator), latent_rate=0.01, scale_rate=0.0)
    assert torch.equal(soft.values(), soft.quantized().dequantize())
    assert torch.equal(soft.quantized().kept, found.kept)
    assert not torch.equal(soft.values(), found.dequantize())


def test_steps_that_lead_nowhere_leave_the_start() -> None:
    block = TwoLayers()
    before = start(block)
    after = KeptValuesTuner(steps=10, batch_windows=4, rate=16.0).tune(before, block.weights, block)
    held_back = [7]
    errors = [block.error({n: t.dequantize() for n, t in found.items()}, held_back) for found in (before, after)]
    assert errors[1] <= errors[0]


def test_the_walk_tunes_blocks(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    masks = {}
    for steps in (0, 40):
        step = {"method": "sparsegpt", "tune_steps": steps} | ({"tune_windows": 4} if steps else {})
        recipe = parse_recipe(
            {"name": "t", "calibration": {"windows": 8, "length": 32, "text": str(text_file)}, "steps": [step]}, "test"
        )
        out = tmp_path / str(steps)
        fettle.compress(tiny_llama, out, recipe, evaluate=False)
        checkpoint = Checkpoint.open(out)
        names = [name for name in checkpoint.entries if ".layers.0." in name and name.endswith("weight_mask")]
        masks[steps] = [checkpoint.read(name) for name in sorted(names)]
        assert len(stored_schemes(checkpoint, read_anatomy(checkpoint))) == 14
    assert len(masks[0]) == 7  # the first block's masks are those that the untuned run chose
    assert all(torch.equal(one, other) for one, other in zip(masks[0], masks[40], strict=True))
    with pytest.raises(RecipeError, match="tune_steps"):
        parse_recipe({"name": "t", "steps": [{"method": "sparsegpt", "tune_steps": -1}]}, "test")
    with pytest.raises(RecipeError, match="tune_windows is about tuning, and nothing is tuned"):
        parse_recipe({"name": "t", "steps": [{"method": "sparsegpt", "tune_steps": 0, "tune_windows": 4}]}, "test")


def test_blocks_are_tuned_without_being_asked_unless_they_are_large(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small ones are; larger ones say why not, and get what no steps give; who names a number gets it."""
    assert SparseGpt().tuner() == SparseGpt(tune_steps=None).tuner()
    assert SparseGpt(heal="none", rounds=1).tuner() is None  # the paper
    assert SparseGpt(tune_steps=0).tuner() is None
    asked, usual = SparseGpt(tune_steps=100).tuner(), SparseGpt().tuner()
    assert asked is not None and asked.most_weights is None
    assert usual is not None and usual.most_weights == sparsegpt.MOST_WEIGHTS
    monkeypatch.setattr(sparsegpt, "USUAL_STEPS", 12)

    def compress(name: str, **fields: object) -> tuple[dict[str, str], dict[str, str]]:
        fixed = {"sparsity": 0.9, "tune_rate": 0.05, "rounds": 2, "where": {"role": ["output", "down"]}}
        step = {"method": "sparsegpt", **fixed, **fields}
        calibration = {"windows": 16, "length": 32, "text": str(text_file)}
        recipe = parse_recipe({"name": "t", "calibration": calibration, "steps": [step]}, "test")
        made = fettle.compress(tiny_llama, tmp_path / name, recipe, evaluate=False)
        hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / name).glob("*.safetensors")}
        return hashes, {line["linear"]: line["note"] for line in made.summary["ledger"]}

    size = 64 * 64 + 64 * 172
    monkeypatch.setattr(sparsegpt, "MOST_WEIGHTS", size)
    small, notes = compress("small")
    assert small == compress("asked", tune_steps=12)[0]
    assert not any(notes.values())
    monkeypatch.setattr(sparsegpt, "MOST_WEIGHTS", size - 1)
    large, notes = compress("large")
    assert large == compress("none", tune_steps=0, tune_rate=0.25)[0] != small
    assert set(notes.values()) == {f"not tuned: {size:,} weights in the block, more than {size - 1:,}"}
