"""Bottleneck adapters: Houlsby's formula, beside dense and packed bases that stay as they are, several by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fettle
from fettle.errors import UsageError
from fettle.methods.train import Adapter
from fettle.methods.train.adapters import load_adapters
from fettle.methods.train.bottleneck import BottleneckModel
from fettle.methods.train.curve import Curve
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import load
from fettle.pipeline.recipe import parse_recipe

Trained = Callable[..., tuple[Path, Curve]]
IDS = torch.arange(2, 22).unsqueeze(0)
HOW = {"kind": "bottleneck", "rank": 3, "steps": 3, "learning_rate": 2e-2, "keep": "last"}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


def test_an_adapter_adds_the_papers_term_behind_attention_and_mlp(tiny_llama: Path) -> None:
    loaded = load(tiny_llama)
    plain = logits(loaded.model)
    model = BottleneckModel(loaded)
    model.add("mine", 3)
    assert torch.equal(logits(model), plain)  # U begins at zero
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".adapters.mine." in name
    }
    parameters = 2 * 2 * (2 * 64 * 3 + 3 + 64)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
    place = model.places["model.layers.1.mlp.down_proj"]
    adapter = place.adapters["mine"]
    torch.nn.init.normal_(adapter.up.weight)
    inputs = torch.randn(2, 172)
    plainly = inputs @ place.inner.weight.T
    bent = torch.nn.functional.gelu(plainly @ adapter.down.weight.T + adapter.down.bias)
    assert torch.allclose(place(inputs), plainly + bent @ adapter.up.weight.T + adapter.up.bias, atol=1e-4)


def test_it_learns_beside_codes_and_several_are_chosen_by_name(
    tiny_llama: Path, tmp_path: Path, trained: Trained
) -> None:
    base = tmp_path / "packed"
    recipe = parse_recipe({"name": "packed", "steps": [{"method": "round_to_nearest", "bits": 4}]}, "test")
    fettle.compress(tiny_llama, base, recipe, evaluate=False)
    before = Checkpoint.open(base).file_hashes()
    one, curve = trained(Adapter, base, tiny_llama, **HOW)
    two, _ = trained(Adapter, base, tiny_llama, **{**HOW, "rank": 2, "seed": 1})
    assert Checkpoint.open(base).file_hashes() == before
    assert curve.held_back[-1][1] != curve.held_back[0][1]
    told = json.loads((one / "fettle_adapter.json").read_text())
    assert told["parameters"] == 2 * 2 * (2 * 64 * 3 + 3 + 64)
    assert told["bytes"] == (one / "adapter_model.safetensors").stat().st_size
    plain = logits(load(base).model)
    both = load_adapters(load(base), {"a": one, "b": two})
    first = logits(both)
    both.set_adapter("b")
    second = logits(both)
    both.set_adapter("a")
    assert torch.equal(logits(both), first)
    assert not torch.allclose(first, second, atol=1e-4)
    assert not torch.allclose(first, plain, atol=1e-4)
    with pytest.raises(UsageError, match="adapter 'c'"):
        both.set_adapter("c")
